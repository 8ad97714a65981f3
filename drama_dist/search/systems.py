"""Systems: everything that encodes texts or ranks passages, in one table.

Covers each system's name and meaning, the settings and the model it depends on, and how it is loaded, encodes a
collection and ranks passages; and mixes of two systems, which have no encodings of their own. Does not cover which
systems are trained (run/graph.py), or scoring (evaluate/).
Shapes: Q queries, K components, k hits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from drama_dist.corpus.collection import Collection
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import dtype_name
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import as_encoded, with_dims_within
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.model_check import check_encoder, check_llama
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.encoder.pretrained import read_llama_config
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.labels import OTHER_MODEL, is_endpoint, mixed
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING, TRAINING_TEXTS
from drama_dist.run.progress import progress_bar
from drama_dist.search.endpoint_teacher import EndpointTeacher
from drama_dist.search.fusion import convex_mix
from drama_dist.search.lexical import LexicalIndex, build_lexical_index
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.search.quantised import search_in
from drama_dist.search.shards import EmbeddingShards, StoredVectors, TextEncoder, texts_cut, write_shard, write_shards
from drama_dist.search.target_space import TargetSpace
from drama_dist.search.teacher import MixedTeacher, Teacher
from drama_dist.setting_types import Precision, recorded
from drama_dist.settings import EncodeSettings, Settings, SettingsError

MIX_DEPTH = 1000  # hits of each system that a mix looks at


@dataclass(frozen=True)
class Ranking:
    """Hits of every query: scores Q × k float32 and positions Q × k int64, best first, padded with -1.

    dim: number of vector components compared; None for a system without vectors. missed: the score of a passage that
    is no hit where a query has fewer than k; None where it is not known. precision: of the passages' vectors.
    """

    dim: int | None
    scores_Qk: np.ndarray
    positions_Qk: np.ndarray
    missed: float | None = None
    precision: Precision = "float32"


@dataclass(frozen=True)
class System(ABC):
    """name: as in evaluate.systems. meaning and colour: for the report."""

    name: str
    meaning: str
    colour: str

    @abstractmethod
    def sections(self, settings: Settings) -> dict[str, Any]:
        """The settings that the encoding of a collection depends on."""

    def models(self, settings: Settings) -> Sequence[str]:
        """The external models that it uses; none where the run trains its model, or it needs none."""
        return ()

    def check(self, settings: Settings) -> None:
        """Raise SettingsError, naming the setting, if its external model cannot be used."""
        return None

    @abstractmethod
    def encode(
        self, settings: Settings, folder: StageFolder, collection: Collection, stored: StoredVectors | None
    ) -> None:
        """Write the collection's encoding, or a share of it; finish the folder when it is complete.

        stored: the system's vectors of another collection, of which those of the same passages are copied.
        """

    @abstractmethod
    def rank(
        self,
        settings: Settings,
        encoded: Path,
        queries: Sequence[str],
        depth: int,
        precisions: Sequence[Precision] = ("float32",),
    ) -> Iterator[Ranking]:
        """Rank an encoded collection for queries, at every dim to compare, largest first, in each of the precisions.

        A system without vectors has one ranking.
        """


class DenseSystem(System):
    """A system with vectors; its encoding is a folder of embedding shards."""

    @abstractmethod
    def load(self, settings: Settings) -> TextEncoder:
        """The encoder, ready for queries and passages."""

    def sections(self, settings: Settings) -> dict[str, Any]:
        return {"encode": _of_vectors(settings.encode), "encoder": recorded(settings.encoder)}

    def dtype(self, settings: Settings) -> str:
        """bfloat16 or float32."""
        return dtype_name(settings.encode.dtype)

    def dims(self, settings: Settings, size: int) -> list[int]:
        """The numbers of components to compare. size: of the whole vectors."""
        return [size]

    def encode(
        self, settings: Settings, folder: StageFolder, collection: Collection, stored: StoredVectors | None
    ) -> None:
        encoder, rows = self.load(settings), settings.encode.shard_passages
        shards = write_shards(folder.folder, collection.passages, encoder, rows, folder.share, folder.name, stored)
        if shards is not None:
            cut = {"passages": texts_cut(folder.folder)}
            folder.finish(passages=len(shards), dim=shards.dim, dtype=self.dtype(settings), cut=cut)

    def rank(
        self,
        settings: Settings,
        encoded: Path,
        queries: Sequence[str],
        depth: int,
        precisions: Sequence[Precision] = ("float32",),
    ) -> Iterator[Ranking]:
        shards, multiplier = EmbeddingShards(encoded), settings.evaluate.rescore_multiplier
        queries_QK = self.load(settings).encode_queries(queries)
        for dim in sorted(self.dims(settings, shards.dim), reverse=True):
            cut_QK = matryoshka_cut_array(queries_QK, dim)
            for precision in precisions:
                found = search_in(precision, shards, cut_QK, depth, multiplier)
                yield Ranking(dim, *found, precision=precision)


class TrainedSystem(DenseSystem):
    """An encoder that this run trains."""

    def load(self, settings: Settings) -> Encoder:
        return _own_encoder(settings, str(Path(settings.run) / TRAINING[self.name]), contract=settings.encoder)

    def dims(self, settings: Settings, size: int) -> list[int]:
        return settings.encoder.dims


class AsymmetricSystem(TrainedSystem):
    """Queries by what this run trains, passages by its targets: for passages that are encoded ahead of time (LEAF's
    asymmetric mode: Vujanic and Rueckstiess 2025, arXiv 2509.12539).

    A passage's target comes from the teacher's vector of it and BM25's weights, with the training texts' statistics.
    """

    def check(self, settings: Settings) -> None:
        if not settings.train.regression_weight:
            raise SettingsError("system asymmetric needs targets: set train.regression_weight above 0")

    def load(self, settings: Settings) -> Encoder:
        drama = SYSTEMS["drama"]
        assert isinstance(drama, TrainedSystem)
        return drama.load(settings)

    def encode(
        self, settings: Settings, folder: StageFolder, collection: Collection, stored: StoredVectors | None
    ) -> None:
        ranks.by_rank_0(lambda: self._write(settings, folder, collection))
        shards = EmbeddingShards(folder.folder)
        folder.finish(passages=len(shards), dim=shards.dim)

    def _write(self, settings: Settings, folder: StageFolder, collection: Collection) -> None:
        run, label = Path(settings.run), folder.name.split("/")[1]
        space, vectors = TargetSpace.open(run / "targets"), EmbeddingShards(run / "encode" / label / "teacher")
        uses_bm25 = settings.targets.uses_bm25
        words = LexicalIndex(run / "encode" / TRAINING_TEXTS / "bm25") if uses_bm25 else None
        bar = progress_bar(len(vectors), folder.name, "passages")
        for shard, (first, teacher_nT) in enumerate(vectors.blocks(settings.encode.shard_passages)):
            texts = collection.passages.contents(range(first, first + len(teacher_nT)))
            weights_nV = None if words is None else words.weights_of(texts)
            write_shard(folder.folder, shard, space.targets("passage", teacher_nT, weights_nV))
            bar.update(len(texts))
        bar.close()


class ClosedFormSystem(TrainedSystem):
    """What training by regression begins from; its layers add nothing yet (train/token_start.py), so none is run."""

    def load(self, settings: Settings) -> Encoder:
        encoder = super().load(settings)
        encoder.backbone.layers = nn.ModuleList()
        return encoder


class UnprunedSystem(DenseSystem):
    """The unpruned LLM: causal, mean pooled."""

    def models(self, settings: Settings) -> Sequence[str]:
        return [settings.llm]

    def check(self, settings: Settings) -> None:
        with named_by("llm", settings.llm):
            check_llama(settings.llm)

    def load(self, settings: Settings) -> TextEncoder:
        size = read_llama_config(reachable(resolve(settings.llm))).hidden_size  # which the run's dims may exceed
        contract = with_dims_within(settings.encoder, size)
        return _own_encoder(settings, settings.llm, contract=contract, bidirectional=False)


class TeacherSystem(DenseSystem):
    """The retriever that the encoder learns from and that ranks the training data, or several as one."""

    def sections(self, settings: Settings) -> dict[str, Any]:
        of_fusion = ("fuse_bm25", "rrf_k")  # with BM25, when examples are ranked
        teacher = {name: value for name, value in recorded(settings.teacher).items() if name not in of_fusion}
        return {"teacher": teacher, "encode": {"shard_passages": settings.encode.shard_passages}}

    def models(self, settings: Settings) -> Sequence[str]:
        return list(settings.teacher.models)

    def check(self, settings: Settings) -> None:
        for name in settings.teacher.models:
            with named_by("teacher.model" if name == settings.teacher.model else "teacher.others", name):
                _teacher(settings, name).check()

    def dtype(self, settings: Settings) -> str:
        return dtype_name(settings.teacher.dtype)

    def load(self, settings: Settings) -> TextEncoder:
        teachers = [_teacher(settings, name) for name in settings.teacher.models]
        return teachers[0] if len(teachers) == 1 else MixedTeacher(teachers, list(settings.teacher.models.values()))


class OtherModel(DenseSystem):
    """Any Llama-type encoder, with the contract of its folder."""

    def sections(self, settings: Settings) -> dict[str, Any]:
        return {"encode": _of_vectors(settings.encode)}

    def models(self, settings: Settings) -> Sequence[str]:
        return [self._source]

    @property
    def _source(self) -> str:
        return self.name.removeprefix(OTHER_MODEL)

    def check(self, settings: Settings) -> None:
        with named_by("evaluate.systems", self.name):
            check_encoder(self._source)

    def load(self, settings: Settings) -> TextEncoder:
        return _encoder(settings, self._source)


class LexicalSystem(System):
    """BM25; its encoding of a collection is the index."""

    def sections(self, settings: Settings) -> dict[str, Any]:
        return {}

    def encode(
        self, settings: Settings, folder: StageFolder, collection: Collection, stored: StoredVectors | None
    ) -> None:
        if ranks.rank() == 0:
            build_lexical_index(collection.passages.texts(), collection.language, folder.folder)
        folder.finish(passages=len(collection.passages))

    def rank(
        self,
        settings: Settings,
        encoded: Path,
        queries: Sequence[str],
        depth: int,
        precisions: Sequence[Precision] = ("float32",),
    ) -> Iterator[Ranking]:
        yield Ranking(None, *LexicalIndex(encoded).search(queries, depth), missed=0.0)


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        TrainedSystem("drama", "the small retriever of this run", "#0b6e99"),
        AsymmetricSystem("asymmetric", "queries as drama, passages by the targets: teacher and BM25", "#1f8a70"),
        ClosedFormSystem("ridge", "the pruned LLM with token vectors in closed form, not trained", "#7fb5c8"),
        TrainedSystem("random-init", "the same shape and training, from random weights", "#a0a4ab"),
        UnprunedSystem("llm-unpruned", "the unpruned LLM, mean pooled", "#8f6bb3"),
        TeacherSystem("teacher", "the retriever that the encoder learns from", "#d98324"),
        LexicalSystem("bm25", "lexical search", "#4d8b45"),
    )
}


def system_called(label: str, settings: Settings) -> System:
    """The system with this label in a run's folders and tables; raises SettingsError if there is none."""
    name = settings.evaluate.labels.get(label, label)
    if name in SYSTEMS:
        return SYSTEMS[name]
    if name.startswith(OTHER_MODEL):
        return OtherModel(name, f"the model {name.removeprefix(OTHER_MODEL)}", "#333a42")
    raise SettingsError(
        f"system {label!r}: expected {', '.join(SYSTEMS)}, or a model of evaluate.systems: {settings.evaluate.systems}"
    )


def rankings(
    label: str, settings: Settings, encoded: Callable[[str], Path], queries: Sequence[str], depth: int
) -> Iterator[Ranking]:
    """Rank an encoded collection by the system or mix with this label. encoded: where a system's encoding lies.

    A mix takes its systems at their largest dims, in float32, and the scores of the MIX_DEPTH best of each. Raises
    SettingsError as `system_called` does.
    """
    parts = _parts(label, settings)
    if not parts:
        precisions = settings.evaluate.precisions
        yield from system_called(label, settings).rank(settings, encoded(label), queries, depth, precisions)
        return
    first, second = (
        next(SYSTEMS[part].rank(settings, encoded(part), queries, max(depth, MIX_DEPTH))) for part in parts
    )
    weight = settings.evaluate.mix_weight
    scored = [(ranking.scores_Qk, ranking.positions_Qk, ranking.missed) for ranking in (first, second)]
    scores_Qk, positions_Qk = convex_mix(scored, [weight, 1 - weight], depth)
    yield Ranking(first.dim or second.dim, scores_Qk.astype(np.float32), positions_Qk)


def meaning_and_colour(label: str, settings: Settings) -> tuple[str, str]:
    """What the report says of a system or mix, and draws it in."""
    parts, weight = _parts(label, settings), settings.evaluate.mix_weight
    if not parts:
        system = system_called(label, settings)
        return system.meaning, system.colour
    meaning = f"{weight:g} of the score of {parts[0]}, {1 - weight:g} of that of {parts[1]}, each from 0 to 1"
    return meaning, "#b0413e" if "drama" in parts else "#8a6d5c"


def _parts(label: str, settings: Settings) -> tuple[str, ...]:
    return mixed(settings.evaluate.labels.get(label, label))


def _of_vectors(encode: EncodeSettings) -> dict[str, Any]:
    """What vectors depend on; an index over them is another stage's."""
    return {name: value for name, value in recorded(encode).items() if name not in ("index", "index_search")}


def _teacher(settings: Settings, name: str) -> Teacher:
    if is_endpoint(name):
        return EndpointTeacher(settings.teacher, name)
    return LocalTeacher(replace(settings.teacher, model=name, others={}), settings.trust_remote_code)


def _encoder(settings: Settings, source: str, **options: Any) -> Encoder:
    encoder = load(source, dtype=dtype_name(settings.encode.dtype), **options)
    encoder.tokens_per_batch = settings.encode.batch_tokens
    return encoder


def _own_encoder(settings: Settings, source: str, **options: Any) -> Encoder:
    """One that reads passages as the settings say, not as its folder does."""
    encoder = _encoder(settings, source, **options)
    positions = encoder.backbone.config.max_position_embeddings
    encoder.contract = as_encoded(encoder.contract, settings.encode, positions)
    return encoder

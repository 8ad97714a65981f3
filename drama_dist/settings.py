"""Every setting of every stage: one dataclass a section, each value checked where it is declared.

Covers types, ranges and what settings must fit each other. Does not cover how files and overrides are read
(settings_file.py), where artefacts lie (run/folder.py), nor what only a model, a corpus or the machine can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from drama_dist.labels import OWN_COLLECTIONS, SYSTEMS, known_system, labels_of, mixed
from drama_dist.learning_settings import AugmentSettings, TargetSettings, TeacherSettings, check_windows
from drama_dist.setting_types import (
    CONFIG,
    Amount,
    CollectionName,
    CostOnly,
    Count,
    CountOrZero,
    Distinct,
    Dtype,
    Fraction,
    FreeText,
    GibOrAuto,
    LearningRate,
    Name,
    Precision,
    Rank,
    Size,
    SomeFraction,
    SomeKeys,
    SourceWeights,
    SuiteName,
    Temperature,
    Text,
    TextTokens,
)
from drama_dist.settings_file import SettingsError, read_yaml, write_yaml
from drama_dist.suites import paths_of

PACKAGES_CORPUS = "installed-packages"
EXACT = "Flat"  # of encode.index: search without an index
T = TypeVar("T")
_STEPS = 1000  # of training, where neither train.steps nor train.minutes is set


System = Annotated[Text, AfterValidator(known_system)]


@dataclass(config=CONFIG, kw_only=True)
class CorpusSettings:
    """What to retrieve from, and which queries to test with."""

    # A BEIR folder, a file or files of records, a Hugging Face dataset on disk, or "installed-packages". By name, and
    # fetched once: huggingface:OWNER/NAME[@REVISION][/SUBSET][/SPLIT], or ir_datasets:ID (extra ir-datasets)
    path: CollectionName
    packages: list[Text] = Field(default=[])  # of "installed-packages": import names, whose docs are read
    # Other texts to train on, against queries unlike the corpus: what corpus.path may be, or null. Never searched.
    general: CollectionName | None = None
    general_packages: list[Text] = Field(default=[])  # of general=installed-packages
    general_share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the passages that training reads, where there are any
    language: Text = "en"
    # Under which names records have their parts; of several that are there the first counts.
    id_keys: SomeKeys = Field(default=["_id", "id", "docid", "doc_id", "document_id", "docno", "pid", "passage_id"])
    text_keys: SomeKeys = Field(
        default=["text", "contents", "content", "body", "passage", "segment", "document", "paragraph", "abstract"]
    )
    title_keys: Distinct[Text] = Field(default=["title", "heading", "headline"])
    language_keys: Distinct[Text] = Field(default=["language", "lang"])  # where there is none: corpus.language
    # Records with the same value under this key, as title or doc_id, become one passage: with the id and title of the
    # first, the texts in their order, and the test judgements of all. Those without it stay as they are. null: all do.
    join_by: Text | None = None
    max_passages: Count | None = None  # keep this many, chosen by the seed
    held_out_queries: CountOrZero = 200  # without qrels: first sentences set aside as test queries
    # Texts in nothing but capitals become small letters, which the LLM that writes, a teacher that sees case and other
    # models read far better; encoder.lower_case is for our encoder alone.
    lower_capitals: bool = True
    min_words: CountOrZero = 5  # shorter passages are set aside as trivial
    # Longer passages are trained on in windows of so many words, one every `window_step` words; they are encoded,
    # searched and evaluated as they are.
    window_words: Count = 120
    window_step: Count = 90
    bad_record_limit: CostOnly[Fraction] = 0.01  # of records, set aside as unusable before the stage fails

    @model_validator(mode="after")
    def _packages_are_named_and_windows_fit(self) -> Self:
        if self.path == PACKAGES_CORPUS and not self.packages:
            raise SettingsError(f"corpus.path={PACKAGES_CORPUS} needs names in corpus.packages, for example [numpy]")
        if self.general == PACKAGES_CORPUS and not self.general_packages:
            raise SettingsError(
                f"corpus.general={PACKAGES_CORPUS} needs names in corpus.general_packages, for example [numpy]"
            )
        if self.path == PACKAGES_CORPUS and self.join_by:
            raise SettingsError(
                f"corpus.join_by={self.join_by} is for records, which corpus.path={PACKAGES_CORPUS} has none of; "
                "set it to null"
            )
        check_windows("corpus", self.window_words, self.window_step)
        return self


@dataclass(config=CONFIG, kw_only=True)
class EncoderSettings:
    """The encoder contract (the same in training, encoding and export)."""

    query_prefix: FreeText = "Query: "
    passage_prefix: FreeText = ""
    max_query_tokens: TextTokens = 64
    max_passage_tokens: TextTokens = 256
    # Texts and prefixes become small letters in the tokenizer that is saved and exported, so that serving agrees;
    # false: the tokenizer does with capitals what it did in the LLM.
    lower_case: bool = True
    # Matryoshka; the largest is the vectors' size, without regression the hidden size
    dims: Annotated[Distinct[Size], Field(min_length=1)] = Field(default=[768, 512, 256])


@dataclass(config=CONFIG, kw_only=True)
class PruneSettings:
    """The shape to prune the LLM to, and how to heal it; null keeps the LLM's, but see parameters and kv_heads."""

    # At most so many weights beside the token embeddings: those of layers, hidden, heads and mlp that are null then
    # shrink in the LLM's proportions, as little as that allows. null: no limit.
    parameters: Annotated[int, Field(ge=1, lt=2**40)] | None = None
    layers: Size | None = 12
    hidden: Size | None = 768
    heads: Size | None = 12
    mlp: Size | None = 3072
    kv_heads: Size | None = None  # key-value heads, of which each serves equally many; null: each head has its own
    # Which hidden dimensions are kept: importance, the LLM's own; rotation, its residual stream's principal components.
    hidden_choice: Literal["importance", "rotation"] = "importance"
    # Which layers are kept. influence: those that change their input most; residual: those after which a linear map
    # from a training text's mean state, of calibration_tokens, to the teacher's vector of it leaves less than before
    layer_choice: Literal["even", "first", "influence", "residual"] = "even"
    # Which tokens are kept: reachable, all that can come where the encoder folds capitals; used, those of them that the
    # corpus and general text have; whole, the LLM's. What is not kept comes in smaller pieces.
    vocabulary: Literal["whole", "reachable", "used"] = "reachable"
    # Steps in which masks learn what stays, in place of importance and layer_choice (of the LLM's own hidden dimensions
    # or of principal components, as hidden_choice says), while the weights are trained: on the same texts, with as many
    # tokens a step and at the same rate as in healing. 0: none.
    mask_steps: CountOrZero = 0
    mask_learning_rate: LearningRate = 1.0  # the peak, of the masks; the rate rises and falls as in healing
    calibration_passages: Count = 1000
    calibration_tokens: TextTokens = 128  # per passage
    # Where the corpus has several languages, healing and masks read more of those whose loss is still farther above the
    # LLM's own.
    heal_steps: CountOrZero = 0
    heal_tokens: Count = 4096  # per step
    heal_learning_rate: LearningRate = 5e-4
    heal_kl_weight: Fraction = 0.5  # the rest is the language-model loss
    heal_scored_share: SomeFraction = 1.0  # share of a step's tokens, drawn at random, whose prediction counts

    @model_validator(mode="after")
    def _the_budget_decides_something(self) -> Self:
        if self.parameters is not None and None not in (self.layers, self.hidden, self.heads, self.mlp):
            raise SettingsError(
                f"prune.parameters={self.parameters}: nothing is left for it to decide; set those of prune.layers, "
                "hidden, heads and mlp to null that it is to choose, or it to null"
            )
        return self

    @model_validator(mode="after")
    def _masks_choose_by_themselves(self) -> Self:
        for key, plain in (("layer_choice", "even"), ("kv_heads", None)):
            if self.mask_steps and getattr(self, key) != plain:
                raise SettingsError(
                    f"prune.{key}={getattr(self, key)} with prune.mask_steps={self.mask_steps}: masks choose by "
                    f"themselves, and each head has its own keys; set it to {plain or 'null'}, or mask_steps to 0"
                )
        return self


@dataclass(config=CONFIG, kw_only=True)
class TrainSettings:
    """The single training stage."""

    start: Name | None = None  # a Llama-type encoder or LLM to train as it is; null: the pruned LLM
    # Training ends after so many steps, or after so many minutes: one of the two is null. Both null: 1000 steps.
    steps: Count | None = None
    # Minutes count from the first step on, with checkpoints, not while training is stopped; the learning rate follows.
    minutes: Annotated[float, Field(gt=0, lt=2**31)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 256  # queries, over all ranks
    hard_negatives: Amount = 1.0  # per query; 0.25 gives every fourth query, drawn at random, one
    # Of sources of examples (crop, synthetic, rerank, triplet, labelled, logged), by which each query of a batch is
    # drawn; what is not named is not drawn. Empty: every example comes equally often.
    source_weights: SourceWeights = Field(default={})
    same_in_batch: Distinct[Literal["source", "language"]] = Field(default=[])  # all queries of a batch have the same
    passage_share: SomeFraction = 1.0  # of a batch's passages, which is encoded; below 1 for regression alone
    # The objective is a sum of terms: InfoNCE, the distance from the targets' vectors (training then begins from token
    # vectors in closed form), and the divergence from the mix of the teacher's scores and BM25's.
    info_nce_weight: Amount = 1.0
    regression_weight: Amount = 0.0
    soft_target_weight: Amount = 0.0
    soft_target_temperature: Temperature = 0.05  # of the student's scores
    teacher_temperature: Temperature = 1.0  # of the mix, in standard deviations of a query's scores
    superwords: CountOrZero = 0  # at most so many tokens of frequent words and phrases are added before regression
    learning_rate: LearningRate = 3e-4
    embedding_rate: Annotated[float, Field(gt=0, le=1000)] = 1.0  # the token embeddings': a multiple of it
    warmup_share: Fraction = 0.1
    weight_decay: Amount = 0.01
    # Of the weights that are saved: so much is what training began from, and the rest what it came to. Where it began
    # from random weights alone, these have no share.
    start_share: Fraction = 0.0
    gradient_clipping: Amount = 1.0
    temperature: Temperature = 0.02
    dim_weights: list[Amount] = Field(default=[])  # one per dim; empty: equal
    dtype: Dtype = "auto"
    # 0: every rank holds all; 1: optimiser, 2: gradients too, 3: weights too are split over ranks
    zero_stage: CostOnly[Annotated[int, Field(ge=0, le=3)]] = 1
    # float32 weights and moments in the machine's memory: less on the GPU, slower
    offload_optimizer: CostOnly[bool] = False
    # what is gathered over ranks for the loss; auto: what moves fewer bytes
    loss_partition: CostOnly[Literal["auto", "passages", "queries"]] = "auto"
    chunk_tokens: CostOnly[Count] = 8192  # token budget of a micro-batch
    # Memory for graphs that are kept for the backward pass, in GiB for each rank; what does not fit is encoded
    # twice. "auto" measures: half of what is free.
    activation_budget: CostOnly[GibOrAuto] = "auto"
    # keep only the inputs of layers, and compute each twice: for long passages
    checkpoint_layers: CostOnly[bool] = False
    tensorboard: CostOnly[bool] = True  # event files in train/tensorboard
    checkpoint_every: CostOnly[Count] = 50
    keep_checkpoints: CostOnly[Count] = 2

    @model_validator(mode="after")
    def _one_of_two_says_when_training_ends(self) -> Self:
        if self.steps is not None and self.minutes is not None:
            raise SettingsError(
                f"train.minutes={self.minutes:g} and train.steps={self.steps}: only one can say when training ends; "
                "set the other to null"
            )
        if self.minutes is None:
            self.steps = self.steps or _STEPS
        return self

    @model_validator(mode="after")
    def _values_fit_each_other(self) -> Self:
        if round(self.batch_size * (1 + self.hard_negatives)) < 2:
            raise SettingsError(
                f"train.batch_size={self.batch_size} with train.hard_negatives={self.hard_negatives}: a batch needs "
                "two passages to tell apart"
            )
        if not (self.info_nce_weight or self.regression_weight or self.soft_target_weight):
            raise SettingsError(
                "train.info_nce_weight=0, train.regression_weight=0, train.soft_target_weight=0: nothing to learn from"
            )
        if self.passage_share < 1 and (self.info_nce_weight or self.soft_target_weight):
            raise SettingsError(
                f"train.passage_share={self.passage_share:g}: InfoNCE and soft targets compare queries with all "
                "passages of a batch; set train.info_nce_weight and train.soft_target_weight to 0, or the share to 1"
            )
        if self.superwords and not self.regression_weight:
            raise SettingsError(
                f"train.superwords={self.superwords} with train.regression_weight=0: only the token vectors that "
                "regression begins from have superwords; set one to 0, or the other to more"
            )
        if self.dim_weights and not sum(self.dim_weights):
            raise SettingsError(f"train.dim_weights={self.dim_weights}: one must be more than 0")
        if self.learning_rate * max(1.0, self.embedding_rate) * self.weight_decay >= 1:
            raise SettingsError(
                f"train.weight_decay={self.weight_decay} with train.learning_rate={self.learning_rate} and train."
                f"embedding_rate={self.embedding_rate:g}: their product must be less than 1, or a step takes all away"
            )
        if self.zero_stage == 0 and self.dtype != "float32":
            raise SettingsError(
                "train.zero_stage=0 takes train.dtype=float32 only: in bfloat16 DeepSpeed keeps master weights only "
                "where it splits them; train.zero_stage=1 gives the same results in less memory"
            )
        if self.zero_stage == 0 and self.offload_optimizer:
            raise SettingsError(
                "train.offload_optimizer=true needs train.zero_stage=1, 2 or 3: there is nothing split to move"
            )
        return self


@dataclass(config=CONFIG, kw_only=True)
class EncodeSettings:
    """Encoding the corpus into shards."""

    shard_passages: Count = 1024
    batch_tokens: CostOnly[Count | None] = None  # null: what suits the device
    dtype: Dtype = "auto"
    # Of the run's own encoders and their export, at most the model's positions; null: as in training.
    max_passage_tokens: TextTokens | None = None
    index: Text = EXACT  # exact search shard by shard; or a faiss factory string, as HNSW32 or IVF4096,PQ64np
    index_search: FreeText = ""  # how faiss searches that index, for example nprobe=16; empty: as faiss does by itself


@dataclass(config=CONFIG, kw_only=True)
class EvaluateSettings:
    """Which systems are compared, on what."""

    # Also asymmetric, ridge, random-init, llm-unpruned, mixes such as drama+bm25, and model:NAME: a Llama-type encoder.
    systems: Annotated[Distinct[System], Field(min_length=1)] = Field(default=["drama", "teacher", "bm25"])
    # BEIR folders, ..., or names as in corpus.path, that every system is evaluated on beside the run's own collection
    collections: Distinct[CollectionName] = Field(default=[])
    # beir, miracl or mldr, which are the paper's 13, 18 and 13 collections; passkey or needle, which are made, of six
    # lengths each; a folder of BEIR folders, ...; or names as in corpus.path with commas between: further collections,
    # with a table of their averages
    suite: SuiteName | None = None
    suite_path: Name = "suites"  # where those of beir, miracl and mldr are, or are fetched to: SUITE_PATH/beir/scifact
    depth: Rank = 100
    # Of passages' vectors, made from the float32 that is encoded: int8 takes a quarter of the memory, binary (signs) a
    # 32nd. Every system with vectors is ranked in each, at every dim; mixes in float32 alone.
    precisions: Annotated[Distinct[Precision], Field(min_length=1)] = Field(default=["float32"])
    rescore_multiplier: Count = 4  # of binary: so many times evaluate.depth are found by bits, and scored by the query
    mix_weight: Fraction = 0.5  # of the first system of a mix; the second has the rest

    @property
    def labels(self) -> dict[str, str]:
        """What each system is called in folders and tables, and the system: model:NAME by the last part of its name."""
        return labels_of(self.systems, SYSTEMS)

    @property
    def encoded_labels(self) -> dict[str, str]:
        """The same of those whose encodings are read: a mix reads those of its two systems."""
        parts = [
            pair for label, name in self.labels.items() for pair in [(p, p) for p in mixed(name)] or [(label, name)]
        ]
        return dict(parts)

    @property
    def collection_labels(self) -> dict[str, str]:
        """What each collection is called in folders and tables, and its path; those of the suite come last.

        Raises SettingsError as `paths_of` does.
        """
        return labels_of(list(dict.fromkeys([*self.collections, *self._suite_paths])), OWN_COLLECTIONS)

    @property
    def suite_labels(self) -> list[str]:
        """What the collections of the suite are called; raises SettingsError as `paths_of` does."""
        paths = self._suite_paths
        return [label for label, path in self.collection_labels.items() if path in paths]

    @property
    def _suite_paths(self) -> list[str]:
        """As evaluate.collections has them, where it names the same folders."""
        named = {Path(path).absolute(): path for path in self.collections}
        paths = paths_of(self.suite, self.suite_path) if self.suite else []
        return [named.get(Path(path).absolute(), path) for path in paths]


@dataclass(config=CONFIG, kw_only=True)
class ExportSettings:
    """The exported folder."""

    dtype: Literal["bfloat16", "float32"] = "float32"


@dataclass(config=CONFIG, kw_only=True)
class SlurmSettings:
    """What `drama submit` asks slurm for."""

    partition: Text | None = None
    account: Text | None = None
    minutes: Count = 1440  # time limit
    # how long before the time limit a job saves, ends and waits for its next turn; slurm keeps it in 16 bits
    warning_seconds: Annotated[int, Field(ge=1, le=65535)] = 300
    nodes: Count = 1  # for training and masks; other jobs, and each task of an array, take one
    tasks_per_node: Count = 1  # ranks: one for each GPU
    gpus_per_node: Count | None = None
    cpus_per_task: Count | None = None
    array: Count = 8  # tasks that share encoding, and the LLM's writing
    options: list[Text] = Field(default=[])  # of sbatch, for example [--mem=0, --constraint=a100]
    setup: list[FreeText] = Field(default=[])  # shell lines that come first, for example [module load cuda]

    @model_validator(mode="after")
    def _the_warning_comes_in_time(self) -> Self:
        if self.warning_seconds + 60 >= 60 * self.minutes:  # slurm may be a minute early
            raise SettingsError(
                f"slurm.warning_seconds={self.warning_seconds}: must be over a minute less than the time limit, "
                f"slurm.minutes={self.minutes}"
            )
        return self


@dataclass(config=CONFIG, kw_only=True)
class Settings:
    """A whole run."""

    run: Name = "runs/default"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    llm: Name  # GGUF file, local folder, hub name, or package:IMPORT_NAME/FILE
    trust_remote_code: bool = False
    corpus: CorpusSettings
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    encode: EncodeSettings = field(default_factory=EncodeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)

    @property
    def writer(self) -> str:
        """The LLM that writes: augment.writer, or else the one that is pruned."""
        return self.augment.writer or self.llm

    @property
    def vector_size(self) -> int | None:
        """Components of the trained encoder's vectors; None where only a model tells."""
        if self.train.regression_weight:
            return max(self.encoder.dims)
        return self.prune.hidden if self.train.start is None else None

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Self:
        dims, weights = self.encoder.dims, self.train.dim_weights
        if weights and len(weights) != len(dims):
            raise SettingsError(f"train.dim_weights={weights}: must be one weight for each of encoder.dims={dims}")
        if self.vector_size is not None and max(dims) > self.vector_size:
            raise SettingsError(
                f"encoder.dims={dims}: {max(dims)} components are more than prune.hidden={self.prune.hidden} has"
            )
        odd = [dim for dim in dims if dim % 8]
        if odd and "binary" in self.evaluate.precisions:
            raise SettingsError(
                f"encoder.dims={dims} with evaluate.precisions={self.evaluate.precisions}: binary vectors are whole "
                f"bytes, and {odd[0]} is not a multiple of 8"
            )
        if self.train.hard_negatives > self.augment.negatives:
            raise SettingsError(
                f"train.hard_negatives={self.train.hard_negatives} is more than "
                f"augment.negatives={self.augment.negatives}"
            )
        return self


def read_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML settings file, apply `section.key=value` overrides, check every value.

    The value of a text setting is everything after the first `=`, as it is; other values are read as YAML.
    Raises SettingsError naming the file and line (or the override), the key, the value and
    what is allowed; FileNotFoundError where there is no such file.
    """
    return read_yaml(Settings, Path(path), overrides)


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML; `read_settings` reads them back."""
    write_yaml(as_dict(settings), path)


def as_dict(section: Any) -> dict[str, Any]:
    """A section (or the whole) as plain YAML types."""
    return dataclasses.asdict(section)

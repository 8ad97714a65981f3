"""The encode stage, RUN/encode/COLLECTION/SYSTEM, and the index stage over its vectors, RUN/index/COLLECTION/SYSTEM.

What encoding writes is the system's affair (systems.py): embedding shards, or a lexical index. The teacher's encoding
of the corpus copies the vectors of passages that are training texts. An index is built where encode.index asks for one;
without it search is exact, over the shards.
"""

from __future__ import annotations

from typing import Any

from drama_dist.corpus.collection import open_collection
from drama_dist.distributed import ranks
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS, encodings_to_copy, stored_collection
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.search.dense import build_index, check_factory, recall_against_exact
from drama_dist.search.shards import EmbeddingShards, StoredVectors
from drama_dist.search.systems import DenseSystem, system_called
from drama_dist.settings import Settings

_QUERIES = 1000  # of which recall is measured


def sections(settings: Settings, collection: str, system: str) -> dict[str, Any]:
    """The settings that the encoding depends on."""
    return system_called(system, settings).sections(settings)


def inputs(run: Run, collection: str, system: str) -> dict[str, str]:
    """The fingerprints of models from elsewhere."""
    names = system_called(system, run.settings).models(run.settings)
    keys = ["model", *(f"model {number}" for number in range(2, len(names) + 1))]
    return {key: run.once(model_fingerprint, name) for key, name in zip(keys, names, strict=False)}


def check(settings: Settings, collection: str, system: str) -> None:
    """Raise SettingsError if the system's model cannot be used."""
    system_called(system, settings).check(settings)


def encode(run: Run, folder: StageFolder, collection: str, system: str) -> None:
    """Do the stage, or a share of it."""
    texts = open_collection(run.path(stored_collection(collection)))
    system_called(system, run.settings).encode(run.settings, folder, texts, _stored(run, collection, system))


def _stored(run: Run, collection: str, system: str) -> StoredVectors | None:
    """The system's vectors of the training texts, where they are of use for this collection."""
    encodings = encodings_to_copy(run.settings, collection, system)
    if not encodings:
        return None
    (encoding,) = encodings
    return StoredVectors(open_collection(run.path(TRAINING_TEXTS)).passages, EmbeddingShards(run.path(encoding)))


def index_sections(settings: Settings, collection: str, system: str) -> dict[str, Any]:
    """The settings that the index depends on; raises ValueError, before anything is made, where faiss refuses them."""
    factory, search = settings.encode.index, settings.encode.index_search
    if settings.vector_size is not None:
        check_factory(factory, settings.vector_size, search)
    return {"encode.index": factory, "encode.index_search": search}


def index(run: Run, folder: StageFolder, collection: str, system: str) -> None:
    """Do the index stage; its recall against exact search is printed, and recorded in provenance.json."""
    facts = _build(run, folder, collection, system) if ranks.rank() == 0 else {}
    folder.finish(**facts)


def _build(run: Run, folder: StageFolder, collection: str, system: str) -> dict[str, Any]:
    settings, dense = run.settings, system_called(system, run.settings)
    assert isinstance(dense, DenseSystem)  # the table asks for no other
    shards = EmbeddingShards(run.path(f"encode/{collection}/{system}"))
    built = build_index(shards, settings.encode.index, folder.folder, settings.encode.index_search)
    texts = [query.text for query in open_collection(run.path(stored_collection(collection))).queries[:_QUERIES]]
    queries_QK = dense.load(settings).encode_queries(texts) if texts else shards.sample(_QUERIES, settings.seed)
    recall = recall_against_exact(built, shards, queries_QK)
    size = sum(path.stat().st_size for path in folder.folder.glob("index.*"))
    asked = f"{len(queries_QK)} {'test queries' if texts else 'passages as queries'}"
    shown = ", ".join(f"Recall@{k} {share:.3f}" for k, share in recall.items())
    say(f"{folder.name}: {shown} against exact search, {asked}; {size / 1e6:,.1f} MB")
    return {"recall": {str(k): share for k, share in recall.items()}, "recall_queries": asked, "bytes": size}

"""Our collections as retrieval tasks of the package mteb, and exported folders as its models.

Covers any folder that corpus.path may name with judgements, and the stored collections of a run. mteb then encodes,
searches and measures by itself: a check of `drama evaluate` by another program. Needs the extra mteb. Does not cover
mteb's own tasks, whose texts come from the hub.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from datasets import Dataset

try:
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs the package mteb: pip install 'drama-dist[mteb]'") from error

from drama_dist.corpus.collection import Collection, PassageTable
from drama_dist.corpus.layout import find_sources
from drama_dist.corpus.read import SetAside
from drama_dist.corpus.stage import how_to_read, read_collection
from drama_dist.run.folder import fingerprint, fingerprint_of_files
from drama_dist.settings import CorpusSettings
from drama_dist.suites import member_of

_SUBSET, _SPLIT = "default", "test"
_LANGUAGES = ["mul-Zyyy"]  # mteb's codes of several languages and scripts; only its tables of results read them
_SHOWN = 8  # digits of a fingerprint


class CollectionTask(AbsTaskRetrieval):
    """A collection as a retrieval task of mteb: one subset, `default`, with one split, `test`.

    Each collection has a subclass: mteb keeps metadata in the class, and deletes that of an instance. Grades below 0
    count as 0, as in our measures.
    """

    collection: Collection
    data_loaded: bool = False

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Put the collection where mteb looks for it."""
        if self.data_loaded:
            return
        queries = [{"id": query.id, "text": query.text} for query in self.collection.queries]
        judged = self.collection.qrels
        split = {
            "corpus": self.collection.passages.rows.select_columns(["id", "title", "text"]),
            "queries": Dataset.from_list(queries),
            "relevant_docs": {
                query: {passage: max(0, grade) for passage, grade in grades.items()} for query, grades in judged.items()
            },
            "top_ranked": None,
        }
        self.dataset = {_SUBSET: {_SPLIT: split}}
        self.data_loaded = True


def task_of_collection(collection: Collection, name: str, source: Path, revision: str) -> CollectionTask:
    """A task of a collection. source, revision: where it comes from, and what tells its contents from others."""
    metadata = TaskMetadata(
        name=name,
        description=f"The collection in {source}",
        type="Retrieval",
        category="t2t",
        dataset={"path": str(source), "revision": revision},
        eval_splits=[_SPLIT],
        eval_langs=_LANGUAGES,
        main_score="ndcg_at_10",
    )
    own = {"metadata": metadata, "collection": collection, "__doc__": CollectionTask.__doc__}
    task: CollectionTask = type("CollectionTask", (CollectionTask,), own)()
    return task


def task_of_folder(folder: Path | str, corpus: CorpusSettings | None = None) -> CollectionTask:
    """A task of a folder with passages, queries and judgements: a BEIR folder, or what else corpus.path may be.

    corpus: how it is read, as in `drama evaluate`, which takes the run's settings; None: the defaults. The name is the
    folder's, with digits of a fingerprint of its files and of how they are read: mteb keeps results under the names of
    task and model. Raises ValueError and FileNotFoundError as `read_collection` does, and ValueError where too many
    records are unusable.
    """
    folder = Path(folder).expanduser()
    corpus = corpus or CorpusSettings(path=str(folder))
    aside = SetAside()
    raw = read_collection(folder, corpus, aside, "folder", folder.name)
    aside.refuse_beyond(corpus.bad_record_limit, folder)
    collection = Collection(PassageTable.in_memory(raw.passages), raw.queries, raw.qrels)
    read = [fingerprint_of_files(find_sources(folder, "folder").files), how_to_read(corpus)]
    revision = sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
    name, member = folder.resolve().name, member_of(folder)
    task = task_of_collection(collection, f"{name}-{revision[:_SHOWN]}", folder, revision)
    task.ignore_identical_ids = member is not None and member.own_left_out
    return task


def model_of_folder(folder: Path | str, dim: int | None = None) -> SentenceTransformerEncoderWrapper:
    """An exported folder as mteb's model, by sentence-transformers and without remote code.

    dim: its vectors are cut to so many components; None: to none. Its revision is the fingerprint of its files, so that
    mteb keeps the results of two exports apart. Raises FileNotFoundError where there is no such folder.
    """
    folder = Path(folder).expanduser().resolve()
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"{folder}: no exported model; make one: drama export SETTINGS")
    safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    model = SentenceTransformerEncoderWrapper(str(folder), embed_dim=dim, **safe)
    name = "-".join([folder.parent.name, folder.name, *([] if dim is None else [str(dim)])])
    named = {"name": f"drama/{name}", "revision": fingerprint(folder)}
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update=named)
    return model

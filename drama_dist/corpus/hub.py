"""Data sets on the Hugging Face hub as collections: which of their tables have passages, queries and judgements.

Two forms are known: BEIR's, where subsets are called corpus and queries, and judgements are in the subset default or
qrels, or in a repository NAME-qrels; and any other table, which is passages alone. The subsets of several languages
have the language in front, as in mteb's ar-corpus. Rows stream from the hub; no code of a data set runs. Does not
cover writing them (beir_folder.py), nor what their columns mean (read.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from typing import Any

from drama_dist.corpus.beir_folder import NoSuchCollection, Table, Tables
from drama_dist.labels import HUB, HubName, hub_name
from drama_dist.suites import DATASETS_PAGE

_ON_THE_HUB = "hf://datasets/"  # else a folder OWNER/NAME where the command is started would be read instead
_TIMEOUT = 10  # seconds, to ask the hub
_TESTS = ("test", "dev", "validation")  # splits of judgements, of which the first that is there is taken
_SHOWN = 10


def page_of(collection: str) -> str:
    """Where to look at a data set."""
    return f"{DATASETS_PAGE}{hub_name(collection).repository}"


def tables_of(collection: str) -> Tables:
    """The tables of huggingface:OWNER/NAME...; asks the hub which there are, and reads none.

    Raises NoSuchCollection, and whatever the libraries raise where the hub cannot be reached or the files not be read.
    """
    name = hub_name(collection)
    sha = _commit_of(name)
    subsets = _subsets(name.repository, sha)
    subset, split = _parts(name, subsets)
    before = "" if subset in (None, "default") else f"{subset}-"
    queries = next((each for each in (f"{before}queries", f"{before}query") if each in subsets), None)
    origin = f"{page_of(collection)}, commit {sha}"
    if f"{before}corpus" not in subsets or queries is None:
        plain = subset or _only(name, "subset", subsets, ["default"])
        chosen = split or _only(name, f"split of {plain}", _splits(name.repository, sha, plain), ["train"])
        return Tables(_table(name, sha, plain, chosen), None, None, f"{origin}, subset {plain}, split {chosen}")
    judged = _judgements(name, sha, subset, subsets)
    if judged is None:
        corpus = f"{before}corpus"
        passages = _table(name, sha, corpus, split) if split else _of_split(name, sha, corpus, None, "corpus")
        return Tables(passages, None, None, f"{origin}; without judgements")
    repository, its_sha, of_judgements = judged
    splits = _splits(repository.repository, its_sha, of_judgements)
    chosen = split or _only(repository, f"split of {of_judgements}", splits, _TESTS)
    return Tables(
        _of_split(name, sha, f"{before}corpus", chosen, "corpus"),
        _of_split(name, sha, queries, chosen, "queries"),
        _table(repository, its_sha, of_judgements, chosen),
        f"{origin}; judgements: {repository.repository}, commit {its_sha}, subset {of_judgements}, split {chosen}",
    )


@cache
def commit(repository: str, revision: str | None = None) -> str:
    """That a data set is at now, or a revision of it; raises what the library raises, soon where there is no hub."""
    from huggingface_hub import dataset_info

    return str(dataset_info(repository, revision=revision, timeout=_TIMEOUT).sha)


@cache
def _subsets(repository: str, sha: str) -> list[str]:
    from datasets import get_dataset_config_names

    try:
        return list(get_dataset_config_names(f"{_ON_THE_HUB}{repository}", revision=sha))
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise NoSuchCollection(
            f"{repository} is read by a script of its own, and none is run; name a copy that has files"
        ) from None


@cache
def _builder(repository: str, sha: str, subset: str) -> Any:
    return _new_builder(repository, sha, subset)


def _new_builder(repository: str, sha: str, subset: str, **reading: Any) -> Any:
    """reading: how its files are read, in place of what the data set says."""
    from datasets import load_dataset_builder

    return load_dataset_builder(f"{_ON_THE_HUB}{repository}", subset, revision=sha, **reading)


def _splits(repository: str, sha: str, subset: str) -> list[str]:
    builder = _builder(repository, sha, subset)
    return list(map(str, builder.info.splits or builder.config.data_files or []))


def _commit_of(name: HubName) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return commit(name.repository, name.revision)
    except RevisionNotFoundError:
        raise NoSuchCollection(f"has no revision {name.revision}") from None
    except RepositoryNotFoundError:
        raise NoSuchCollection(
            "the hub has no such data set, or shows it to others only (then: hf auth login)"
        ) from None


def _parts(name: HubName, subsets: Sequence[str]) -> tuple[str | None, str | None]:
    """The subset and the split that a name asks for: one part is a subset where there is one of that name."""
    if not name.parts:
        return None, None
    first, *rest = name.parts
    if first in subsets or f"{first}-corpus" in subsets or (first == "default" and "corpus" in subsets):
        return first, rest[0] if rest else None
    if rest:
        raise NoSuchCollection(f"has no subset {first}; it has {_shown(subsets)}")
    return None, first


def _only(name: HubName, what: str, found: Sequence[str], preferred: Sequence[str]) -> str:
    """The first of the preferred that is there, or the only one."""
    if chosen := next((each for each in preferred if each in found), found[0] if len(found) == 1 else None):
        return chosen
    example = "/".join([name.repository, *name.parts[:1], *found[:1]])
    raise NoSuchCollection(f"name one {what}, as {HUB}{example}; there are {_shown(found)}")


def _of_split(name: HubName, sha: str, subset: str, split: str | None, usual: str) -> Table:
    """Passages or queries: those of the split where they are told apart, which they seldom are."""
    found = _splits(name.repository, sha, subset)
    return _table(name, sha, subset, _only(name, f"split of {subset}", found, [*filter(None, [split]), usual, "train"]))


def _judgements(name: HubName, sha: str, subset: str | None, subsets: Sequence[str]) -> tuple[HubName, str, str] | None:
    """Repository, commit and subset of the judgements; None where there are none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    several = subset not in (None, "default")
    inside = [f"{subset}-qrels"] if several else ["default", "qrels"]
    if found := next((each for each in inside if each in subsets), None):
        return name, sha, found
    beside = HubName(f"{name.repository}-qrels", name.revision, ())
    try:
        its_sha = commit(beside.repository, name.revision)
    except RevisionNotFoundError:
        its_sha = commit(beside.repository)
    except RepositoryNotFoundError:
        return None
    preferred = [subset] if several and subset else ["default"]
    return beside, its_sha, _only(beside, "subset", _subsets(beside.repository, its_sha), preferred)


def _table(name: HubName, sha: str, subset: str, split: str) -> Table:
    """Raises NoSuchCollection where the subset has no such split."""
    found = _splits(name.repository, sha, subset)
    if split not in found:
        raise NoSuchCollection(f"{name.repository} has no split {split} of {subset}; it has {_shown(found)}")
    counts = _builder(name.repository, sha, subset).info.splits or {}
    count = counts[split].num_examples if split in counts else None
    return Table(_rows(name.repository, sha, subset, split), count or None)


def _rows(repository: str, sha: str, subset: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import Features, Value
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.parquet.parquet import Parquet
    from pyarrow.dataset import ParquetFragmentScanOptions

    builder = _builder(repository, sha, subset)
    if isinstance(builder, Parquet):  # otherwise all that was read of a file stays in memory
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
    stream = builder.as_streaming_dataset(split=split)
    if isinstance(builder, Csv) and (first := next(iter(stream), None)):
        # ids as 007 and texts as NA are to stay as they are written
        as_text = {"features": Features(dict.fromkeys(first, Value("string"))), "keep_default_na": False}
        builder = _new_builder(repository, sha, subset, **as_text)
        stream = builder.as_streaming_dataset(split=split)
    for row in stream:
        yield {column: _written(value) for column, value in row.items() if _is_kept(value)}


def _written(value: Any) -> Any:
    """Dates as text, which JSON's become where a whole column looks like them."""
    return value.isoformat().removesuffix("T00:00:00") if isinstance(value, date) else value


def _is_kept(value: Any) -> bool:
    """Text, numbers, dates, and lists of texts; not vectors, pictures or further tables."""
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, str | int | float | date)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

"""Which files of a path are a corpus: its passages, its queries and its judgements.

Looks at names only, and does not open data files: formats.py does. Whatever else lies in the folder has no influence.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drama_dist.corpus.formats import SUFFIXES, suffix_of

_PASSAGES = ("corpus", "collection", "passages", "documents")  # names that say so
_JUDGEMENT_SUFFIXES = (*SUFFIXES, ".txt", ".trec", ".qrels", ".qrel", "")
_SPLIT_WORDS = {"train", "dev", "test", "eval"}
_ALSO_DEV = {"valid", "validation", "val"}
_DATASET, _SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
_FORMS = "JSON Lines, JSON, TSV, CSV or parquet"


@dataclass(frozen=True)
class Sources:
    """The files of a corpus.

    passages: one file, or several that are read one after the other; none where `dataset` is a datasets.Dataset on
    disk, which has dataset_files. queries: None where there are no judgements. notes: what there is and is not read.
    """

    passages: list[Path] = field(default_factory=list)
    dataset: Path | None = None
    dataset_files: list[Path] = field(default_factory=list)
    queries: Path | None = None
    judgements: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """All that is read."""
        tests = [self.queries, self.judgements]
        return [*self.passages, *self.dataset_files, *(path for path in tests if path)]


def find_sources(path: Path, setting: str) -> Sources:
    """Find a corpus. Raises ValueError if there is none or it is not clear which, FileNotFoundError without queries."""
    if path.is_file():
        beside = _judgements(path.parent) if os.access(path.parent, os.R_OK) else []
        notes = [f"is one file, so {beside[0]} is not read; name the folder to read both"] if beside else []
        return Sources(passages=[path], notes=notes)
    if not path.is_dir():
        raise ValueError(f"{setting}={path}: neither a file nor a folder")
    notes = []
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    data = [file for file in files if suffix_of(file) in SUFFIXES]
    all_queries, all_judgements = _queries(data), _judgements(path)
    queries, judgements = _tests(path, all_queries, all_judgements, notes)
    candidates = [file for file in data if file not in (*all_queries, *all_judgements)]
    dataset = None if _named(candidates, "corpus") else _dataset(path, notes)
    if not dataset:
        return Sources(_passages(path, candidates, setting, notes), None, [], queries, judgements, notes)
    dataset_files = _dataset_files(path, dataset)
    if others := [file for file in candidates if file not in dataset_files]:
        notes.append(f"is a dataset, so {_shown(others)} {'is' if len(others) == 1 else 'are'} not read")
    return Sources([], dataset, dataset_files, queries, judgements, notes)


def _tests(
    folder: Path, queries: list[Path], judgements: list[Path], notes: list[str]
) -> tuple[Path | None, Path | None]:
    """The first judgements that there are queries for, and these queries; both or none."""
    named_so = [file for file in folder.iterdir() if _is_called(file, "qrels?") and file.is_file()]
    if others := sorted(file for file in named_so if file not in judgements and not file.name.startswith(".")):
        known = ", ".join(filter(None, _JUDGEMENT_SUFFIXES))
        notes.append(f"judgements are not read from {_shown(others)}: expected a name that ends with one of {known}")
    if not judgements:
        if queries:
            expected = "expected qrels/test.tsv or qrels.tsv"
            notes.append(f"has {queries[0].name} but no judgements, so these queries are not used; {expected}")
        return None, None
    judged = sorted(judgements, key=lambda file: not _queries_of(file, queries))  # keeps the order otherwise
    fitting = _queries_of(judged[0], queries)
    if not fitting:
        instead = f"; {_shown(queries)} has another split in its name" if queries else ""
        raise FileNotFoundError(f"{folder / 'queries.jsonl'}: not found, but {judged[0]} judges its queries{instead}")
    _note_unread("judgements", judged[:1], judged[1:], notes)
    _note_unread("queries", fitting[:1], [file for file in queries if file != fitting[0]], notes)
    return fitting[0], judged[0]


def _passages(folder: Path, candidates: list[Path], setting: str, notes: list[str]) -> list[Path]:
    """The file that is called corpus, or the like; else all files, where they are of one form."""
    for name in _PASSAGES:
        if named := _named(candidates, name):
            _note_unread("passages", named[:1], [file for file in [*named, *candidates] if file != named[0]], notes)
            return named[:1]
    # settings and records of programs are JSON, so it counts only where there is nothing else
    records = [file for file in candidates if suffix_of(file) != ".json"] or candidates
    forms = {suffix_of(file) for file in records}
    if len(forms) == 1:
        _note_unread("passages", records, [file for file in candidates if file not in records], notes)
        return records
    found = sorted(entry.name for entry in folder.iterdir())
    problem = f"files of several forms, {', '.join(sorted(forms))}" if forms else f"found {found[:5]}"
    raise ValueError(
        f"{setting}={folder}: expected a BEIR folder (with corpus.jsonl), files of one form ({_FORMS}), or a "
        f"Hugging Face dataset saved on disk; {problem}"
    )


def _named(files: list[Path], name: str) -> list[Path]:
    """Files of this name and any suffix; JSON Lines come first."""
    named = [file for file in files if _bare(file) == name]
    return sorted(named, key=lambda file: (SUFFIXES.index(suffix_of(file)), file.name))


def _queries(files: list[Path]) -> list[Path]:
    """Files of queries; the one that is called queries comes first."""
    named = _named(files, "queries")
    return [*named, *(file for file in files if _is_called(file, "queries") and file not in named)]


def _judgements(folder: Path) -> list[Path]:
    """Files of judgements, those of qrels/ before those beside the corpus; `test` comes first, and TSV."""
    inside = [file for file in folder.glob("qrels/*") if _may_be_judgements(file)]
    beside = [file for file in folder.iterdir() if _is_called(file, "qrels?") and _may_be_judgements(file)]
    return [*sorted(inside, key=_preference), *sorted(beside, key=_preference)]


def _is_called(file: Path, what: str) -> bool:
    """Whether the name has this word, and it is not about a corpus with it or without it."""
    found = re.search(rf"(?<![a-z]){what}(?![a-z])", file.name.lower())
    about = re.search(rf"(?<![a-z])(with|without|no|and|of|for|from)[\W_]+{what}(?![a-z])", file.name.lower())
    return bool(found and not about)


def _may_be_judgements(file: Path) -> bool:
    hidden_or_about = file.name.startswith(".") or re.match(r"readme|licen[cs]e", file.name, re.IGNORECASE)
    return file.is_file() and not hidden_or_about and suffix_of(file) in _JUDGEMENT_SUFFIXES


def _queries_of(judgements: Path, queries: list[Path]) -> list[Path]:
    """Queries that these judgements may be of, those whose names have the same words first; none of another split."""
    words = _words(judgements)
    split = words & _SPLIT_WORDS
    fitting = [file for file in queries if not split or (_words(file) & _SPLIT_WORDS or split) == split]
    return sorted(fitting, key=lambda file: (_words(file) != words, _words(file) & _SPLIT_WORDS != split))


def _words(file: Path) -> set[str]:
    """The words of a name that say which queries or judgements it has."""
    words = set(re.split(r"[\W_]+", _bare(file))) - {"qrels", "qrel", "queries", ""}
    return words - _ALSO_DEV | {"dev"} if words & _ALSO_DEV else words


def _preference(file: Path) -> tuple[int, bool, str]:
    words = _words(file)
    rank = 0 if words == {"test"} else 1 if not words else 2
    return rank, suffix_of(file) != ".tsv", file.name


def _note_unread(what: str, read: list[Path], unread: list[Path], notes: list[str]) -> None:
    if unread:
        notes.append(f"{what} are read from {_shown(read)}, not from {_shown(list(dict.fromkeys(unread)))}")


def _shown(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")


def _bare(file: Path) -> str:
    """The name in small letters without .gz and without the suffix."""
    return Path(file.name.lower().removesuffix(".gz")).stem


def _dataset(folder: Path, notes: list[str]) -> Path | None:
    """The folder of a datasets.Dataset: this one, or of a split that it has."""
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS, "splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
            raise ValueError(f"{folder / _SPLITS}: names no splits; save the dataset again")
        split = next((name for name in ("corpus", "train") if name in splits), splits[0])
        notes.append(f"has the splits {', '.join(splits)}; reading {split}")
        return folder / split
    return folder if all((folder / name).is_file() for name in _DATASET) else None


def _dataset_files(folder: Path, dataset: Path) -> list[Path]:
    """What the datasets library reads of a dataset."""
    try:
        arrow = [dataset / part["filename"] for part in _json(dataset / _DATASET[0], "_data_files")]
    except (TypeError, KeyError):
        raise ValueError(f"{dataset / _DATASET[0]}: names no data files; save the dataset again") from None
    records = [*(dataset / name for name in _DATASET), *([folder / _SPLITS] if dataset != folder else [])]
    return [*records, *arrow]


def _json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: not what the datasets library writes; save the dataset again") from None

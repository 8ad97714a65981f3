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
    queries, judgements = _chosen(_queries(data), "queries", notes), _chosen(_judgements(path), "judgements", notes)
    if judgements and not queries:
        raise FileNotFoundError(f"{path / 'queries.jsonl'}: not found, but {judgements} judges its queries")
    if queries and not judgements:
        notes.append(
            f"has {queries.name} but no judgements, so these queries are not used; expected qrels/test.tsv or qrels.tsv"
        )
        queries = None
    tests = {*_queries(data), *_judgements(path)}
    candidates = [file for file in data if file not in tests]
    dataset = None if _named(candidates, "corpus") else _dataset(path, notes)
    if dataset:
        return Sources([], dataset, _dataset_files(path, dataset), queries, judgements, notes)
    return Sources(_passages(path, candidates, setting, notes), None, [], queries, judgements, notes)


def _passages(folder: Path, candidates: list[Path], setting: str, notes: list[str]) -> list[Path]:
    """The file that is called corpus, or the like; else all files, where they are of one form."""
    for name in _PASSAGES:
        if chosen := _chosen(_named(candidates, name), "passages", notes):
            return [chosen]
    # settings and records of programs are JSON, so it counts only where there is nothing else
    candidates = [file for file in candidates if suffix_of(file) != ".json"] or candidates
    forms = {suffix_of(file) for file in candidates}
    if len(forms) == 1:
        return candidates
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
    others = [file for file in files if re.match(r"queries[._-].", _bare(file))]
    return [*_named(files, "queries"), *others]


def _judgements(folder: Path) -> list[Path]:
    """Files of judgements, those of qrels/ before those beside the corpus; `test` comes first, and TSV."""
    inside = [file for file in folder.glob("qrels/*") if _may_be_data(file)]
    beside = [file for file in folder.iterdir() if "qrels" in file.name.lower() and _may_be_data(file)]
    return [*sorted(inside, key=_preference), *sorted(beside, key=_preference)]


def _may_be_data(file: Path) -> bool:
    hidden_or_about = file.name.startswith(".") or re.match(r"readme|licen[cs]e", file.name, re.IGNORECASE)
    return file.is_file() and not hidden_or_about and file.suffix != ".md"


def _preference(file: Path) -> tuple[int, bool, str]:
    words = set(re.split(r"[\W_]+", _bare(file))) - {"qrels"}
    rank = 0 if words == {"test"} else 1 if not words else 2
    return rank, suffix_of(file) != ".tsv", file.name


def _chosen(files: list[Path], what: str, notes: list[str]) -> Path | None:
    if len(files) > 1:
        others = ", ".join(file.name for file in files[1:6]) + (", ..." if len(files) > 6 else "")
        notes.append(f"{what} are read from {files[0].name}, not from {others}")
    return files[0] if files else None


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
    return folder if any((folder / name).is_file() for name in _DATASET) else None


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

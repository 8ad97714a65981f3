"""Fetching the collections of named suites: by mteb from the hub, into BEIR folders where they are looked for.

Does not cover which collections there are (suites.py), nor reading the folders (read.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from drama_dist.corpus import hub
from drama_dist.corpus.beir_folder import Table, Tables, write_once
from drama_dist.encoder.failures import reason
from drama_dist.run.progress import say
from drama_dist.settings import Settings, SettingsError
from drama_dist.suites import SUITES, Member, missing_collections


def check_fetchable(settings: Settings, member: Member) -> None:
    """Raise SettingsError, naming all collections of the suite that are missing, where this one cannot be fetched."""
    if problem := _hindrance(member.dataset):
        raise _missing(settings, problem)


def fetch(settings: Settings, member: Member, folder: Path) -> None:
    """Fetch a collection; the folder is there when it is whole. Raises SettingsError as `check_fetchable` does."""
    say(f"{folder}: fetching {member.dataset} by mteb's task {member.task}")
    try:
        split = _load(member)
    except Exception as error:  # which types the network library raises changes between versions
        raise _missing(settings, f"{member.dataset}: {reason(error)}") from error
    write_once(folder, _tables(split, member))


def _tables(split: Mapping[str, Any], member: Member) -> Tables:
    """Judgements in the queries' order: mteb's own changes from one process to the next, and the fingerprint would."""
    judged = {str(query): grades for query, grades in split["relevant_docs"].items()}
    ids = dict.fromkeys(str(row["id"]) for row in split["queries"])
    in_order = [*(id for id in ids if id in judged), *sorted(judged.keys() - ids.keys())]
    judgements = (
        {"query-id": query, "corpus-id": passage, "score": grade}
        for query in in_order
        for passage, grade in sorted((str(id), int(each)) for id, each in judged[query].items())
    )
    return Tables(
        Table(_rows(split["corpus"], member.language), len(split["corpus"])),
        Table(_rows(split["queries"], member.language), len(split["queries"])),
        Table(judgements, sum(map(len, judged.values()))),
        f"{member.origin} by mteb's task {member.task}",
    )


def _missing(settings: Settings, problem: str) -> SettingsError:
    suite = settings.evaluate.suite
    assert suite in SUITES  # only members of named suites are fetched
    return SettingsError(missing_collections(suite, settings.evaluate.suite_path, problem))


@cache
def _hindrance(dataset: str) -> str | None:
    """Why mteb cannot fetch a data set; None if it can."""
    if importlib.util.find_spec("mteb") is None:
        return "mteb is not installed"
    try:
        hub.commit(dataset)
    except Exception as error:  # as in `fetch`
        return f"the hub cannot be reached ({reason(error)})"
    return None


def _load(member: Member) -> Mapping[str, Any]:
    """Corpus, queries and relevant_docs of a split, as mteb has them."""
    import mteb

    task = mteb.get_task(member.task, hf_subsets=[member.subset], eval_splits=[member.split])
    task.load_data()
    task.convert_v1_dataset_format_to_v2(None)
    split: Mapping[str, Any] = task.dataset[member.subset][member.split]
    return split


def _rows(table: Iterable[Mapping[str, Any]], language: str) -> Iterable[dict[str, str]]:
    for row in table:
        yield {
            "_id": str(row["id"]),
            "title": str(row.get("title") or ""),
            "text": str(row["text"] or ""),
            "language": language,
        }

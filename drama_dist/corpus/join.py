"""Joining records into whole passages: the paragraphs of an article, the pages of a document.

Covers which records become one passage, and where judgements of them go. Which key says so, and reading it, is in
read.py. Long passages are cut for training in windows.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from drama_dist.corpus.collection import Qrels
from drama_dist.records import Passage

Part = tuple[Passage, str]  # a record, and what it is a part of; empty: it is whole


def joined(parts: Iterable[Part]) -> tuple[list[Passage], dict[str, str]]:
    """The whole passages, and for the id of each part, which no other has, that of its passage.

    Parts need not follow each other. A whole stands where its first part stood and has its id, title and language. Its
    text is the parts' in their order, as paragraphs; a part with another title than the first brings it along.
    """
    firsts: list[Passage] = []
    others: dict[str, list[Passage]] = {}  # by the id of their first
    id_of: dict[str, str] = {}  # of each whole that several may share
    whole_of: dict[str, str] = {}
    for passage, whole in parts:
        id = id_of.setdefault(whole, passage.id) if whole else passage.id
        whole_of[passage.id] = id
        if id == passage.id:
            firsts.append(passage)
        else:
            others.setdefault(id, []).append(passage)
    return [_whole(first, others[first.id]) if first.id in others else first for first in firsts], whole_of


def _whole(first: Passage, others: Iterable[Passage]) -> Passage:
    further = [other.text if other.title == first.title else other.content for other in others]
    return replace(first, text="\n\n".join(filter(None, [first.text, *further])))


def moved(qrels: Qrels, whole_of: Mapping[str, str]) -> Qrels:
    """Judgements of parts as judgements of their passages; of several the highest grade counts."""
    found: Qrels = {}
    for query, grades in qrels.items():
        best = found.setdefault(query, {})
        for part, grade in grades.items():
            best[whole_of[part]] = max(grade, best.get(whole_of[part], grade))
    return found

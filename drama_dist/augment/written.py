"""A query to train on, before passages are ranked for it: cropped, written by an LLM, or asked by people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WrittenQuery:
    """A query and the passage that it was written from, "" for none.

    source: crop, synthetic, labelled, logged or triplet. judged, irrelevant: ids of passages that are known to answer
    it, or not to.
    """

    query: str
    passage_id: str
    source: str
    language: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    judged: tuple[str, ...] = ()
    irrelevant: tuple[str, ...] = ()


def folded(text: str) -> str:
    """A query without what two equal ones may differ in: capitals and blanks."""
    return " ".join(text.casefold().split())

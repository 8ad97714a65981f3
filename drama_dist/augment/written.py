"""A written query: a crop or a synthetic query, before passages are ranked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WrittenQuery:
    """A query and the passage that it was written from. source: crop or synthetic."""

    query: str
    passage_id: str
    source: str
    language: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

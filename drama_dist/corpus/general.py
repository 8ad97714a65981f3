"""General text: passages from elsewhere that are trained on beside the corpus, and never searched.

Covers where they are stored and how many of them join the passages of the corpus. The corpus stage reads them
(stage.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Passage
from drama_dist.run.progress import say

_FOLDER = "general"  # beside the passages of the corpus


def write_general(corpus: Path, passages: Iterable[Passage], own_ids: Iterable[str]) -> None:
    """Store passages in the order in which they are to join a corpus.

    Their ids begin with "general:" from then on, or with "general::" and so on where one of the corpus's own does.
    """
    prefix, taken = "general:", [id for id in own_ids if id.startswith("general:")]
    while any(id.startswith(prefix) for id in taken):
        prefix += ":"
    PassageTable.write(corpus / _FOLDER, (replace(passage, id=f"{prefix}{passage.id}") for passage in passages))


def open_general(corpus: Path) -> PassageTable | None:
    """What `write_general` stored, in its order; None where it stored nothing."""
    folder = corpus / _FOLDER
    return PassageTable.open(folder) if folder.exists() else None


def with_general(own: Iterable[Passage], general: Iterable[Passage], share: float) -> Iterator[Passage]:
    """The passages of a corpus, and behind them the first general ones, so that these are `share` of all.

    Reads of both only what it yields. Where there is too little general text all of it joins, and a line says so.
    """
    count = taken = 0
    for passage in own:
        count += 1
        yield passage
    wanted = round(count * share / (1 - share))
    for passage in islice(general, wanted):
        taken += 1
        yield passage
    if 0 < taken < wanted:
        say(f"corpus.general gives {taken} passages of the {wanted} that corpus.general_share={share} asks for")

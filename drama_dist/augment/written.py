"""A written query, before passages are ranked for it; and work in parts that survive interruption.

A part is one file of rows, written whole. Rank r does the parts r, r + world size, ... (or its share of them, see
drama_dist/run/shares.py); parts that are there already are not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from drama_dist.distributed import ranks
from drama_dist.records import read_records, write_records
from drama_dist.run.progress import progress_bar
from drama_dist.run.shares import WHOLE, Share

Item = TypeVar("Item")


@dataclass(frozen=True)
class Written:
    """A query and the passage that it was written from."""

    query: str
    passage_id: str
    source: str
    language: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)


def in_parts(
    folder: Path,
    items: Sequence[Item],
    size: int,
    unit: str,
    work: Callable[[int, Sequence[Item]], list[Any]],
    share: Share = WHOLE,
) -> list[dict[str, Any]]:
    """Apply `work` (number of the part, its items) to `items` cut into parts; return all rows in order.

    Every rank must call it, with the same items; each gets all rows. A share that is not the whole leaves its parts in
    the folder and returns no rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{number:05d}.jsonl" for number in range(-(-len(items) // size))]
    own = share.indices_of(len(paths))
    missing = [number for number in own if not paths[number].exists()]
    sizes = {number: len(items[number * size : (number + 1) * size]) for number in own}
    total = sum(sizes.values())
    bar = progress_bar(total, f"augment: {folder.name}", unit, done=total - sum(sizes[number] for number in missing))
    for number in missing:
        write_records(paths[number], work(number, items[number * size : (number + 1) * size]))
        bar.update(sizes[number])
    bar.close()
    ranks.barrier()
    if not share.whole:
        return []
    return [row for path in paths for row in read_records(path, dict)]

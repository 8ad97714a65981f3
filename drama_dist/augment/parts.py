"""Work in parts that survives interruption.

A part is a file of rows, written atomically, with its checksum beside it; the work may write one more file for each.
Rank r does parts r, r + world size, ... (of its share, see drama_dist/run/shares.py) and skips those that are there and
undamaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from drama_dist.augment.writers.writer import Writer
from drama_dist.distributed import ranks
from drama_dist.records import read_records, write_records
from drama_dist.run.files import matches_checksum, write_checksum
from drama_dist.run.progress import TokenRate, progress_bar
from drama_dist.run.shares import WHOLE, Share

Item = TypeVar("Item")


def in_parts(
    folder: Path,
    items: Sequence[Item],
    size: int,
    unit: str,
    work: Callable[[int, Sequence[Item]], list[Any]],
    share: Share = WHOLE,
    also: Callable[[int], Path] | None = None,
    writer: Writer | None = None,
) -> list[dict[str, Any]]:
    """Apply `work` (index of the part, its items) to `items` in parts of `size`; return all rows in order.

    Every rank must call it, with the same items; each gets all rows. A share of the work leaves its parts in the folder
    and returns no rows. also: the other file that `work` writes for a part, which is done again where that is damaged.
    writer: asked by `work`; its tokens a second stand beside the bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [items[begin : begin + size] for begin in range(0, len(items), size)]
    paths = [folder / f"part-{index:05d}.jsonl" for index in range(len(parts))]
    files = [(path, also(index)) if also else (path,) for index, path in enumerate(paths)]
    checksums = {path: folder / f"{path.name}.sha256" for of_part in files for path in of_part}
    indices = share.indices_of(len(parts))
    missing = [index for index in indices if not all(matches_checksum(file, checksums[file]) for file in files[index])]
    total, left = (sum(len(parts[index]) for index in group) for group in (indices, missing))
    bar = progress_bar(total, f"augment: {folder.name}", unit, done=total - left)
    if writer is not None:
        writer.on_tokens = TokenRate(bar)
    for index in missing:
        write_records(paths[index], work(index, parts[index]))
        for file in files[index]:
            write_checksum(file, checksums[file])
        bar.update(len(parts[index]))
    if writer is not None:
        writer.on_tokens = None
    bar.close()
    ranks.barrier()
    if not share.whole:
        return []
    return [row for path in paths for row in read_records(path, dict)]

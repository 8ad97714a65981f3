"""A task's share of the work of an array job.

The tasks of an array have no process group and exchange nothing but files. Each writes its share; a plain run of the
stage afterwards collects them, does what is missing, checks the result and finishes it. Ranks within a task split its
share further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Share `index` (from 0) of `count` equal shares."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        """Parse INDEX/COUNT, for example 0/8; raises ValueError on anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f"--share {text}: expected INDEX/COUNT with INDEX from 0 to COUNT - 1, for example 0/8")
        return cls(int(match[1]), int(match[2]))

    @property
    def whole(self) -> bool:
        """Whether this is all of the work, so that the stage can be finished."""
        return self.count == 1

    def indices_of(self, total: int) -> range:
        """Indices of the items, out of `total`, that this rank of this share works on."""
        from drama_dist.distributed import (
            ranks,  # here, because it imports torch, and `drama --help` must not wait for that
        )

        return range(self.index * ranks.world_size() + ranks.rank(), total, self.count * ranks.world_size())


WHOLE = Share()

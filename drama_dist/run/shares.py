"""One share of a stage's work, done by one task of an array job.

Tasks of an array have no process group and share nothing but files: each writes its own share, and a plain run of the
stage afterwards finds them all, writes what is missing, checks and finishes. Ranks inside a task divide its share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Share `number`, from 0, of `of` equal shares."""

    number: int = 0
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        """Read NUMBER/OF, for example 0/8; raises ValueError where it is anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"--share {text}: expected NUMBER/OF with NUMBER from 0 to OF - 1, for example 0/8")
        return cls(int(found[1]), int(found[2]))

    @property
    def whole(self) -> bool:
        """Whether this is all of the work, so that it can be finished."""
        return self.of == 1

    def own(self, count: int) -> range:
        """The positions of `count` items that belong to this rank of this share."""
        from drama_dist.distributed import (
            ranks,  # here, because it imports torch, and `drama --help` must not wait for that
        )

        return range(self.number * ranks.world_size() + ranks.rank(), count, self.of * ranks.world_size())


WHOLE = Share()

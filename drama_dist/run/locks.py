"""One start of a stage at a time: locks that end with the process that holds them.

Against a second start, and against ranks that a killed launcher left running. Covers locks of whole runs of a stage
and of shares of one. On a file system without locks nothing is refused.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from drama_dist.distributed import ranks
from drama_dist.run.shares import Share

_SHARES = 1 << 30  # where the bytes of shares begin
_ALONE, _SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB


class InUse(ValueError):
    """Processes of another start are at work on a stage."""


class StageLock:
    """Held until `release`, or until this process ends; all ranks make one.

    Rank r of a whole run holds byte r of the file. Tasks with shares hold these bytes together, and each its own.
    """

    def __init__(self, path: Path, share: Share):
        """Raises InUse, naming the other start."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: TextIO = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        if share.whole:
            self._hold_all()
        else:
            self._hold(_SHARED, 0, _SHARES)
            if ranks.rank() == 0:
                self._hold(_ALONE, _SHARES + share.number, 1)
                self._sign(f"share {share.number} of {share.of}, ")

    def release(self) -> None:
        """Let others in."""
        self._file.close()

    def _hold_all(self) -> None:
        if ranks.rank() == 0:
            self._hold(_ALONE, 0, 0)  # to the end of any file
            self._hold(fcntl.LOCK_UN, 1, 0)  # for the other ranks
            self._sign("")
        ranks.barrier()
        if ranks.rank():
            self._hold(_ALONE, ranks.rank(), 1)

    def _hold(self, kind: int, begin: int, length: int) -> None:
        try:
            fcntl.lockf(self._file, kind, length, begin)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            other = self._file.read()
            raise InUse(
                f"{self._path}: another start is at work on this stage ({other}), or ranks that it left; wait until "
                "they end, or end them; where their machine is gone for good, delete the file"
            ) from None
        except OSError:  # no locks here
            return

    def _sign(self, what: str) -> None:
        self._file.truncate(0)
        self._file.write(f"{what}process {os.getpid()} of {socket.gethostname()}")
        self._file.flush()

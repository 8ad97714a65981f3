"""One process group per stage at a time: file locks that end with the process that holds them.

They refuse a second run of the same stage, and one that would collide with ranks a killed launcher left behind. Covers
locks on whole stages and on shares of one. On a file system without locks nothing is refused.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from drama_dist.distributed import ranks
from drama_dist.run.shares import Share

_SHARES = 1 << 30  # offset of the bytes that shares lock
_EXCLUSIVE, _SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB


class InUse(ValueError):
    """Another run is working on the stage."""


class StageLock:
    """Held until `release`, or until this process ends; every rank makes one.

    Rank r of a whole run locks byte r of the file exclusively. Tasks with shares lock all of those bytes in shared
    mode, and one byte per share exclusively.
    """

    def __init__(self, path: Path, share: Share):
        """Raises InUse, naming the process that holds the lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: TextIO = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        self.excludes = True  # other processes; not where the file system has no locks
        if share.whole:
            self._hold_all()
        else:
            self._hold(_SHARED, 0, _SHARES)
            if ranks.rank() == 0:
                self._hold(_EXCLUSIVE, _SHARES + share.index, 1)
                self._sign(f"share {share.index} of {share.count}, ")

    def release(self) -> None:
        """Unlock the stage."""
        self._file.close()

    def _hold_all(self) -> None:
        if ranks.rank() == 0:
            self._hold(_EXCLUSIVE, 0, 0)  # every byte
            self._hold(fcntl.LOCK_UN, 1, 0)  # for the other ranks
            self._sign("")
        ranks.barrier()
        if ranks.rank():
            self._hold(_EXCLUSIVE, ranks.rank(), 1)

    def _hold(self, kind: int, begin: int, length: int) -> None:
        try:
            fcntl.lockf(self._file, kind, length, begin)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read()
            raise InUse(
                f"{self._path}: another run is working on this stage ({holder}), or has left ranks behind; wait for it "
                "to finish, or kill it; if its machine is gone for good, delete this file"
            ) from None
        except OSError:  # this file system has no locks
            self.excludes = False

    def _sign(self, share: str) -> None:
        self._file.truncate(0)
        self._file.write(f"{share}process {os.getpid()} of {socket.gethostname()}")
        self._file.flush()

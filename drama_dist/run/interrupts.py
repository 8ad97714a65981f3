"""Signals that ask a run to save its work and stop, to be resumed later.

Covers SIGUSR1 (slurm's warning before a time limit; see launcher/slurm/job.sh) and SIGTERM. Stages that resume from
their files stop immediately; training stops after a step that all ranks agree on. Does not cover Ctrl-C, which always
stops immediately.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 85  # exit status: all work so far is kept, and the same command resumes it

_asked = 0  # the signal that arrived while deferred
_deferring = False


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop. Not an Exception, so that no library handles it as a failure."""


def listen() -> None:
    """Make SIGUSR1 and SIGTERM raise Stopped in the main thread, or only be recorded inside `deferred`."""
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Only record signals inside this context; the code checks `wanted` where it can stop.

    If the block completes in spite of a signal, Stopped is raised on exit, on all ranks: the next stage must not start.
    """
    global _asked, _deferring
    _asked, _deferring = 0, True
    try:
        yield
        asked = wanted()
    finally:
        late, _asked, _deferring = _asked, 0, False
    if asked or late:
        raise Stopped("asked to stop at the end of a stage")


def wanted() -> bool:
    """Whether a signal has reached any rank. Collective: every rank must call it, and all get the same answer."""
    from drama_dist.distributed import (
        ranks,  # here, because it imports torch, and `drama --help` must not wait for that
    )

    return any(ranks.on_every_rank(_asked))


def _handle(signum: int, frame: FrameType | None) -> None:
    global _asked
    if not _deferring:
        raise Stopped(signal.Signals(signum).name)
    _asked = signum

"""Signals that ask a run to stop: save, end, and be started again.

Covers SIGUSR1 (slurm's warning before a time limit; see launcher/slurm/job.sh) and SIGTERM. Stages that go on from
the files they left end where they are; training ends after a step that all ranks agree on. Ctrl-C is not covered:
it ends a run at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 85  # exit status: everything done so far is kept, and the same command goes on from there

_asked = 0  # the signal that came while deferred
_deferring = False


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop. Not an Exception: no library takes it for a failure of its own."""


def listen() -> None:
    """Let SIGUSR1 and SIGTERM raise Stopped in the main thread, or be noted inside `deferred`."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, signals are only noted: the code asks `wanted` where it can stop.

    What ends well in spite of one raises Stopped at the end, on all ranks: what comes next must not begin.
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
    """Whether a signal has reached any rank; every rank must ask, and all get the same answer."""
    from drama_dist.distributed import (
        ranks,  # here, because it imports torch, and `drama --help` must not wait for that
    )

    return any(ranks.on_every_rank(_asked))


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _deferring:
        raise Stopped(signal.Signals(number).name)
    _asked = number

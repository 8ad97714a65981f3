"""Progress bars for every long-running loop, with rate and time left.

Only rank 0 draws. If the output is not a terminal (a log file), a line is written every ten seconds instead of a
moving bar, and where an LLM writes another one with its tokens a second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import Lock

from tqdm import tqdm

from drama_dist.distributed import ranks

_LINE = "{desc}: {percentage:3.0f}%, {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"


Progress = Callable[[int], object]  # called with the number of units done since the last call


def say(message: str) -> None:
    """Print a line on rank 0 without breaking a progress bar."""
    if ranks.rank() == 0:
        tqdm.write(message, file=sys.stderr)


def progress_bar(total: int | None, description: str, unit: str, done: int = 0) -> tqdm:
    """Return a bar that starts at `done` of `total` units; call `.update(n)` and `.close()`.

    None: not known yet; set `.total` to an estimate as soon as there is one.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        disable=ranks.rank() != 0,
        dynamic_ncols=terminal,
        bar_format=None if terminal else _LINE,
        mininterval=0.2 if terminal else 10,
        maxinterval=10 if terminal else 60,
        smoothing=0.1,
    )


class TokenRate:
    """Shows beside a bar how many tokens a second are written; called with the number of new ones, by any thread."""

    def __init__(self, bar: tqdm):
        self._every = 0.2 if sys.stderr.isatty() else 10  # seconds, as bars have it
        self._bar, self._tokens, self._lock = bar, 0, Lock()
        self._began: float | None = None

    def __call__(self, tokens: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._began is None:  # before that an LLM may have been loaded
                self._began = self._shown = now
                return
            self._tokens += tokens
            if self._bar.disable or now - self._shown < self._every:
                return
            self._shown = now
            self._bar.set_postfix_str(f"{self._tokens / (now - self._began):.0f} tokens/s")

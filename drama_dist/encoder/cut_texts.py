"""How many texts are longer than what a model reads, and how many tokens they lose.

Covers counting. Texts are cut where they become tokens (texts.py; the teacher's in search/local_teacher.py), and these
places `note` what they cut; a stage that wants to know wraps its work in `counting`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass


@dataclass
class CutTexts:
    """texts, tokens: that there were, prefixes and special tokens included. cut_texts: of these texts, those that were
    cut. cut_tokens: of these tokens, those that were cut off.
    """

    texts: int = 0
    tokens: int = 0
    cut_texts: int = 0
    cut_tokens: int = 0

    def __add__(self, other: CutTexts) -> CutTexts:
        return CutTexts(*map(operator.add, astuple(self), astuple(other)))


_count: ContextVar[CutTexts | None] = ContextVar("_count", default=None)


@contextmanager
def counting() -> Iterator[CutTexts]:
    """Count what this thread cuts inside the `with`; of two, one within the other, the inner one counts."""
    count = CutTexts()
    before = _count.set(count)
    try:
        yield count
    finally:
        _count.reset(before)


def note(lengths: Iterable[int], limit: int) -> None:
    """Count texts of these lengths, in tokens, that are cut to `limit`; nothing where nobody is counting."""
    count = _count.get()
    if count is None:
        return
    for length in lengths:
        count.texts += 1
        count.tokens += length
        count.cut_texts += length > limit
        count.cut_tokens += max(0, length - limit)

"""The parts of a record: which of its values is its id, its text, its title or its language, and what each may be.

Does not cover what a record without one of them becomes: read.py and judgements.py do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drama_dist.records import LONGEST_RECORD

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a floating-point number",
    list: "a list",
    dict: "a map",
    type(None): "null",
}


class Unfit(Exception):
    """A part of a record is not what it should be; the message says what it is."""


class _NotText(Unfit):
    """It is of another type."""


def part(
    value: Mapping[str, Any], names: Sequence[str], read: Callable[[Any], str], what: str, optional: bool = False
) -> str | None:
    """The first of the names that is there, as text; None if none is.

    Raises Unfit, which begins with `what`. optional: a value of a type that is no text counts as absent.
    """
    for name in names:
        if value.get(name) is None:
            continue
        try:
            return read(value[name])
        except _NotText as problem:
            if not optional:
                raise Unfit(f"{what} {problem}") from None
        except Unfit as problem:
            raise Unfit(f"{what} {problem}") from None
    return None


def id_of(value: Any) -> str:
    """Whole numbers count as their text."""
    text = language_of(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    if not text.strip():
        raise Unfit("is empty")
    return text


def language_of(value: Any) -> str:
    """One line of Unicode."""
    text = _string(value)
    if _CONTROL.search(text):
        raise Unfit("has a tab, a line break or another control character")
    if _SURROGATE.search(text):
        raise Unfit("is not valid Unicode")
    return text


def text_of(value: Any) -> str:
    """Text, or the parts of a list as paragraphs."""
    return _joined(value, "\n\n")


def title_of(value: Any) -> str:
    """Text, a number, or the parts of a list on one line."""
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return _joined(str(value) if is_number and not isinstance(value, bool) else value, " ")


def as_unicode(text: str) -> str:
    """The text with U+FFFD in place of halves of characters, which JSON may have as \\ud800."""
    return _SURROGATE.sub("\ufffd", text)


def _joined(value: Any, between: str) -> str:
    parts = value if isinstance(value, list) else [value]
    text = between.join(stripped for part in parts if (stripped := _string(part).strip()))
    if len(text) > LONGEST_RECORD:
        raise Unfit(f"is longer than {LONGEST_RECORD >> 20} MiB")
    return text


def _string(value: Any) -> str:
    if isinstance(value, bytes):  # a text column of parquet may be called binary
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Unfit("is invalid UTF-8") from None
    if not isinstance(value, str):
        raise _NotText(f"is {_KINDS.get(type(value), type(value).__name__)}")
    return value

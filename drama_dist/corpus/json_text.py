"""JSON that is not JSON Lines: objects over several lines, or in lists, and what can be read of it around a bad object.

Does not cover what the keys of an object mean, nor JSON Lines (records.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from drama_dist.records import JSON, BadRecord, invalid_utf8, parse_json

_FIRST_LINES = 20  # decide together, because any one may be damaged
_SHOWN = 400  # characters of a bad object that may be shown
_BETWEEN = re.compile(r"[\s,\[\]]*")  # objects: lists may follow each other, or be in lists
_SEVERAL = re.compile(r"\}\s*,\s*\{")


def is_one_json_text(begins: bytes) -> bool:
    """Whether the beginning of a file is of JSON that goes over several lines, or of a list.

    Not where lines are objects by themselves.
    """
    text = begins.decode("utf-8", "ignore")
    first, *others = text.split("\n", _FIRST_LINES)[:_FIRST_LINES]
    if _is_object(first) or sum(map(_is_object, others)) > 1:
        return False
    if first.strip() == "{" or first.startswith("["):
        return True
    return isinstance(parse_json(Path(), 1, lambda: JSON.raw_decode(text)[0], ""), dict)


def _is_object(line: str) -> bool:
    return isinstance(parse_json(Path(), 1, lambda: JSON.decode(line), ""), dict)


def json_objects(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Objects one after the other, in lists or not, each with the line where it begins.

    Raises ValueError where it is not clear what comes after an object that cannot be read, or a list is not closed.
    """
    text = file.read().decode("utf-8", "surrogateescape")
    line, place, open_lists = 1, 0, 0
    while True:
        start = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        open_lists += text.count("[", place, start) - text.count("]", place, start)
        line += text.count("\n", place, start)
        if start == len(text):
            break
        found = parse_json(path, line, partial(JSON.raw_decode, text, start), text[start : start + _SHOWN])
        if isinstance(found, BadRecord):
            after = _after_bad_object(text, start)
            if after is None:
                raise ValueError(f"{found}; nothing after it can be read")
            yield line, found
        else:
            value, after = found
            if not isinstance(value, dict):
                value = BadRecord(path, line, "expected a JSON object", value)
            yield line, invalid_utf8(path, line, text[start:after]) or value
        line, place = line + text.count("\n", start, after), after
    if open_lists > 0:
        raise ValueError(f"{path}:{line}: the list is not closed, so the file is cut; make or fetch it again")


def _after_bad_object(text: str, start: int) -> int | None:
    """Where to go on after an object that cannot be read: behind it if it has a line of its own and fills it.

    Where it goes over several lines and what is in it is indented deeper: behind the brace below its own, or at the
    next object below it, or the end of the list. None in other cases.
    """
    before = text[text.rfind("\n", 0, start) + 1 : start]
    end = text.find("\n", start)
    line = text[start : end if end >= 0 else len(text)]
    if before.strip(" \t,[") or _SEVERAL.search(line):
        return None
    content = line.rstrip(" \t\r,]")
    if content.endswith("}"):
        return start + len(content)
    if "[" in before or not (before or text[end + 1 : end + 2] in (" ", "\t")):
        return None
    below = re.compile(rf"\n(?:{re.escape(before)}\}}|(?={re.escape(before)}\{{|\]))").search(text, start)
    return below.end() if below else None

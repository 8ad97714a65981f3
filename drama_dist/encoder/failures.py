"""What libraries raise while they read a model, as one sentence that says what was read, or which setting names it.

Covers the wording only. What is checked, and when, is in model_check.py and pretrained.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from drama_dist.settings import SettingsError

_LONGEST = 240


@contextmanager
def told_as(problem: str) -> Iterator[None]:
    """Raise ValueError("problem: reason") where a library raises anything, for any cause in the model's files.

    For library calls only: errors of this package are sentences already. Too little memory is no fault of the files,
    and passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
            raise
        raise ValueError(f"{problem}: {reason(error)}") from error


@contextmanager
def named_by(setting: str, name: str) -> Iterator[None]:
    """Raise SettingsError("setting=name: ...") where the model of this name cannot be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SettingsError(f"{setting}={name}: {str(error).removeprefix(f'{name}: ')}") from error


def reason(error: BaseException) -> str:
    """The first line of an error, with the next one where it announces that; its type where it is not a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return text if " " in text else f"{type(error).__name__} {text}".strip()

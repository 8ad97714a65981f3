"""When too many of an LLM's answers are unusable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drama_dist.run.folder import DISCARD


def refuse_beyond(
    limit: float, aside: Sequence[dict[str, Any]], count: int, model: str, what: str, remedy: str
) -> None:
    """Raise ValueError if more than the fraction `limit` of `count` answers is set aside.

    aside: rows with a reason and a value, and the passage or query if there is one. what: of which they have none that
    is usable. remedy: what to do, beside raising the limit.
    """
    if len(aside) <= limit * count:
        return
    subjects = (str(row.get("passage", row.get("query", "")))[:80] for row in aside[:3])
    first = "\n".join(
        f"  {f'{subject}: ' if subject else ''}{row['reason']}: {row['value'][:120]!r}"
        for subject, row in zip(subjects, aside[:3], strict=True)
    )
    raise ValueError(
        f"{len(aside)} of {count} answers of {model} have no usable {what}, more than augment.bad_answer_limit={limit} "
        f"allows; the first:\n{first}\nRaise the limit; or use a stronger LLM, {remedy}, and add {DISCARD} to give up "
        "the answers that are stored (an endpoint's are in augment.answers or RUN/answers, too)."
    )

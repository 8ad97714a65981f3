"""The prompt for an LLM that puts passages in order, and reading its answer.

Covers the messages (in the form of RankGPT, Sun et al. 2023, arXiv 2304.09542; arXiv 2502.18460, section 3.2), and what
is mended in an answer. Any change of wording needs a new PROMPT_VERSION.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from drama_dist.augment.sources.prompts import Message, UnusableAnswer

PROMPT_VERSION = "rank-passages-1"
ANSWER_TOKENS = 8  # for each passage: "[20] > " are six with most tokenizers

_INSTRUCTION = (
    "You read a search query and numbered passages, and put the passages in order of how well they answer the query, "
    "the best first. Answer with all their numbers and nothing else, in this form: [2] > [1] > [3]"
)
_IDENTIFIER = re.compile(r"\[(\d{1,4})\]")


def rank_messages(query: str, passages: Sequence[str]) -> list[Message]:
    """The conversation that asks for an order of passages, which are numbered from 1."""
    listed = "\n".join(f"[{number}] {' '.join(text.split())}" for number, text in enumerate(passages, 1))
    asked = f"Query: {query}\n\nPassages:\n{listed}\n\nThe order of the {len(passages)} passages for the query: {query}"
    return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": asked}]


def read_order(answer: str, count: int) -> tuple[list[int], Counter[str]]:
    """The order in an answer, positions from 0, and what was mended.

    Numbers that are no passage's are left out, of repeated ones the first stands, and passages that are not named come
    last, in the order that they had. Raises UnusableAnswer where fewer than half of the passages are named.
    """
    named = [int(number) - 1 for number in _IDENTIFIER.findall(answer)]
    known = [position for position in named if 0 <= position < count]
    order = list(dict.fromkeys(known))
    if 2 * len(order) < count:
        raise UnusableAnswer("names fewer than half of the passages")
    missing = [position for position in range(count) if position not in set(order)]
    mended = Counter(invented=len(named) - len(known), repeated=len(known) - len(order), missing=len(missing))
    return order + missing, +mended

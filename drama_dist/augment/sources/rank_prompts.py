"""The prompt for an LLM that puts passages in order, and reading its answer.

Covers the messages (in the form of RankGPT, Sun et al. 2023, arXiv 2304.09542; arXiv 2502.18460, section 3.2), and what
is mended in an answer. Passages have letters (as in Reddy et al. 2024, arXiv 2406.15657), so that the scores of an
answer's first letter rank them all. Any change of wording needs a new PROMPT_VERSION.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from drama_dist.augment.sources.prompts import Message, UnusableAnswer

PROMPT_VERSION = "rank-passages-2"
ANSWER_TOKENS = 6  # for each passage: "[B] > " are four with most tokenizers
LETTERS = string.ascii_uppercase  # what passages are called, in the order in which they are shown
OPENING: Message = {"role": "assistant", "content": "["}  # of every answer; a letter comes next

_INSTRUCTION = (
    "You read a search query and lettered passages, and put the passages in order of how well they answer the query, "
    "the best first. Answer with all their letters and nothing else, in this form: [B] > [A] > [C]"
)
_IDENTIFIER = re.compile(r"\[([A-Z])\]")


def rank_messages(query: str, passages: Sequence[str]) -> list[Message]:
    """The conversation that asks for an order of passages, of which there are as many as LETTERS at most."""
    lettered = zip(LETTERS[: len(passages)], passages, strict=True)
    listed = "\n".join(f"[{letter}] {' '.join(text.split())}" for letter, text in lettered)
    asked = f"Query: {query}\n\nPassages:\n{listed}\n\nThe order of the {len(passages)} passages for the query: {query}"
    return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": asked}]


def read_order(answer: str, count: int) -> tuple[list[int], Counter[str]]:
    """The order in an answer, positions from 0, and what was mended.

    Letters that are no passage's are left out, of repeated ones the first stands, and passages that are not named come
    last, in the order that they had. Raises UnusableAnswer where fewer than half of the passages are named.
    """
    named = [LETTERS.index(letter) for letter in _IDENTIFIER.findall(answer)]
    known = [position for position in named if position < count]
    order = list(dict.fromkeys(known))
    if 2 * len(order) < count:
        raise UnusableAnswer("names fewer than half of the passages")
    missing = [position for position in range(count) if position not in set(order)]
    mended = Counter(invented=len(named) - len(known), repeated=len(known) - len(order), missing=len(missing))
    return order + missing, +mended


def as_answer(order: Sequence[int]) -> str:
    """The answer that `read_order` reads as this order."""
    return " > ".join(f"[{LETTERS[position]}]" for position in order)

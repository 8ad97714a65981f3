"""Cutting texts: sentences, and the random crops that serve as queries. Any language.

Sentence boundaries come from sentencex (about 300 languages); a blank line is one, too.
"""

from __future__ import annotations

import random
import re

from sentencex import segment

_BLANK_LINES = re.compile(r"\n\s*\n")
_LETTERS_PER_WORD = 4  # where a script has no spaces


def sentences(text: str, language: str) -> list[str]:
    """Sentences in order, stripped, none empty."""
    paragraphs = _BLANK_LINES.split(text)
    return [part for paragraph in paragraphs for raw in segment(language or "en", paragraph) if (part := raw.strip())]


def count_words(text: str) -> int:
    """Words; in text without spaces a word counts for every few letters."""
    return max(len(text.split()), sum(not letter.isascii() for letter in text) // _LETTERS_PER_WORD)


def random_crop(text: str, language: str, rng: random.Random, min_words: int, max_words: int) -> str | None:
    """A random sentence of min_words to max_words, or a span of words out of a longer one; None if none fits."""
    fitting = [part for part in sentences(text, language) if count_words(part) >= min_words]
    if not fitting:
        return None
    chosen = rng.choice(fitting)
    if count_words(chosen) <= max_words:
        return chosen
    spaced = len(chosen.split()) > 1
    units = chosen.split() if spaced else list(chosen)
    length = max_words if spaced else max_words * _LETTERS_PER_WORD
    begin = rng.randrange(max(1, len(units) - length + 1))
    return (" " if spaced else "").join(units[begin : begin + length])

"""Splitting texts into sentences, and the random crops that serve as queries; any language.

Sentence boundaries come from sentencex (about 300 languages); a blank line also ends a sentence.
"""

from __future__ import annotations

import random
import re

from sentencex import segment

_BLANK_LINES = re.compile(r"\n\s*\n")
_RUN = re.compile(r"\S+")
_LETTERS_PER_WORD = 4  # in scripts without spaces
_LONGEST_WORD = 3  # counted so; a longer run without a space is a text without spaces


def sentences(text: str, language: str) -> list[str]:
    """Sentences in order, stripped and not empty."""
    paragraphs = _BLANK_LINES.split(text)
    return [part for paragraph in paragraphs for raw in segment(language or "en", paragraph) if (part := raw.strip())]


def count_words(text: str) -> int:
    """Number of words; in text without spaces every few letters count as one."""
    return max(len(text.split()), sum(not letter.isascii() for letter in text) // _LETTERS_PER_WORD)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Begin and end of each word, in characters; in text without spaces every few letters are one."""
    spans: list[tuple[int, int]] = []
    for run in _RUN.finditer(text):
        begin, end = run.span()
        length = _LETTERS_PER_WORD if count_words(run[0]) > _LONGEST_WORD else end - begin
        spans += [(at, min(at + length, end)) for at in range(begin, end, length)]
    return spans


def random_crop(text: str, language: str, rng: random.Random, min_words: int, max_words: int) -> str | None:
    """A random sentence of min_words to max_words words, or a span of a longer one; None if no sentence fits."""
    candidates = [part for part in sentences(text, language) if count_words(part) >= min_words]
    if not candidates:
        return None
    sentence = rng.choice(candidates)
    if count_words(sentence) <= max_words:
        return sentence
    spaced = len(sentence.split()) > 1
    units = sentence.split() if spaced else list(sentence)
    length = max_words if spaced else max_words * _LETTERS_PER_WORD
    begin = rng.randrange(max(1, len(units) - length + 1))
    return (" " if spaced else "").join(units[begin : begin + length])

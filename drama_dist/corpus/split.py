"""Splitting texts into sentences and words, and spans of them; any language.

Sentence boundaries come from sentencex (about 300 languages); a blank line also ends a sentence. Which words lexical
search sees is in search/lexical.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import regex
from sentencex import segment

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"  # scripts without spaces
_BLANK_LINES = re.compile(r"\n\s*\n")
_LETTERS_PER_WORD = 4  # in scripts without spaces
_TOKENS_PER_WORD, _LETTERS_PER_TOKEN = 1.33, 5
_UNSPACED_WORD = regex.compile(rf"[{UNSPACED}]")
_CAPITAL_WORDS = 4  # fewer could be an abbreviation or a name
_WORDS = regex.compile(rf"(?:(?=[{UNSPACED}])\X){{1,{_LETTERS_PER_WORD}}}|[^\s{UNSPACED}]+")

Span = tuple[int, int]  # where a word begins and ends in its text


def sentences(text: str, language: str) -> list[str]:
    """Sentences in order, stripped and not empty."""
    paragraphs = _BLANK_LINES.split(text)
    return [part for paragraph in paragraphs for raw in segment(language or "en", paragraph) if (part := raw.strip())]


def count_words(text: str) -> int:
    """Number of words; in text without spaces every few letters count as one."""
    foreign = 0 if text.isascii() else sum(not letter.isascii() for letter in text)
    return max(len(text.split()), foreign // _LETTERS_PER_WORD)


def word_spans(text: str) -> list[Span]:
    """Where the words of a text are; in scripts without spaces, every few letters are one."""
    return [match.span() for match in _WORDS.finditer(text)]


def random_span(text: str, spans: Sequence[Span], words: int, rng: random.Random) -> str:
    """So many consecutive words of a text from anywhere in it, or all where it has fewer. spans: of its words."""
    begin = rng.randrange(max(1, len(spans) - words + 1))
    chosen = spans[begin : begin + words]
    return text[chosen[0][0] : chosen[-1][1]]


def crop(sentence: str, most: int, rng: random.Random) -> str:
    """A sentence, or a random span of `most` words where it is longer."""
    return sentence if count_words(sentence) <= most else random_span(sentence, word_spans(sentence), most, rng)


def about_tokens(text: str, tokens: int) -> str:
    """About the first `tokens` tokens of a text, for a tokenizer that is not known."""
    room, end = float(tokens), 0
    for begin, after in word_spans(text):
        letters = after - begin
        cost = letters if _UNSPACED_WORD.match(text, begin) else max(_TOKENS_PER_WORD, letters / _LETTERS_PER_TOKEN)
        if cost > room:
            return text[: end or int(begin + max(1, room))]
        room, end = room - cost, after
    return text


def lower_if_capitals(text: str) -> str:
    """A text of several words that are all capitals in small letters; any other as it is."""
    return text.lower() if text.isupper() and count_words(text) >= _CAPITAL_WORDS else text

"""Queries cropped from passages: words, sentences, rare words and titles; needs no LLM.

Cropped sentences are as in arXiv 2502.18460, section 3.2. The other kinds are there because a retriever that learns
from its teacher is as good as the teacher only on forms of queries that it has seen.
Shapes: N passages.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.split import Span, count_words, crop, random_span, sentences, word_spans
from drama_dist.records import Passage
from drama_dist.search.lexical import LexicalIndex
from drama_dist.settings import AugmentSettings

_SPAN_WORDS = 2, 30
_KEYWORDS = 2, 8
_RAREST = 25  # of a passage's words, from which keywords are drawn


def crops(
    table: PassageTable, lexical: LexicalIndex | None, augment: AugmentSettings, seed: int
) -> tuple[list[WrittenQuery], Counter[str]]:
    """Queries of the kinds in augment.crop_kinds, in order of the corpus; and how many draws did not go as drawn.

    Every passage gets equally many draws, or one more than others. Equal queries of a passage stand once. lexical:
    BM25's index, which only keywords need.
    """
    weights = {kind: weight for kind in KINDS if (weight := augment.crop_kinds.get(kind, 0))}
    draws_N = _draws(augment.crops_of(len(table)), len(table), seed)
    written: list[WrittenQuery] = []
    notes: Counter[str] = Counter()
    for position in np.flatnonzero(draws_N).tolist():
        passage = table[position]
        pieces, rng = Pieces(passage, augment, lexical), random.Random(f"{seed} crop {passage.id}")
        kind_of: dict[str, str] = {}
        for _ in range(draws_N[position]):
            if drawn := _draw(pieces, weights, rng, notes):
                notes["repeated crops"] += drawn[0] in kind_of
                kind_of.setdefault(*drawn)
        for query, kind in kind_of.items():
            provenance = {"kind": kind, "passage": passage.id, "seed": seed}
            written.append(WrittenQuery(query, passage.id, "crop", passage.language, provenance))
    return written, +notes


def _draws(count: int, passages: int, seed: int) -> np.ndarray:
    """How many of `count` queries each passage is to give; which passages give one more is drawn, int64 (N,)."""
    draws_N = np.full(passages, count // passages)
    more = np.random.default_rng(seed).choice(passages, count % passages, replace=False, shuffle=False)
    draws_N[more] += 1
    return draws_N


def _draw(
    pieces: Pieces, weights: Mapping[str, float], rng: random.Random, notes: Counter[str]
) -> tuple[str, str] | None:
    """A query of a kind drawn by weight from those that the passage can give, and the kind; None if it gives none."""
    # The first of exponential clocks to ring is each with a chance in proportion to its rate, and so is the next one.
    clocks = {kind: rng.expovariate(weight) for kind, weight in weights.items()}
    for tried, kind in enumerate(sorted(clocks, key=clocks.__getitem__)):
        query = KINDS[kind](pieces, rng)
        if query:
            notes["crops of another kind than drawn"] += tried > 0
            return " ".join(query.split()), kind
    notes["draws without a crop"] += 1
    return None


class Pieces:
    """What queries are made of in one passage; each part is computed once, where a query needs it."""

    def __init__(self, passage: Passage, augment: AugmentSettings, lexical: LexicalIndex | None = None):
        self._passage, self._augment, self._lexical = passage, augment, lexical

    def span(self, rng: random.Random) -> str | None:
        """Consecutive words from anywhere."""
        least, most = _SPAN_WORDS
        if len(self._spans) < least:
            return None
        words = rng.randint(least, min(most, len(self._spans)))
        return random_span(self._passage.text, self._spans, words, rng)

    def sentence(self, rng: random.Random) -> str | None:
        """A sentence, or a span of a long one."""
        return self._crop(rng.choice(self._long_enough), rng) if self._long_enough else None

    def joined(self, rng: random.Random) -> str | None:
        """Two sentences, in the passage's order."""
        if len(self._long_enough) < 2:
            return None
        first, second = sorted(rng.sample(range(len(self._long_enough)), 2))
        return f"{self._crop(self._long_enough[first], rng)} {self._crop(self._long_enough[second], rng)}"

    def keywords(self, rng: random.Random) -> str | None:
        """Some of the rarest words, in any order."""
        least, most = _KEYWORDS
        if len(self._rare_words) < least:
            return None
        return " ".join(rng.sample(self._rare_words, rng.randint(least, min(most, len(self._rare_words)))))

    def title(self, rng: random.Random) -> str | None:
        """The title, or the first sentence of a passage without one."""
        title = self._passage.title.strip() or next(iter(self._sentences), "")
        return self._crop(title, rng)

    def _crop(self, sentence: str, rng: random.Random) -> str:
        return crop(sentence, self._augment.max_crop_words, rng)

    @cached_property
    def _spans(self) -> list[Span]:
        return word_spans(self._passage.text)

    @cached_property
    def _sentences(self) -> list[str]:
        return sentences(self._passage.text, self._passage.language)

    @cached_property
    def _long_enough(self) -> list[str]:
        return [each for each in self._sentences if count_words(each) >= self._augment.min_crop_words]

    @cached_property
    def _rare_words(self) -> list[str]:
        assert self._lexical is not None
        return self._lexical.rarest_words(self._passage.content, _RAREST)


KINDS = {
    "span": Pieces.span,
    "sentence": Pieces.sentence,
    "joined": Pieces.joined,
    "keywords": Pieces.keywords,
    "title": Pieces.title,
}

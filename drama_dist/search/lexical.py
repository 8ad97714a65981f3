"""Lexical search: BM25 over the passages' words.

Covers how texts become tokens in each language, and ranking. Words are stemmed where Snowball has
the language; scripts that do not set words apart with spaces are read as pairs of characters.
Shapes: N passages, Q queries, k hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import bm25s
import numpy as np
import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from drama_dist.search.ranking import top_positions

# Hangul is here because Korean words carry their particles, and Snowball has no Korean.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]"
# Not the standard library's re: its \w leaves out vowel signs and cuts Hindi or Bengali words into pieces.
_TOKENS = regex.compile(rf"(?P<unspaced>{_UNSPACED}+)|(?P<word>(?:(?!{_UNSPACED})\w){{2,}})")
_LETTER_WITH_SIGNS = regex.compile(r"\X")
_ENGLISH = ("en", "eng", "english")


class LexicalIndex:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) over `texts`.

    language: ISO 639 code or English name; one that Snowball does not have, or "", means no stemming.
    Raises ValueError where no text has a word.
    """

    def __init__(self, texts: Sequence[str], language: str):
        name = language.lower()
        self._stemmer = _stemmer(name)
        self._stopwords = frozenset(STOPWORDS_EN) if name in _ENGLISH else frozenset()
        self._count = len(texts)
        tokens = [self.tokenize(text) for text in texts]
        if not any(tokens):
            raise ValueError(f"none of {len(texts)} passages has a word to index (language {language!r})")
        self._bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy")
        self._bm25.index(tokens, show_progress=False)

    @classmethod
    def open(cls, folder):
        import pickle

        return cls(*pickle.loads((folder / "lexical.pickle").read_bytes()))

    def __len__(self) -> int:
        return self._count

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text: stemmed words, and character pairs of scripts without spaces."""
        words: list[str] = []
        for match in _TOKENS.finditer(text.lower()):
            words.extend([match["word"]] if match["word"] else _pairs(match["unspaced"]))
        kept = [word for word in words if word not in self._stopwords]
        return self._stemmer.stemWords(kept) if self._stemmer else kept

    def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, N) best passages of each query, best first, ties by position.

        Returns scores (Q, k) float32 and positions (Q, k) int64. A passage without any word of the query
        is no hit: where there are fewer than k hits, the rest has position -1 and score 0.
        """
        k = max(0, min(k, self._count))
        scores_Qk = np.zeros((len(texts), k), dtype=np.float32)
        positions_Qk = np.full((len(texts), k), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            scores_N = self._scores(self.tokenize(text))
            top = top_positions(scores_N, k)
            top = top[scores_N[top] > 0]
            scores_Qk[row, : len(top)], positions_Qk[row, : len(top)] = scores_N[top], top
        return scores_Qk, positions_Qk

    def _scores(self, tokens: list[str]) -> np.ndarray:
        ids = self._bm25.get_tokens_ids(tokens)
        return self._bm25.get_scores_from_ids(ids) if ids else np.zeros(self._count, dtype=np.float32)


def _stemmer(language: str) -> Stemmer.Stemmer | None:
    # Not a look into Stemmer.algorithms(aliases=True): PyStemmer 3.1 leaves the aliases, "en" among them, out.
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        return None


def _pairs(run: str) -> list[str]:
    letters = _LETTER_WITH_SIGNS.findall(run)
    return [left + right for left, right in pairwise(letters)] or letters

"""Lexical search: BM25 over the passages' words, in an index on disk.

Covers how texts become tokens in each language, building the index, and what it tells: rankings, weights and rare
words. Words are stemmed where Snowball has the language; scripts that do not set words apart with spaces are read as
pairs of characters.
Shapes: N passages, Q queries, k hits, V words.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import bm25s
import numpy as np
import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN
from scipy.sparse import csc_matrix, csr_matrix

from drama_dist.corpus.split import UNSPACED
from drama_dist.run.files import sync, write_text
from drama_dist.search.ranking import top_positions

# Hangul is here because Korean words carry their particles, and Snowball has no Korean.
_UNSPACED = rf"[{UNSPACED}\p{{Hangul}}]"
# Not the standard library's re: its \w leaves out vowel signs and cuts Hindi or Bengali words into pieces.
_TOKENS = regex.compile(rf"(?P<unspaced>{_UNSPACED}+)|(?P<word>(?:(?!{_UNSPACED})\w){{2,}})")
_LETTER_WITH_SIGNS = regex.compile(r"\X")
_ENGLISH = ("en", "eng", "english")
_RECORD = "lexical.json"  # written last: an index without it is not whole


def build_lexical_index(texts: Iterable[str], language: str, folder: Path) -> LexicalIndex:
    """Write the index of `texts` to `folder`, which may hold other files, and open it; before its end it does not open.

    language: ISO 639 code or English name; one that Snowball does not have, or "", means no stemming.
    Texts are read once, one at a time; memory holds 4 bytes for each of their tokens and, at the end, some 24 for each
    different token of each text. Raises ValueError where no text has a word.
    """
    (folder / _RECORD).unlink(missing_ok=True)
    analyzer, vocabulary, tokens = Analyzer(language), dict[str, int](), _TokenIds()
    for text in texts:
        tokens.append(vocabulary.setdefault(token, len(vocabulary)) for token in analyzer.tokenize(text))
    if not vocabulary:
        raise ValueError(f"none of {len(tokens)} passages has a word to index (language {language!r})")
    bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy", csc_backend="scipy")  # numpy's takes 1.5 times
    bm25.scores = bm25.build_index_from_ids(range(len(vocabulary)), tokens, show_progress=False)
    bm25.vocab_dict = vocabulary
    bm25.save(folder, show_progress=False)
    for path in folder.glob("*.index.*"):
        sync(path)
    record = {"language": language, "passages": len(tokens), "tokens": tokens.total}
    write_text(folder / _RECORD, json.dumps(record) + "\n")
    return LexicalIndex(folder)


class LexicalIndex:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) as `build_lexical_index` wrote it; processes share its mapped files.

    Raises FileNotFoundError where the folder holds no index, or one that was not written to its end, ValueError where
    it is damaged.
    """

    def __init__(self, folder: Path):
        if not (folder / _RECORD).is_file():
            raise FileNotFoundError(
                f"{folder}: no BM25 index, or a part of one; run `drama encode --system bm25` first"
            )
        try:
            record = json.loads((folder / _RECORD).read_text("utf-8"))
            self._analyzer, self._count = Analyzer(record["language"]), int(record["passages"])
            self._mean_length = int(record["tokens"]) / self._count
            self._bm25 = bm25s.BM25.load(folder, mmap=True)
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{folder}: a damaged BM25 index ({type(error).__name__}); delete it and encode again"
            ) from error

    def __len__(self) -> int:
        return self._count

    def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, N) best passages of each query, best first, ties by position.

        Returns scores (Q, k) float32 and positions (Q, k) int64. A passage without any word of the query
        is no hit: where there are fewer than k hits, the rest has position -1 and score 0.
        """
        k = max(0, min(k, self._count))
        scores_Qk = np.zeros((len(texts), k), dtype=np.float32)
        positions_Qk = np.full((len(texts), k), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            scores_N = self._scores(self._analyzer.tokenize(text))
            top = top_positions(scores_N, k)
            top = top[scores_N[top] > 0]
            scores_Qk[row, : len(top)], positions_Qk[row, : len(top)] = scores_N[top], top
        return scores_Qk, positions_Qk

    def sparse_scores(self, texts: Sequence[str], positions: Sequence[int]) -> csr_matrix:
        """The scores of some passages for each query, (Q, n) float32; nothing is stored where no word is shared."""
        counts_QV = self.counts(texts)
        used = np.unique(counts_QV.indices)
        weights_nU = self._weights()[:, used].tocsr()[np.asarray(positions, dtype=np.int64)]
        scores_Qn = (counts_QV[:, used] @ weights_nU.T).tocsr()
        scores_Qn.sort_indices()
        return scores_Qn

    def counts(self, texts: Sequence[str]) -> csr_matrix:
        """How often each text has each word of the index, (n, V) float32; a score is counts times `weights`."""
        return self._counts([self._analyzer.tokenize(text) for text in texts])

    def weights(self) -> csr_matrix:
        """The weight of every word in every passage, (N, V) float32; in memory, as large as the index."""
        return self._weights().tocsr()

    def _weights(self) -> csc_matrix:
        parts = (self._bm25.scores[name] for name in ("data", "indices", "indptr"))
        return csc_matrix(tuple(parts), shape=(self._count, len(self._bm25.vocab_dict)))

    def weights_of(self, texts: Sequence[str]) -> csr_matrix:
        """The weights that passages of these texts would have, (n, V) float32, with this index's statistics.

        Lucene's BM25 (Kamphuis et al. 2020): idf · tf / (tf + k1 (1 − b + b · length / mean length)). Words that the
        index does not have count for the length alone.
        """
        tokens = [self._analyzer.tokenize(text) for text in texts]
        counts_nV, frequencies_V = self._counts(tokens), np.diff(self._bm25.scores["indptr"])
        idf_V = np.log(1 + (self._count - frequencies_V + 0.5) / (frequencies_V + 0.5))
        lengths_n = np.array([len(each) for each in tokens])
        norms_n = self._bm25.k1 * (1 - self._bm25.b + self._bm25.b * lengths_n / self._mean_length)
        row_of = np.repeat(np.arange(len(texts)), np.diff(counts_nV.indptr))
        counts_nV.data *= (idf_V[counts_nV.indices] / (counts_nV.data + norms_n[row_of])).astype(np.float32)
        return counts_nV

    def rarest_words(self, text: str, count: int) -> list[str]:
        """The words of a text that the fewest passages have, in small letters, rarest first; ties as in the text.

        Of words that become the same token the first stands for all.
        """
        words = self._analyzer.words(text)
        tokens = self._analyzer.stemmed(words)
        word_of = dict(zip(reversed(tokens), reversed(words), strict=True))
        return [word_of[token] for token in sorted(dict.fromkeys(tokens), key=self._passages_with)[:count]]

    def _counts(self, tokens: Sequence[list[str]]) -> csr_matrix:
        ids = [self._bm25.get_tokens_ids(each) for each in tokens]
        columns = np.concatenate([np.empty(0, np.int64), *ids]).astype(np.int64)
        rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
        shape = len(ids), len(self._bm25.vocab_dict)
        return csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)

    def _passages_with(self, token: str) -> int:
        id, ends = self._bm25.vocab_dict.get(token), self._bm25.scores["indptr"]
        return 0 if id is None else int(ends[id + 1] - ends[id])

    def _scores(self, tokens: list[str]) -> np.ndarray:
        ids = self._bm25.get_tokens_ids(tokens)
        return self._bm25.get_scores_from_ids(ids) if ids else np.zeros(self._count, dtype=np.float32)


class Analyzer:
    """Turns texts of a language (see `build_lexical_index`) into tokens."""

    def __init__(self, language: str):
        name = language.lower()
        self._stemmer = _stemmer(name)
        self._stopwords = frozenset(STOPWORDS_EN) if name in _ENGLISH else frozenset()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text: stemmed words, and character pairs of scripts without spaces."""
        return self.stemmed(self.words(text))

    def words(self, text: str) -> list[str]:
        """What becomes a token each: words in small letters that are no stopwords, and character pairs."""
        words: list[str] = []
        for match in _TOKENS.finditer(text.lower()):
            words.extend([match["word"]] if match["word"] else _pairs(match["unspaced"]))
        return [word for word in words if word not in self._stopwords]

    def stemmed(self, words: list[str]) -> list[str]:
        """The tokens of such words."""
        return self._stemmer.stemWords(words) if self._stemmer else words


class _TokenIds:
    """The token ids of all texts, as bm25s goes through them: a sequence of arrays, 4 bytes a token."""

    def __init__(self) -> None:
        self._ids, self._ends = array("i"), array("q", [0])

    def append(self, ids: Iterable[int]) -> None:
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def total(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[array[int]]:
        return (self._ids[start:end] for start, end in pairwise(self._ends))


def _stemmer(language: str) -> Stemmer.Stemmer | None:
    # Not a look into Stemmer.algorithms(aliases=True): PyStemmer 3.1 leaves the aliases, "en" among them, out.
    try:
        return Stemmer.Stemmer(language)
    except KeyError:
        return None


def _pairs(run: str) -> list[str]:
    letters = _LETTER_WITH_SIGNS.findall(run)
    return [left + right for left, right in pairwise(letters)] or letters

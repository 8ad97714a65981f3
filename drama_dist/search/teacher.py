"""Teachers: strong retrievers from elsewhere, as text encoders.

Covers what is common to all: windows of long passages, and mixing several. local_teacher.py and endpoint_teacher.py
have the two kinds. Does not cover fusing a teacher's ranking with BM25: fusion.py does.
Shapes: N texts, K components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

import numpy as np

from drama_dist.corpus.windows import cut
from drama_dist.encoder.pooling import checked_dim, matryoshka_cut_array
from drama_dist.encoder.texts import as_texts
from drama_dist.run.progress import Progress
from drama_dist.settings import TeacherSettings

Kind = Literal["query", "passage"]


class Teacher(ABC):
    """A model that encodes texts to unit vectors. Several threads may use one."""

    def __init__(self, settings: TeacherSettings):
        self.settings = settings

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError or OSError where the teacher cannot be used; loads no weights."""

    @abstractmethod
    def encode(self, texts: list[str], kind: Kind, progress: Progress | None = None) -> np.ndarray:
        """Unit vectors of texts as they are, float32 (N, K). progress: told how many texts are encoded."""

    def encode_queries(self, texts: Iterable[str], dim: int | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 (N, dim); dim None is the teacher's size.

        Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        return _cut(self.encode(as_texts(texts), "query"), dim)

    def encode_passages(
        self, texts: Iterable[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Unit vectors of passages, float32 (N, dim); dim None is the teacher's size.

        A text of more than `window_words` words has the mean of its windows' vectors. progress: told how many texts are
        encoded. Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        windows = [self._windows(text) for text in as_texts(texts)]
        flat, counts_N = list(chain(*windows)), np.array([len(parts) for parts in windows], dtype=np.int64)
        told = None if progress is None else _in_texts(progress, len(windows), len(flat))
        vectors_nK = self.encode(flat, "passage", told)
        if len(flat) > len(windows):
            vectors_nK = np.add.reduceat(vectors_nK, counts_N.cumsum() - counts_N)
        return _cut(vectors_nK, dim)

    def _windows(self, text: str) -> list[str]:
        words = self.settings.window_words
        return [text] if words is None else cut(text, words, self.settings.window_step)


class MixedTeacher:
    """Several teachers as one, whose score is the mean of theirs by weight.

    Its vectors are theirs side by side, each times the square root of its share: dot products then add up.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float]):
        self.teachers = teachers
        self._factors = np.sqrt(np.array(weights) / sum(weights)).astype(np.float32)

    def encode_queries(self, texts: Iterable[str], dim: int | None = None) -> np.ndarray:
        """As a teacher does."""
        some = as_texts(texts)
        return self._joined([teacher.encode_queries(some) for teacher in self.teachers], dim)

    def encode_passages(
        self, texts: Iterable[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """As a teacher does."""
        some, count = as_texts(texts), len(self.teachers)
        told = None if progress is None else _in_texts(progress, len(some), count * len(some))
        return self._joined([teacher.encode_passages(some, progress=told) for teacher in self.teachers], dim)

    def _joined(self, parts: Sequence[np.ndarray], dim: int | None) -> np.ndarray:
        return _cut(np.hstack([factor * part_NK for factor, part_NK in zip(self._factors, parts, strict=True)]), dim)


def _cut(vectors_NK: np.ndarray, dim: int | None) -> np.ndarray:
    return matryoshka_cut_array(vectors_NK, checked_dim(dim, vectors_NK.shape[1]))


def _in_texts(progress: Progress, texts: int, parts: int) -> Progress:
    """Tells `progress` of texts, in proportion to the parts that it is told of."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        progress(done * texts // parts - before * texts // parts)

    return told

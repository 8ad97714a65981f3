"""Dense search: exact inner product over the passages' embeddings, with faiss.

Covers the index in memory and as a file. Does not encode (encode.py), and knows positions, not
passage ids. Shapes: N passages, Q queries, K components, k hits.
"""

from __future__ import annotations

from pathlib import Path

import torch  # noqa: F401  before faiss: both bring an OpenMP runtime, and torch's must be the one that both use

import faiss  # isort: skip
import numpy as np

from drama_dist.encoder.pooling import matryoshka_cut_array

_FILE = "index.faiss"


class DenseIndex:
    """Exact inner-product search over unit vectors, so the score is the cosine.

    embeddings_NK: float32. Raises ValueError where it is not two-dimensional or has no row.
    """

    def __init__(self, embeddings_NK: np.ndarray):
        if embeddings_NK.ndim != 2 or not len(embeddings_NK):
            raise ValueError(f"embeddings of shape {embeddings_NK.shape}: expected one row per passage, at least one")
        self._index: faiss.IndexFlat = faiss.IndexFlatIP(embeddings_NK.shape[1])
        self._index.add(np.ascontiguousarray(embeddings_NK, dtype=np.float32))

    @classmethod
    def read(cls, path: Path) -> DenseIndex:
        """Read an index that `write` wrote; raises ValueError where the file holds something else."""
        found = faiss.read_index(str(path))
        if not isinstance(found, faiss.IndexFlat) or found.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: holds a {type(found).__name__}, not a flat inner-product index; encode again")
        index = cls.__new__(cls)
        index._index = found
        return index

    def write(self, path: Path) -> None:
        """Write the index under a temporary name, then rename."""
        temporary = path.with_name(path.name + ".tmp")
        faiss.write_index(self._index, str(temporary))
        temporary.replace(path)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def cut(self, dim: int) -> DenseIndex:
        """This index over the first `dim` components, normalised again (Matryoshka)."""
        return DenseIndex(matryoshka_cut_array(self._index.reconstruct_n(0, len(self)), dim))

    def search(self, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, N) best passages of each query, best first, ties by position.

        Returns scores (Q, k) float32 and positions (Q, k) int64. Raises ValueError where the queries
        have another number of components than the index.
        """
        if queries_QK.ndim != 2 or queries_QK.shape[1] != self.dim:
            raise ValueError(f"queries of shape {queries_QK.shape}: the index has {self.dim} components")
        k = max(0, min(k, len(self)))
        if not len(queries_QK) or not k:
            return np.empty((len(queries_QK), k), np.float32), np.empty((len(queries_QK), k), np.int64)
        queries_QK = np.ascontiguousarray(queries_QK, dtype=np.float32)
        scores_Qk, positions_Qk = self._sorted_search(queries_QK, min(k + 1, len(self)))
        # faiss keeps any of the passages that tie for the last place: where they do, look at more of them.
        tied, wide = self._ties_across(scores_Qk, k), k + 1
        while len(tied) and wide < len(self):
            wide = min(2 * wide, len(self))
            more_scores, more_positions = self._sorted_search(queries_QK[tied], wide)
            scores_Qk[tied, :k], positions_Qk[tied, :k] = more_scores[:, :k], more_positions[:, :k]
            tied = tied[self._ties_across(more_scores, k)]
        return scores_Qk[:, :k], positions_Qk[:, :k]

    def _sorted_search(self, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores_Qk, positions_Qk = self._index.search(queries_QK, k)
        order_Qk = np.lexsort((positions_Qk, -scores_Qk), axis=1)
        return np.take_along_axis(scores_Qk, order_Qk, 1), np.take_along_axis(positions_Qk, order_Qk, 1)

    @staticmethod
    def _ties_across(scores_Qk: np.ndarray, k: int) -> np.ndarray:
        """Rows whose k-th score is also the last one that was found beyond it."""
        if scores_Qk.shape[1] <= k:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(scores_Qk[:, k - 1] == scores_Qk[:, -1])


def write_index(embeddings_NK: np.ndarray, folder: Path) -> None:
    """Write the index of an embeddings folder beside its shards."""
    DenseIndex(embeddings_NK).write(folder / _FILE)


def load_index(folder: Path) -> DenseIndex:
    """The index of a folder that `encode_corpus` filled.

    Raises FileNotFoundError, saying what to run, where the folder has none.
    """
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(f"{folder / _FILE}: no such index; run `drama encode` for this run first")
    return DenseIndex.read(folder / _FILE)


def search_folder(folder: Path, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search a folder that `encode_corpus` filled; returns and raises as `DenseIndex.search` does.

    Queries with fewer components than the passages are searched at that Matryoshka dim.
    """
    index = load_index(folder)
    if queries_QK.ndim == 2 and 0 < queries_QK.shape[1] < index.dim:
        index = index.cut(queries_QK.shape[1])
    return index.search(queries_QK, k)

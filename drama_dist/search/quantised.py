"""Search of passages' vectors in int8 and in bits, made from the float32 shards.

Memory holds the codes alone, one byte a component or one bit; the shards are read a block at a time. faiss makes room
for codes of int8 as they come, by doubling, so that building may for a moment hold three times as much. Prefixes are
cut and normalised before they are quantised, and queries stay float32. An index over whole vectors that `drama search`
uses (encode.index, SQ8 for int8) is dense.py's affair.
Shapes: N passages, Q queries, K components, k hits, C candidates, B = K / 8 bytes, q queries at once, n of a block.
"""

from __future__ import annotations

import numpy as np

from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.search.dense import best_of, block_rows, check_queries, faiss, in_order, search_exact
from drama_dist.search.shards import EmbeddingShards
from drama_dist.setting_types import Precision

CALIBRATION_PASSAGES = 2**16  # that the ranges of int8 are taken from
_BYTES_AT_ONCE = 2**28


def search_in(
    precision: Precision, shards: EmbeddingShards, queries_QK: np.ndarray, k: int, rescore_multiplier: int
) -> tuple[np.ndarray, np.ndarray]:
    """The min(k, N) best passages of each query, with passages' vectors in a precision, best first, ties by position.

    The queries' K is the Matryoshka dim that passages are cut to. rescore_multiplier: of binary, see `BinaryIndex`.
    Returns and raises as `search_exact` does, and raises ValueError where K is no multiple of 8 in binary.
    """
    if precision == "float32":
        return search_exact(shards, queries_QK, k, queries_QK.shape[1])
    if precision == "int8":
        return Int8Index(shards, queries_QK.shape[1]).search(queries_QK, k)
    return BinaryIndex(shards, queries_QK.shape[1]).search(queries_QK, k, rescore_multiplier * k)


class Int8Index:
    """Passages with a byte for each component: faiss' scalar quantizer of 8 bits.

    A component's range, from its least to its greatest value in a sample of the passages (CALIBRATION_PASSAGES, drawn
    with the same seed each time), is cut into 255 steps; a code stands for the middle of its step, and values beyond
    the range get the last step. A score is the dot product of the float32 query and what the codes stand for, so there
    is nothing left to rescore.
    """

    def __init__(self, shards: EmbeddingShards, dim: int):
        self._index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        self._index.train(matryoshka_cut_array(shards.sample(CALIBRATION_PASSAGES, seed=0), dim))
        for _, block_nK in shards.blocks(block_rows(shards.dim)):
            self._index.add(matryoshka_cut_array(block_nK, dim))

    @property
    def bytes_per_vector(self) -> int:
        """Of a passage's codes."""
        return int(self._index.sa_code_size())

    def search(self, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns and raises as `search_exact` does."""
        check_queries(queries_QK, self._index.d)
        count = self._index.ntotal
        k = max(0, min(k, count))
        if not len(queries_QK) or not k:
            return np.empty((len(queries_QK), k), np.float32), np.empty((len(queries_QK), k), np.int64)
        queries_QK = np.ascontiguousarray(queries_QK, dtype=np.float32)
        scores, positions = best_of(lambda wide: self._index.search(queries_QK, wide), k, count)
        scores_Qk, positions_Qk = scores[:, :k], positions[:, :k]
        scores_Qk[positions_Qk < 0] = 0
        return scores_Qk, positions_Qk


class BinaryIndex:
    """Passages with a bit for each component: whether it is above 0.

    Search is that of Yamada, Asai and Hajishirzi (ACL 2021, arXiv 2106.00882): the C passages with the fewest bits that
    differ from the query's, put in order by the dot product of the float32 query and the passages' signs, +1 or -1.
    Raises ValueError where `dim` is no multiple of 8.
    """

    def __init__(self, shards: EmbeddingShards, dim: int):
        if dim % 8:
            raise ValueError(f"evaluate.precisions=binary: vectors of {dim} components, which is not a multiple of 8")
        self._codes_NB = np.empty((len(shards), dim // 8), dtype=np.uint8)
        for first, block_nK in shards.blocks(block_rows(shards.dim)):
            self._codes_NB[first : first + len(block_nK)] = _bits(matryoshka_cut_array(block_nK, dim))

    @property
    def bytes_per_vector(self) -> int:
        """Of a passage's codes."""
        return int(self._codes_NB.shape[1])

    def search(self, queries_QK: np.ndarray, k: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """The best by dot products of the `candidates` nearest; returns and raises as `search_exact` does."""
        check_queries(queries_QK, 8 * self.bytes_per_vector)
        k = max(0, min(k, len(self._codes_NB)))
        queries_QK = np.asarray(queries_QK, dtype=np.float32)
        scores_Qk = np.zeros((len(queries_QK), k), dtype=np.float32)
        positions_Qk = np.full((len(queries_QK), k), -1, dtype=np.int64)
        if not scores_Qk.size:
            return scores_Qk, positions_Qk
        # Of each query, faiss has a table of C positions, of 8 bytes, for every distance from 0 to K; signs take less.
        candidates = max(k, min(candidates, len(self._codes_NB)))
        step = max(1, _BYTES_AT_ONCE // (8 * queries_QK.shape[1] * candidates))
        for rows in (slice(start, start + step) for start in range(0, len(queries_QK), step)):
            _, nearest_qC = self.nearest(queries_QK[rows], candidates)
            scores_qC = self._dot_products(queries_QK[rows], nearest_qC)
            found = in_order(scores_qC, np.where(np.isfinite(scores_qC), nearest_qC, -1))
            scores_Qk[rows], positions_Qk[rows] = (each[:, :k] for each in found)
        scores_Qk[positions_Qk < 0] = 0
        return scores_Qk, positions_Qk

    def nearest(self, queries_QK: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Hamming distances (Q, C) int32 and positions (Q, C) int64 of the nearest passages, ties by position."""
        # Of passages that tie for the last rank, faiss' counting variant keeps the first ones, and its heap any.
        distances_QC, positions_QC = faiss.knn_hamming(_bits(queries_QK), self._codes_NB, count, variant="mc")
        return distances_QC, positions_QC

    def _dot_products(self, queries_qK: np.ndarray, positions_qC: np.ndarray) -> np.ndarray:
        signs_qCK = np.unpackbits(self._codes_NB[positions_qC], axis=-1).astype(np.float32)
        signs_qCK *= 2
        signs_qCK -= 1
        # not a matrix product, where the last bit of a score may depend on its place: copies of a passage are to tie
        scores_qC: np.ndarray = np.einsum("qck,qk->qc", signs_qCK, queries_qK)
        return scores_qC


def _bits(vectors_nK: np.ndarray) -> np.ndarray:
    """uint8 (n, B)."""
    return np.packbits(vectors_nK > 0, axis=1)

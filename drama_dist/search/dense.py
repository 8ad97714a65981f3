"""Dense search by inner product, which is the cosine of unit vectors: exact over shards, or in an index of faiss.

Exact search reads the shards a block at a time, so that memory does not grow with the corpus. An index that a factory
string describes (https://github.com/facebookresearch/faiss/wiki/The-index-factory) is compressed or approximate, or
both, and is held in memory. Does not encode (shards.py), and knows positions, not passage ids. Vectors in int8 and in
bits, which evaluation compares with these, are in quantised.py.
Shapes: N passages, Q queries, K components, k hits, n passages of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch  # noqa: F401  before faiss: both bring an OpenMP runtime, and torch's must be the one that both use

import faiss  # isort: skip
import numpy as np

from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.run.files import put_in_place
from drama_dist.run.progress import progress_bar
from drama_dist.search.shards import EmbeddingShards

_FILE = "index.faiss"
_BLOCK_BYTES = 2**24  # stays in the last cache while all queries are compared with it
_BLOCK_UNIT = 1024  # rows that faiss multiplies at once: blocks of whole units give scores that no block size changes
_QUERIES_AT_ONCE = 4096  # what faiss multiplies at once, likewise
_TRAINING_ROWS = 2**16  # all that product quantizers take: 256 rows for each of their 256 centroids
_TRAINING_ROWS_PER_LIST = 64  # faiss warns below 39, and takes no more than 256
_TRAINING_BYTES = 2**30


def search_exact(
    shards: EmbeddingShards, queries_QK: np.ndarray, k: int, dim: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The min(k, N) best passages of each query, best first, ties by position.

    dim: cut the passages to so many components, normalised again (Matryoshka); None: as they are stored.
    Returns scores (Q, k) float32 and positions (Q, k) int64; position -1 and score 0 where a query is not finite.
    Many queries are multiplied as matrices, where the last bit of a score may depend on its place in them, also that of
    equal vectors. Raises ValueError where the queries have another number of components, or dim is larger than K.
    """
    check_queries(queries_QK, shards.dim if dim is None else dim)
    k = max(0, min(k, len(shards)))
    queries_QK = np.ascontiguousarray(queries_QK, dtype=np.float32)
    scores_Qk = np.full((len(queries_QK), k), -np.inf, dtype=np.float32)
    positions_Qk = np.full((len(queries_QK), k), -1, dtype=np.int64)
    if scores_Qk.size:
        for first, block_nK in shards.blocks(block_rows(shards.dim)):
            block_nK = block_nK if dim is None else matryoshka_cut_array(block_nK, dim)
            for start in range(0, len(queries_QK), _QUERIES_AT_ONCE):
                rows = slice(start, start + _QUERIES_AT_ONCE)
                block_best = _search_block(queries_QK[rows], block_nK, k, scores_Qk[rows, -1])
                _merge(scores_Qk[rows], positions_Qk[rows], *block_best, first)
    scores_Qk[positions_Qk < 0] = 0
    return scores_Qk, positions_Qk


def _search_block(
    queries_QK: np.ndarray, block_nK: np.ndarray, k: int, least_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best of a block for each query: k or all, and some more. In order, ties by position, above `least_Q`."""

    def find(wide: int) -> tuple[np.ndarray, np.ndarray]:
        scores, positions = faiss.knn(queries_QK, block_nK, wide, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, positions

    return best_of(find, k, len(block_nK), least_Q)


def best_of(
    find: Callable[[int], tuple[np.ndarray, np.ndarray]], k: int, count: int, least_Q: np.ndarray | float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of `count` passages for each query, and some more, in order, ties by position.

    find: so many hits by faiss, which keeps any of the passages that tie for the last rank: where they do, it is asked
    for more. Where a query's last score is not above `least_Q`, its ties do not matter.
    """
    wide = min(k + 1, count)
    while True:
        scores, positions = in_order(*find(wide))
        if wide == count or not ((scores[:, k - 1] == scores[:, -1]) & (scores[:, -1] > least_Q)).any():
            return scores, positions
        wide = min(2 * wide, count)


def in_order(scores_Qk: np.ndarray, positions_Qk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best first, ties by position; what faiss left empty (position -1) last, with a score of minus infinity."""
    scores_Qk[positions_Qk < 0] = -np.inf
    order_Qk = np.lexsort((positions_Qk, -scores_Qk), axis=1)
    return np.take_along_axis(scores_Qk, order_Qk, 1), np.take_along_axis(positions_Qk, order_Qk, 1)


def _merge(
    scores_Qk: np.ndarray, positions_Qk: np.ndarray, block_scores: np.ndarray, block_positions: np.ndarray, first: int
) -> None:
    """Take the best of the block at position `first` into the best so far, behind equal scores."""
    better = np.flatnonzero(block_scores[:, 0] > scores_Qk[:, -1])
    scores = np.concatenate([scores_Qk[better], block_scores[better]], axis=1)
    positions = np.concatenate([positions_Qk[better], block_positions[better] + first], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : scores_Qk.shape[1]]
    scores_Qk[better] = np.take_along_axis(scores, order, 1)
    positions_Qk[better] = np.take_along_axis(positions, order, 1)


class FactoryIndex:
    """An index of faiss over the full vectors, in memory; `build_index` makes it."""

    def __init__(self, index: faiss.Index):
        self._index = index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    def search(self, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """What the index finds of the min(k, N) best, best first, ties by position.

        Returns as `search_exact` does; position -1 and score 0 where the index finds fewer than k. Scores of compressed
        vectors are approximate. Raises ValueError where the queries have another number of components.
        """
        check_queries(queries_QK, self.dim)
        k = max(0, min(k, len(self)))
        if not len(queries_QK) or not k:
            return np.empty((len(queries_QK), k), np.float32), np.empty((len(queries_QK), k), np.int64)
        scores_Qk, positions_Qk = in_order(*self._index.search(np.ascontiguousarray(queries_QK, np.float32), k))
        scores_Qk[positions_Qk < 0] = 0
        return scores_Qk, positions_Qk


def check_factory(factory: str, dim: int, parameters: str = "") -> None:
    """Raise ValueError, naming the setting, where faiss makes no inner-product index of `dim` components of `factory`.

    That its k-means needs more passages than there are shows only when the index is built.
    """
    _empty_index(factory, dim, parameters)


def build_index(shards: EmbeddingShards, factory: str, folder: Path, parameters: str = "") -> FactoryIndex:
    """Build the index that `factory` describes over all shards, and write it to `folder`.

    factory: encode.index, for example HNSW32 or IVF4096,PQ64. parameters: encode.index_search, how it is searched, for
    example nprobe=16; they are written with it. k-means learns from a sample of the vectors, drawn with the same seed
    each time: 65,536, or 64 for each inverted list where those are more, of at most 1 GiB. Memory is that sample, then
    the index and a block. Raises ValueError, naming the setting, where faiss refuses it.
    """
    index = _empty_index(factory, shards.dim, parameters)
    with _naming("encode.index", factory):
        if not index.is_trained:
            index.train(shards.sample(_training_rows(index), seed=0))
        bar = progress_bar(len(shards), f"index {factory}", "passages")
        for _, block_nK in shards.blocks(block_rows(shards.dim)):
            index.add(block_nK)
            bar.update(len(block_nK))
        bar.close()
    temporary = folder / f"{_FILE}.tmp"
    faiss.write_index(index, str(temporary))
    put_in_place(temporary, folder / _FILE)
    return FactoryIndex(index)


def open_index(folder: Path) -> FactoryIndex:
    """The index that `build_index` wrote.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such index; set encode.index and run `drama encode`")
    try:
        return FactoryIndex(faiss.read_index(str(path)))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{path}: not an index that faiss reads ({_reason(error)}); encode again") from error


def search_folder(encoded: Path, index: Path | None, queries_QK: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search an encoded collection with the index in a folder, or exactly where there is none; returns as they do.

    Queries with fewer components than the passages are searched exactly at that Matryoshka dim: an index is of all.
    """
    shards = EmbeddingShards(encoded)
    if queries_QK.ndim == 2 and 0 < queries_QK.shape[1] < shards.dim:
        return search_exact(shards, queries_QK, k, queries_QK.shape[1])
    return search_exact(shards, queries_QK, k) if index is None else open_index(index).search(queries_QK, k)


def recall_against_exact(
    index: FactoryIndex, shards: EmbeddingShards, queries_QK: np.ndarray, ks: Sequence[int] = (10, 100)
) -> dict[int, float]:
    """For each k, the share of the exact k best passages that are among the index's k best; mean over the queries.

    Raises ValueError where there is no query.
    """
    if not len(queries_QK):
        raise ValueError("recall against exact search needs at least one query")
    _, exact_Qk = search_exact(shards, queries_QK, max(ks))
    recalls = {}
    for k in ks:
        _, approximate_Qk = index.search(queries_QK, k)
        pairs = zip(exact_Qk[:, :k], approximate_Qk, strict=True)
        recalls[k] = float(np.mean([np.isin(exact, approximate).mean() for exact, approximate in pairs]))
    return recalls


def _empty_index(factory: str, dim: int, parameters: str) -> faiss.Index:
    with _naming("encode.index", factory):
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise RuntimeError("this kind of index has no inner product")
    with _naming("encode.index_search", parameters):
        faiss.ParameterSpace().set_index_parameters(index, parameters)  # type: ignore[arg-type]  # typed for another overload
    return index


def _training_rows(index: faiss.Index) -> int:
    try:
        lists = faiss.extract_index_ivf(index).nlist
    except RuntimeError:  # it has no inverted lists
        lists = 0
    return min(max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * lists), _TRAINING_BYTES // (4 * index.d))


@contextmanager
def _naming(setting: str, value: str) -> Iterator[None]:
    """Turn what faiss says of a setting into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{setting}={value!r}: faiss refuses it: {_reason(error)}") from error


def _reason(error: RuntimeError | MemoryError) -> str:
    """What faiss says, without its function, file, line and condition."""
    return re.sub(r"^.*\.(?:cpp|h):\d+: (?:Error: '.*' failed: )?", "", str(error), flags=re.DOTALL).strip()


def block_rows(dim: int) -> int:
    """How many vectors are read and compared at once."""
    return max(1, _BLOCK_BYTES // (4 * dim * _BLOCK_UNIT)) * _BLOCK_UNIT


def check_queries(queries_QK: np.ndarray, dim: int) -> None:
    """Raise ValueError where the queries do not have `dim` components."""
    if queries_QK.ndim != 2 or queries_QK.shape[1] != dim:
        raise ValueError(f"queries of shape {queries_QK.shape}: the passages have {dim} components")

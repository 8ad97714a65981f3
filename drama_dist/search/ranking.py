"""The top k of a row of scores, ties by position.

For scores of all passages at once, as lexical search has them. faiss has its own selection, and dense.py puts its ties
in this order.
"""

from __future__ import annotations

import numpy as np


def top_positions(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest scores, best first; equal scores in order of position.

    Returns int64, min(k, N) of them. Takes linear time in N, and sorts only the k that stay.
    """
    k = min(k, len(scores_N))
    if k == 0:
        return np.empty(0, dtype=np.int64)
    last = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    above = np.flatnonzero(scores_N > last)
    equal = np.flatnonzero(scores_N == last)[: k - len(above)]
    kept = np.sort(np.concatenate([above, equal]))
    return kept[np.argsort(-scores_N[kept], kind="stable")]

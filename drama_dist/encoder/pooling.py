"""Pooling: mean over the tokens of each packed sequence, and the Matryoshka cut.

Shapes: T tokens, B sequences, K components.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np
import torch

from drama_dist.encoder.packing import Packed


def mean_pool(hidden_TK: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Mean over each sequence's tokens, in float32; returns B × K, not normalised."""
    lengths_B = torch.tensor(packed.lengths, device=hidden_TK.device)
    owner_T = torch.repeat_interleave(torch.arange(len(packed.lengths), device=hidden_TK.device), lengths_B)
    sums_BK = hidden_TK.new_zeros(len(packed.lengths), hidden_TK.shape[-1], dtype=torch.float32)
    return sums_BK.index_add(0, owner_T, hidden_TK.float()) / lengths_B.unsqueeze(1)


def checked_dim(dim: SupportsIndex | None, size: int) -> int:
    """How many of `size` components to keep: all where `dim` is None.

    Raises TypeError where `dim` is not a whole number, ValueError where it is not from 1 to `size`.
    """
    if dim is None:
        return size
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"dim={dim!r}: must be a whole number, or None for all components")
    if not 1 <= operator.index(dim) <= size:
        raise ValueError(f"dim={dim}: these vectors have {size} components; dim must be from 1 to {size}")
    return operator.index(dim)


def matryoshka_cut_array(embeddings_NK: np.ndarray, dim: int) -> np.ndarray:
    """First `dim` components of each row, normalised again, float32 (Kusupati et al. 2022, Matryoshka).

    Raises as `checked_dim` does.
    """
    return unit_rows(embeddings_NK[:, : checked_dim(dim, embeddings_NK.shape[1])])


def unit_rows(rows_NK: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay."""
    rows_NK = np.asarray(rows_NK, dtype=np.float32)
    norms = np.linalg.norm(rows_NK, axis=1, keepdims=True)
    return rows_NK / np.maximum(norms, np.finfo(np.float32).tiny)

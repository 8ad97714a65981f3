"""Pooling: mean over the tokens of each packed sequence, and the Matryoshka cut.

Shapes: T tokens, B sequences, K components.
"""

from __future__ import annotations

import numpy as np
import torch

from drama_dist.encoder.packing import Packed


def mean_pool(hidden_TK: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Mean over each sequence's tokens, in float32; returns B × K, not normalised."""
    lengths_B = torch.tensor(packed.lengths, device=hidden_TK.device)
    owner_T = torch.repeat_interleave(torch.arange(len(packed.lengths), device=hidden_TK.device), lengths_B)
    sums_BK = hidden_TK.new_zeros(len(packed.lengths), hidden_TK.shape[-1], dtype=torch.float32)
    return sums_BK.index_add(0, owner_T, hidden_TK.float()) / lengths_B.unsqueeze(1)


def unit_vectors(hidden_TK: torch.Tensor, packed: Packed, dim: int) -> np.ndarray:
    """Mean pool, Matryoshka cut and normalisation, B × dim float32, without gradients.

    Raises ValueError where `dim` is larger than K.
    """
    return matryoshka_cut_array(mean_pool(hidden_TK, packed).cpu().numpy(), dim)


def matryoshka_cut_array(embeddings_NK: np.ndarray, dim: int) -> np.ndarray:
    """First `dim` components of each row, normalised again, float32 (Kusupati et al. 2022, Matryoshka).

    Raises ValueError if `dim` is larger than K.
    """
    if not 1 <= dim <= embeddings_NK.shape[1]:
        raise ValueError(f"dim={dim}: these vectors have {embeddings_NK.shape[1]} components")
    cut = np.asarray(embeddings_NK[:, :dim], dtype=np.float32)
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.maximum(norms, np.finfo(np.float32).tiny)

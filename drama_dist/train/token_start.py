"""The start of regression: a backbone that gives sums of token vectors, and has its layers still to learn the rest.

Covers how token vectors (token_vectors.py) take the place of the backbone's token embeddings. Each new embedding has
two parts. The first is the token's vector. The second keeps the principal components of the old embedding, scaled so
that all embeddings are of one length: then RMSNorm changes nothing, and the mean over a text's tokens is proportional
to the sum of their vectors. The layers' input weights are mapped so that they read from the new embeddings what they
read from the old ones, as nearly as least squares can; their output weights become zeros, so that the layers begin by
adding nothing (as in Fixup, Zhang et al. 2019, arXiv 1901.09321) and every step of training adds to the closed form.
Shapes: V tokens, S of them seen, K hidden components, J components of the targets, P of the first part, R = K − P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from drama_dist.encoder.families import Backbone
from drama_dist.encoder.head import LinearHead
from drama_dist.encoder.pooling import unit_rows

_FIRST_PART = 2 / 3  # of the hidden components at most


@torch.no_grad()
def put_token_vectors(backbone: Backbone, vectors_VJ: np.ndarray, counts_V: np.ndarray) -> LinearHead:
    """Change a backbone so that its mean-pooled states, through the head that is returned, point where the sums of
    token vectors do.

    counts_V: how often each token is in the training texts; they weigh what is kept where not all can be. With fewer
    than J / _FIRST_PART hidden components the vectors are reduced to their principal components. A vector of a token
    that is in no training text is shortened where it is longer than all others.
    """
    hidden, seen = backbone.config.hidden_size, np.flatnonzero(counts_V)
    weights_S1 = np.sqrt(counts_V[seen], dtype=np.float64)[:, None]
    old_VK = backbone.embed_tokens.weight.detach().float().cpu().numpy()
    centred_VK = old_VK - np.average(old_VK[seen], axis=0, weights=counts_V[seen]).astype(np.float32)

    first = min(vectors_VJ.shape[1], int(hidden * _FIRST_PART))
    axes_JP = _principal_axes(weights_S1 * vectors_VJ[seen], first)
    first_VP = vectors_VJ @ axes_JP
    lengths_V1 = np.linalg.norm(first_VP, axis=1, keepdims=True)
    length = lengths_V1[seen].max() or 1.0
    first_VP *= np.minimum(1, length / np.maximum(lengths_V1, length))
    rest_VR = unit_rows(centred_VK @ _principal_axes(weights_S1 * centred_VK[seen], hidden - first))
    rest_VR *= np.sqrt(np.maximum(length**2 - lengths_V1**2, 0))
    new_VK = np.hstack([first_VP, rest_VR]) * np.float32(hidden**0.5 / length)

    normed_SK = old_VK[seen] / np.sqrt(np.square(old_VK[seen]).mean(1, keepdims=True) + backbone.config.rms_norm_eps)
    basis_KK = _least_squares(weights_S1 * new_VK[seen], weights_S1 * normed_SK)
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _read_through(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), basis_KK)
        _read_through(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), basis_KK)
        for output in (attention.o_proj, mlp.down_proj):
            for weight in output.parameters():
                weight.zero_()
    backbone.norm.weight.fill_(1)
    backbone.embed_tokens.weight.copy_(torch.from_numpy(new_VK))
    head = LinearHead(hidden, vectors_VJ.shape[1])
    head.weight.zero_()
    head.weight[:, :first] = torch.from_numpy(axes_JP) * float(length / hidden**0.5)
    head.bias.zero_()
    return head


@torch.no_grad()
def append_embeddings(backbone: Backbone, parts: Sequence[Sequence[int]]) -> None:
    """Give each superword the mean of its tokens' embeddings, in new rows."""
    if parts:
        old = backbone.config.vocab_size
        means_SK = torch.stack([backbone.embed_tokens.weight[list(tokens)].mean(0) for tokens in parts])
        backbone.resize_token_embeddings(old + len(parts), mean_resizing=False)
        backbone.embed_tokens.weight[old:] = means_SK


def _principal_axes(rows_SK: np.ndarray, count: int) -> np.ndarray:
    """K × count, float32: the leading right singular vectors; not centred."""
    return np.ascontiguousarray(np.linalg.eigh(rows_SK.T @ rows_SK)[1][:, ::-1][:, :count], dtype=np.float32)


def _least_squares(new_SK: np.ndarray, old_SK: np.ndarray) -> torch.Tensor:
    """The map, K × K, with which rows of `new` are nearest to those of `old`."""
    products_KK = new_SK.T @ new_SK
    products_KK[np.diag_indices_from(products_KK)] += 1e-6 * np.trace(products_KK) / len(products_KK)
    return torch.from_numpy(np.linalg.solve(products_KK, new_SK.T @ old_SK))


def _read_through(norm: Any, readers: tuple[nn.Linear, ...], basis_KK: torch.Tensor) -> None:
    """Fold the map and the norm's gains into the linear layers that read the normed states."""
    gains_K = norm.weight.double().cpu()
    for reader in readers:
        reader.weight.copy_((reader.weight.double().cpu() * gains_K) @ basis_KK.T)
    norm.weight.fill_(1)

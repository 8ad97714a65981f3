"""The start of regression: a backbone that gives sums of token vectors, and has its layers still to learn the rest.

Covers how token vectors (token_vectors.py) take the place of the backbone's token embeddings. Each new embedding has
two parts. The first is the token's vector. The second keeps the principal components of the old embedding, scaled so
that all embeddings are of one length: then RMSNorm changes nothing, and the mean over a text's tokens is proportional
to the sum of their vectors. The layers' input weights are mapped so that they read from the new embeddings what they
read from the old ones, as nearly as least squares can; their output weights become zeros, so that the layers begin by
adding nothing (as in Fixup, Zhang et al. 2019, arXiv 1901.09321) and every step of training adds to the closed form.
Shapes: V tokens, K hidden components, J components of the targets, P components of the first part.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import LlamaModel

from drama_dist.encoder.head import LinearHead
from drama_dist.encoder.pooling import unit_rows

_FIRST_PART = 2 / 3  # of the hidden components at most


@torch.no_grad()
def begin_with(backbone: LlamaModel, vectors_VJ: np.ndarray, counts_V: np.ndarray) -> LinearHead:
    """Change a backbone so that its mean-pooled states, through the head that is returned, point where the sums of
    token vectors do.

    counts_V: how often each token is in the training texts; they weigh what is kept where not all can be. With fewer
    than J / _FIRST_PART hidden components the vectors are reduced to their principal components.
    """
    hidden, weights_V1 = backbone.config.hidden_size, np.sqrt(counts_V, dtype=np.float64)[:, None]
    old_VK = backbone.embed_tokens.weight.detach().double().cpu().numpy()
    first = min(vectors_VJ.shape[1], int(hidden * _FIRST_PART))
    axes_JP = _principal_axes(weights_V1 * vectors_VJ, first)
    first_VP = vectors_VJ @ axes_JP
    lengths_V1 = np.linalg.norm(first_VP, axis=1, keepdims=True)
    length = lengths_V1.max() or 1.0
    centred_VK = old_VK - (weights_V1 * old_VK).sum(0) / weights_V1.sum()
    rest_VR = unit_rows(centred_VK @ _principal_axes(weights_V1 * centred_VK, hidden - first))
    rest_VR *= np.sqrt(np.maximum(length**2 - lengths_V1**2, 0))
    new_VK = np.hstack([first_VP, rest_VR]) * (hidden**0.5 / length)

    normed_VK = old_VK / np.sqrt(np.square(old_VK).mean(1, keepdims=True) + backbone.config.rms_norm_eps)
    basis_KK = _least_squares(weights_V1 * new_VK, weights_V1 * normed_VK)
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _read_through(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), basis_KK)
        _read_through(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), basis_KK)
        for product in (attention.o_proj, mlp.down_proj):
            for weight in product.parameters():
                weight.zero_()
    backbone.norm.weight.fill_(1)
    backbone.embed_tokens.weight.copy_(torch.from_numpy(new_VK))
    head = LinearHead(hidden, vectors_VJ.shape[1])
    head.weight.zero_()
    head.weight[:, :first] = torch.from_numpy(axes_JP * (length / hidden**0.5))
    head.bias.zero_()
    return head


def _principal_axes(rows_VK: np.ndarray, count: int) -> np.ndarray:
    """K × count, the leading right singular vectors; not centred."""
    return np.ascontiguousarray(np.linalg.eigh(rows_VK.T @ rows_VK)[1][:, ::-1][:, :count])


def _least_squares(new_VK: np.ndarray, old_VK: np.ndarray) -> torch.Tensor:
    """The map, K × K, with which rows of `new` are nearest to those of `old`."""
    products_KK = new_VK.T @ new_VK
    products_KK[np.diag_indices_from(products_KK)] += 1e-6 * np.trace(products_KK) / len(products_KK)
    return torch.from_numpy(np.linalg.solve(products_KK, new_VK.T @ old_VK))


def _read_through(norm: nn.Module, products: tuple[nn.Linear, ...], basis_KK: torch.Tensor) -> None:
    """Fold the map and the norm's gains into the products that read the normed states."""
    gains_K = norm.weight.double().cpu()
    for product in products:
        product.weight.copy_((product.weight.double().cpu() * gains_K) @ basis_KK.T)
    norm.weight.fill_(1)

"""Rotation: a language model whose residual stream is turned to its principal components.

RMSNorm changes nothing but lengths once its gains are folded into the products behind it, so it commutes with rotations
(Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3). The rotated model does what the model did, but its hidden
dimensions are ordered by how much of the stream they hold: pruning then keeps the first ones. One rotation serves all
layers, so the result is a plain model of the same type; SliceGPT has one for each layer, and products between them.
Shapes: H hidden, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.importance import norms_in_order, run_over


@torch.no_grad()
def principal_basis(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """H × H, float64 on the CPU: orthonormal columns, of which the first ones hold most of what RMSNorms read.

    Each input of an RMSNorm counts with the same length, as it does behind the norm.
    """
    size = model.config.hidden_size
    moments_HH = torch.zeros(size, size, dtype=torch.float64, device=model.device)

    def add(_: Any, args: Any) -> None:
        states_TH = args[0][0].float()
        states_TH = states_TH / states_TH.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moments_HH.add_(states_TH.T @ states_TH)

    handles = [norm.register_forward_pre_hook(add) for norm in norms_in_order(model)]
    run_over(model, sequences, "prune: principal components")
    for handle in handles:
        handle.remove()
    return torch.linalg.eigh(moments_HH.cpu()).eigenvectors.flip(1)


@torch.no_grad()
def rotated(model: LanguageModel, basis_HH: torch.Tensor) -> LanguageModel:
    """A copy of the model in float32 on the CPU, with the same outputs, whose hidden dimensions are the basis's.

    basis_HH: orthonormal columns. The embeddings and the head are not tied any more, since the last norm's gains are
    the head's alone.
    """
    turned = copy.deepcopy(model).float().cpu()
    if turned.config.tie_word_embeddings:
        turned.config.tie_word_embeddings = False
        turned.lm_head.weight = torch.nn.Parameter(turned.lm_head.weight.clone())
    basis_HH = basis_HH.double()

    def reads(product: torch.nn.Linear, norm: Any) -> None:
        product.weight.copy_((product.weight.double() * norm.weight.double()) @ basis_HH)

    def writes(product: torch.nn.Linear) -> None:
        product.weight.copy_(basis_HH.T @ product.weight.double())
        if product.bias is not None:
            product.bias.copy_(basis_HH.T @ product.bias.double())

    turned.model.embed_tokens.weight.copy_(turned.model.embed_tokens.weight.double() @ basis_HH)
    for layer in turned.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for product in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(product, layer.input_layernorm)
        for product in (mlp.gate_proj, mlp.up_proj):
            reads(product, layer.post_attention_layernorm)
        writes(attention.o_proj)
        writes(mlp.down_proj)
    reads(turned.lm_head, turned.model.norm)
    for norm in norms_in_order(turned):
        norm.weight.fill_(1)
    return turned

"""The extractor: from a language model and a choice of what stays, a smaller plain Llama.

Covers the choice by importance and cutting the weights. Grouped-query attention becomes multi-head
attention (key-value heads are copied to the query heads they serve, then heads are chosen); the
head size stays, so rotary embeddings stay what they are.
Shapes: L layers, H hidden, A query heads, D head size, F MLP neurons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drama_dist.prune.importance import Importance, norms_in_order
from drama_dist.settings import PruneSettings, SettingsError


@dataclass(frozen=True)
class Kept:
    """Indices that stay, ascending: hidden dimensions, layers, and for each kept layer heads and neurons.

    norm_gains: for each RMSNorm of the small model, the square root of the share of its input's
    energy that the kept hidden dimensions hold.
    """

    hidden: torch.Tensor
    layers: list[int]
    heads: list[torch.Tensor]
    mlp: list[torch.Tensor]
    norm_gains: torch.Tensor


def choose(importance: Importance, shape: PruneSettings) -> Kept:
    """Keep the most important parts; layers evenly spaced (first and last among them) or by block influence.

    Raises SettingsError where the wanted shape is larger than the model's.
    """
    _check_shape(importance, shape)
    hidden = _top(importance.hidden_H, shape.hidden)
    layers = _layers(importance.layers_L, shape)
    norms = [2 * layer + part for layer in layers for part in (0, 1)] + [len(importance.energy) - 1]
    energy = importance.energy[norms]
    return Kept(
        hidden,
        layers,
        [_top(importance.heads_LA[layer], shape.heads) for layer in layers],
        [_top(importance.mlp_LF[layer], shape.mlp) for layer in layers],
        (energy[:, hidden].sum(1) / energy.sum(1)).sqrt(),
    )


@torch.no_grad()
def shrink(model: LlamaForCausalLM, kept: Kept) -> LlamaForCausalLM:
    """Cut the model to what is kept; float32, on the CPU.

    The result equals the model with the other parts masked to zero and each RMSNorm's gain times
    `norm_gains`. The full model's RMSNorm divides by the root of the sum over kept dimensions
    over H; the small one's by the sum over h: hence the factor √(H/h) in gains, and H/h in epsilon.
    """
    widening = model.config.hidden_size / len(kept.hidden)
    small = LlamaForCausalLM(_small_config(model.config, kept, widening)).float()
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, kept.hidden])
    if not model.config.tie_word_embeddings:
        small.lm_head.weight.copy_(model.lm_head.weight[:, kept.hidden])
    for place, layer in enumerate(kept.layers):
        _copy_layer(small.model.layers[place], model.model.layers[layer], kept, place)
    old_norms = norms_in_order(model)
    chosen = [old_norms[2 * layer + part] for layer in kept.layers for part in (0, 1)] + [old_norms[-1]]
    for new, old, gain in zip(norms_in_order(small), chosen, kept.norm_gains, strict=True):
        new.weight.copy_(old.weight[kept.hidden].float() * gain * widening**0.5)
    return small


def _check_shape(importance: Importance, shape: PruneSettings) -> None:
    layers, heads = importance.heads_LA.shape
    has = {"layers": layers, "hidden": len(importance.hidden_H), "heads": heads, "mlp": importance.mlp_LF.shape[1]}
    for name, size in has.items():
        if getattr(shape, name) > size:
            raise SettingsError(f"prune.{name}={getattr(shape, name)}: the model has only {size}")


def _layers(influence_L: torch.Tensor, shape: PruneSettings) -> list[int]:
    if shape.layer_choice == "influence":
        return _top(influence_L, shape.layers).tolist()
    return torch.linspace(0, len(influence_L) - 1, shape.layers).round().long().tolist()


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _small_config(config: LlamaConfig, kept: Kept, widening: float) -> LlamaConfig:
    small = copy.deepcopy(config)
    small.num_hidden_layers = len(kept.layers)
    small.hidden_size = len(kept.hidden)
    small.intermediate_size = len(kept.mlp[0])
    small.num_attention_heads = small.num_key_value_heads = len(kept.heads[0])
    small.head_dim = config.head_dim
    small.rms_norm_eps = config.rms_norm_eps * widening
    small.dtype = "float32"
    return small


def _copy_layer(new: Any, old: Any, kept: Kept, place: int) -> None:
    hidden, neurons, size = kept.hidden, kept.mlp[place], old.self_attn.head_dim
    heads = kept.heads[place]
    served_by = heads // old.self_attn.num_key_value_groups
    rows = {"q_proj": heads, "k_proj": served_by, "v_proj": served_by}
    for name, chosen in rows.items():
        source = getattr(old.self_attn, name).weight.unflatten(0, (-1, size))[chosen]
        getattr(new.self_attn, name).weight.copy_(source.flatten(0, 1)[:, hidden])
    output = old.self_attn.o_proj.weight.unflatten(1, (-1, size))[hidden][:, heads]
    new.self_attn.o_proj.weight.copy_(output.flatten(1))
    for name in ("gate_proj", "up_proj"):
        getattr(new.mlp, name).weight.copy_(getattr(old.mlp, name).weight[neurons][:, hidden])
    new.mlp.down_proj.weight.copy_(old.mlp.down_proj.weight[hidden][:, neurons])

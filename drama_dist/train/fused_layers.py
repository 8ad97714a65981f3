"""Llama layers whose parts between the matrix products are fused, for training on the CPU.

Covers putting kernels/layers.py in the place of a backbone's layers. The weights are the same, and so are results
and gradients, up to rounding. Elsewhere, and where the layers do not fit, transformers' own go on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from drama_dist.encoder.attention import attend
from drama_dist.encoder.packing import Packed
from drama_dist.kernels import layers


class FusedLayer(LlamaDecoderLayer):
    """A LlamaDecoderLayer with another way to compute it."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Packed,
        **_: Any,
    ) -> torch.Tensor:
        """1 × T × K to 1 × T × K."""
        x_TK, attention, mlp = hidden_states[0], self.self_attn, self.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        cosines, sines = position_embeddings
        heads = layers.project_heads(
            x_TK,
            self.input_layernorm.weight,
            self.input_layernorm.variance_epsilon,
            tuple(each.weight for each in projections),
            (cosines[0], sines[0]),
            packed.boundaries_B1,
        )
        attended = layers.merge_heads(self._attend(heads, packed), attention.head_dim, packed.boundaries_B1)
        x_TK = torch.addmm(x_TK, attended, attention.o_proj.weight.T)
        norm = self.post_attention_layernorm
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        return layers.feed_forward(x_TK, norm.weight, norm.variance_epsilon, *weights).unsqueeze(0)

    def _attend(self, heads: tuple[torch.Tensor, ...], packed: Packed) -> torch.Tensor:
        """Flat heads of queries, keys and values, one sequence after another, to flat heads."""
        tokens = len(packed.token_ids_T)
        by_run = []
        for each in heads:
            widths = [count * length * (each.numel() // tokens) for count, length in packed.runs]
            by_run.append(each.split(widths))  # one split: a slice would give each run a gradient of the whole
        outputs = []
        for (count, length), *parts in zip(packed.runs, *by_run, strict=True):
            q, k, v = (part.view(count, -1, length, self.self_attn.head_dim) for part in parts)
            outputs.append(attend(q, k, v, self.self_attn.scaling, causal=False).flatten())
        return torch.cat(outputs)


def fuse_layers(backbone: LlamaModel) -> bool:
    """Fuse the layers of a bidirectional backbone where this machine and its shape allow it; says whether it did."""
    config, device = backbone.config, backbone.embed_tokens.weight.device
    plain = not (config.attention_bias or config.mlp_bias or config.attention_dropout)
    fits = plain and config.hidden_act == "silu" and not config.is_causal
    fits = fits and layers.fits(config.hidden_size, config.intermediate_size, config.head_dim)
    if device.type != "cpu" or not fits or layers.extension() is None:
        return False
    for layer in backbone.layers:
        layer.__class__ = FusedLayer
    return True

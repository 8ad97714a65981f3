"""Llama layers whose attention, and whose parts between the matrix products, are fused for the CPU.

Covers putting kernels/llama_cpu/attention.py and layers.py in the place of a backbone's layers, for training and
encoding. The weights are the same, and so are results and gradients, up to rounding. On other devices, and for layers
that do not fit, transformers' layers are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from drama_dist.encoder.attention import packed_attention
from drama_dist.encoder.families import Backbone, Config
from drama_dist.encoder.packing import Packed
from drama_dist.kernels.llama_cpu import attention, layers


class FusedLayer(LlamaDecoderLayer):
    """A LlamaDecoderLayer computed by the fused kernels, or as transformers does if they do not fit."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Packed,
        **others: Any,
    ) -> torch.Tensor:
        """1 × T × K to 1 × T × K."""
        if not self._fits(hidden_states):
            plain: torch.Tensor = super().forward(
                hidden_states, position_embeddings=position_embeddings, packed=packed, **others
            )
            return plain
        x_TK, attn, mlp = hidden_states[0], self.self_attn, self.mlp
        cosines, sines = position_embeddings
        norm = self.input_layernorm
        rows = layers.project(
            x_TK,
            norm.weight,
            norm.variance_epsilon,
            (attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight),
            (cosines[0], sines[0]),
        )
        x_TK = torch.addmm(x_TK, self._attend(rows, packed), attn.o_proj.weight.T)
        norm = self.post_attention_layernorm
        weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        return layers.feed_forward(x_TK, norm.weight, norm.variance_epsilon, *weights).unsqueeze(0)

    def _fits(self, hidden_states: torch.Tensor) -> bool:
        """Whether the kernels do all that this layer does; it may have been moved, or given adapters or hooks."""
        config, parts = self.self_attn.config, [module for module in self.modules() if module is not self]
        products = [*self.self_attn.children(), *(part for part in self.mlp.children() if part is not self.mlp.act_fn)]
        return (
            _takes(hidden_states)
            and not torch.is_autocast_enabled("cpu")
            and not config.is_causal
            and not (self.training and config.attention_dropout)
            and all(type(product) is nn.Linear for product in products)
            and not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
        )

    def _attend(self, rows: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Attention from concatenated queries, keys and values to concatenated heads."""
        attn, config = self.self_attn, self.self_attn.config
        grouped = config.num_key_value_heads != config.num_attention_heads
        if attn.head_dim == attention.HEAD and not grouped and attention.extension() is not None:
            return attention.attend(rows, packed.boundaries_B1, attn.scaling)
        widths = [heads * attn.head_dim for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
        q, k, v = (part.unflatten(1, (-1, attn.head_dim)).transpose(0, 1)[None] for part in rows.split(widths, dim=1))
        return packed_attention(attn, q, k, v, None, attn.scaling, packed)[0][0].flatten(1)


def is_plain(config: Config) -> bool:
    """Whether layers of this configuration are the ones that the kernels compute."""
    plain = isinstance(config, LlamaConfig) and config.hidden_act == "silu"
    return plain and not (config.attention_bias or config.mlp_bias)


def fuse_layers(backbone: Backbone) -> bool:
    """Fuse the layers of a bidirectional Llama if device, dtype and shape allow it; returns whether it did."""
    config, weight = backbone.config, backbone.embed_tokens.weight
    fits = is_plain(config) and layers.fits(config.hidden_size, config.intermediate_size, config.head_dim)
    if not fits or config.is_causal or not _takes(weight) or layers.extension() is None:
        return False
    for layer in backbone.layers:
        layer.__class__ = FusedLayer
    return True


def _takes(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)

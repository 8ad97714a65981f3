"""Floating-point operations of an encoder, from its configuration (Chowdhery et al. 2022, PaLM, appendix B).

Covers the products of the layers: two operations for each weight and token, and attention's scores and sums. Does not
cover norms, activations and the embeddings' look-up, which are small, nor passes repeated to save memory. Weights are
not asked: with ZeRO 3 a rank has only a part of each.
"""

from __future__ import annotations

from collections.abc import Sequence

from drama_dist.encoder.families import Config


def layer_weights(config: Config) -> int:
    """Weights in the matrices of one layer."""
    query, key = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    return int(config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size))


def forward_flops(config: Config, lengths: Sequence[int]) -> float:
    """Of one forward pass of texts with so many tokens each; every token attends to its whole text."""
    products = 2.0 * layer_weights(config) * sum(lengths)
    attention = 4.0 * config.num_attention_heads * config.head_dim * sum(length * length for length in lengths)
    return float(config.num_hidden_layers * (products + attention))


def training_flops(config: Config, lengths: Sequence[int]) -> float:
    """Of a forward and a backward pass, which has two products for each of the forward pass's."""
    return 3 * forward_flops(config, lengths)

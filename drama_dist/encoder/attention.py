"""Attention over packed sequences, for every layer that is not fused (fused_layers.py).

In half precision on CUDA this is one call of FlashAttention: flash-attn's if it is installed, otherwise PyTorch's
built-in one, which has no dropout. Elsewhere it is one call per run of sequences of equal length: PyTorch's SDPA
without a mask (its flash kernel on the CPU) or, for gradients of short sequences, plain matrix products.
Registered with transformers under NAME, so that its Llama layers call it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from drama_dist.encoder.packing import Packed

NAME = "drama_packed"
_SHORT = 256  # up to this length plain products give gradients faster than the flash kernel: benchmarks/attention.py


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed: Packed,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each packed sequence, causally or bidirectionally according to the model's config.

    query 1 × heads × T × D, key and value 1 × key-value heads × T × D; returns 1 × T × heads × D.
    """
    causal = bool(getattr(module.config, "is_causal", True))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if flash_attn_is_installed():
            return _flash(query, key, value, scaling, packed, dropout, causal), None
        if not dropout:
            return _built_in_flash(query, key, value, scaling, packed, causal), None
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for (count, length), *parts in zip(
        packed.runs, *(_by_run(tensor, packed) for tensor in (query, key, value)), strict=True
    ):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
        if q.requires_grad and length <= _SHORT and not (causal or grouped or dropout):
            output = plain_attention(q, k, v, scaling)
        else:
            output = scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
        outputs.append(output.transpose(1, 2).reshape(count * length, query.shape[1], -1))
    return torch.cat(outputs).unsqueeze(0), None


@cache
def flash_attn_is_installed() -> bool:
    """Whether the flash-attn package is installed."""
    return find_spec("flash_attn") is not None


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention by its formula (Vaswani et al. 2017, eq. 1); all … × length × D. Stores length × length scores."""
    return torch.softmax((query * scaling) @ key.transpose(-1, -2), -1) @ value


def _by_run(tensor: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, ...]:
    """Split 1 × H × T × D into a view H × count · length × D for each run.

    A single split, because slicing out each run would give it a gradient as large as the whole tensor.
    """
    return tensor[0].split([count * length for count, length in packed.runs], dim=1)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    packed: Packed,
    dropout: float,
    causal: bool,
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends, longest = packed.boundaries_B1, packed.longest
    output: torch.Tensor = flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=causal
    )
    return output.unsqueeze(0)


def _built_in_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    packed: Packed,
    causal: bool,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]  # repeat heads: the option for grouped heads differs between versions
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (k, v))
    ends, longest = packed.boundaries_B1, packed.longest
    window = (-1, 0 if causal else -1)
    output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window)
    assert isinstance(output, torch.Tensor)  # without return_aux
    return output.unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)

"""Packed attention: each backend against attention written out, sequence by sequence."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from drama_dist.encoder import attention
from drama_dist.encoder.packing import pack

LENGTHS = (3, 3, 1, 5, 2, 2, 2)
HEADS, KEY_VALUE_HEADS, SIZE = 4, 2, 8


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(1, heads, sum(LENGTHS), SIZE) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> torch.Tensor:
    """1 × T × heads × D in float64."""
    key, value = (tensor.repeat_interleave(HEADS // KEY_VALUE_HEADS, 1) for tensor in (key, value))
    outputs, begin = [], 0
    for length in LENGTHS:
        q, k, v = (tensor[0, :, begin : begin + length].double() for tensor in (query, key, value))
        scores = q @ k.transpose(1, 2) * scaling
        if causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += length
    return torch.cat(outputs).unsqueeze(0)


def module(causal: bool) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.config = SimpleNamespace(is_causal=causal)
    return layer


@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_attends_to_itself_only(causal: bool) -> None:
    packed = pack([[1] * length for length in LENGTHS])
    output, _ = attention.packed_attention(module(causal), *tensors(), None, 0.3, packed)
    torch.testing.assert_close(output.double(), written_out(*tensors(), 0.3, causal), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("short", [256, 0], ids=["plain products", "flash kernel"])
def test_gradients_are_those_of_attention_written_out(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many key-value heads as query heads, the form of pruned encoders."""
    monkeypatch.setattr(attention, "_SHORT", short)
    query, key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], 1).requires_grad_() for tensor in tensors())
    output, _ = attention.packed_attention(
        module(False), query, key, value, None, 0.3, pack([[1] * n for n in LENGTHS])
    )
    expected = written_out(
        query, key[:, :: HEADS // KEY_VALUE_HEADS], value[:, :: HEADS // KEY_VALUE_HEADS], 0.3, False
    )
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((output * upstream).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    # In the oracle, copies of a key-value head share its gradient; here each copy has a gradient.
    for our_gradient, their_gradient in zip(ours, theirs, strict=True):
        pairs = [side.unflatten(1, (KEY_VALUE_HEADS, -1)).sum(2) for side in (our_gradient, their_gradient)]
        torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)


def test_the_call_of_flash_attention_follows_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers through `flash_attn_varlen_func` as its documentation describes it, written in PyTorch."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert q.shape == (sum(LENGTHS), HEADS, SIZE) and k.shape == v.shape == (sum(LENGTHS), KEY_VALUE_HEADS, SIZE)
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.diff().tolist() == list(LENGTHS)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        assert dropout_p == 0.0
        heads_first = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
        return written_out(*heads_first, softmax_scale, causal)[0].to(q.dtype)

    stand_in = ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    packed = pack([[1] * length for length in LENGTHS])
    output = attention._flash(*tensors(), 0.3, packed, 0.0, causal=False)
    torch.testing.assert_close(output.double(), written_out(*tensors(), 0.3, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_call_of_the_built_in_flash_attention_follows_its_interface(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through PyTorch's `varlen_attn`, as versions without grouped heads have it."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        assert q.shape == k.shape == v.shape == (sum(LENGTHS), HEADS, SIZE)
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q.diff().tolist() == list(LENGTHS)
        assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == max(LENGTHS)
        assert window_size in ((-1, -1), (-1, 0))
        few = HEADS // KEY_VALUE_HEADS
        heads_first = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k[:, ::few], v[:, ::few])]
        return written_out(*heads_first, scale, window_size == (-1, 0))[0].to(q.dtype)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    packed = pack([[1] * length for length in LENGTHS])
    output = attention._built_in_flash(*tensors(), 0.3, packed, causal)
    torch.testing.assert_close(output.double(), written_out(*tensors(), 0.3, causal), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)], ids=str)
def test_attention_on_a_gpu_agrees(causal: bool, dtype: torch.dtype, close: float) -> None:
    packed = pack([[1] * length for length in LENGTHS], "cuda")
    on_gpu = [tensor.to("cuda", dtype) for tensor in tensors()]
    output, _ = attention.packed_attention(module(causal), *on_gpu, None, 0.3, packed)
    torch.testing.assert_close(output.double().cpu(), written_out(*tensors(), 0.3, causal), rtol=close, atol=close)

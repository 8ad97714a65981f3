"""The CPU's attention kernel against float64: lengths around every block and strip, both dtypes, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from drama_dist.kernels.llama_cpu import attention

# Around whole register tiles and strips; products go through 256 of the depth at once.
LENGTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 130, 255, 257, 515]
HEADS = 3
KERNEL = attention  # see the fixture `instructions`


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths: list[int], scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = HEADS * attention.HEAD
    rows = torch.randn(sum(lengths), 3 * width, generator=generator) * scale
    return rows, torch.randn(sum(lengths), width, generator=generator)


def plain(rows: torch.Tensor, lengths: list[int], scaling: float) -> torch.Tensor:
    outputs = []
    for part in rows.split(lengths):
        q, k, v = (each.unflatten(1, (HEADS, -1)).transpose(0, 1)[None] for each in part.chunk(3, dim=1))
        outputs.append(scaled_dot_product_attention(q, k, v, scale=scaling)[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], lengths: list[int]) -> list[float]:
    """Relative, for each sequence, of the output and of the gradients."""
    pairs = [
        zip(own.double().split(lengths), its.split(lengths), strict=True) for own, its in zip(found, exact, strict=True)
    ]
    return [float((own - its).norm() / its.norm()) for pair in pairs for own, its in pair]


def exceeding(found: list[float], expected: list[float], rows: torch.Tensor) -> list[float]:
    """Errors beyond PyTorch's own and what rounding the exponents can make."""
    queries, keys, _ = (each.float().unflatten(1, (HEADS, -1)).norm(dim=-1) for each in rows.chunk(3, dim=1))
    largest_score = 0.125 * float(queries.max() * keys.max())
    rounding = torch.finfo(rows.dtype).eps / 4 + torch.finfo(torch.float32).eps * largest_score
    return [error for error, own in zip(found, expected, strict=True) if error > 1.5 * own + rounding]


def with_gradient(output: torch.Tensor, rows: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return output.detach(), *torch.autograd.grad(output, rows, upstream.to(output.dtype))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["even", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_pytorch_and_a_wrong_scaling_does(dtype: torch.dtype, scale: float) -> None:
    rows, upstream = (each.to(dtype) for each in inputs(LENGTHS, scale))
    rows.requires_grad_()
    exact_rows = rows.detach().double().requires_grad_()
    exact = with_gradient(plain(exact_rows, LENGTHS, 0.125), exact_rows, upstream)
    expected = errors(with_gradient(plain(rows, LENGTHS, 0.125), rows, upstream), exact, LENGTHS)
    found = errors(with_gradient(attention.attend(rows, boundaries(LENGTHS), 0.125), rows, upstream), exact, LENGTHS)
    assert not exceeding(found, expected, rows.detach())
    wrong = errors(with_gradient(attention.attend(rows, boundaries(LENGTHS), 0.13), rows, upstream), exact, LENGTHS)
    assert scale == 0.3 or len(exceeding(wrong, expected, rows.detach())) >= len(LENGTHS) - 1  # a token alone is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_call_left_behind_does_not_reach_the_next(dtype: torch.dtype) -> None:
    """Scratch memory is kept: a long sequence's NaN, then a short one."""
    long, upstream_long = (each.to(dtype) for each in inputs([200]))
    attention.attend((long * torch.nan).requires_grad_(), boundaries([200]), 0.125).backward(upstream_long)
    rows, upstream = (each.to(dtype) for each in inputs([5, 70]))
    first, second = (rows.clone().requires_grad_() for _ in range(2))
    ends = boundaries([5, 70])
    results = [with_gradient(attention.attend(each, ends, 0.125), each, upstream) for each in (first, second)]
    assert bool(results[0][0].isfinite().all()) and bool(results[0][1].isfinite().all())
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_scores_far_apart_neither_overflow_nor_divide_by_zero() -> None:
    rows, upstream = inputs([70], scale=100.0)
    rows.requires_grad_()
    found = with_gradient(attention.attend(rows, boundaries([70]), 0.125), rows, upstream)
    assert all(bool(each.isfinite().all()) for each in found)

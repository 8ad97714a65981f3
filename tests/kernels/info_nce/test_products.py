"""Products of the compiled kernels that the other tests' small inputs do not reach; attention's are its own tests'.

More than 256 of the depth, of which products take one part after the other; whole and partial tiles of rows and of
columns; padding, in new memory full of NaN.
"""

from __future__ import annotations

import pytest
import torch

from drama_dist.kernels import info_nce
from drama_dist.kernels.info_nce import cpu as KERNEL


@pytest.mark.usefixtures("nan_in_new_memory", "instructions")
@pytest.mark.parametrize("rows, columns", [(300, 520), (49, 200), (16, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_errs_little_more_than_rounding(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(6)
    sides = [torch.randn(count, 600, generator=generator).to(dtype) for count in (rows, columns)]
    exact = _gradients("reference", [side.double() for side in sides])
    assert KERNEL.extension() is not None
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    assert _error(_gradients("cpu", sides), exact) <= bound
    for side in sides:
        side[-1, 256:288] = 0  # a step of the depth left out of one row's products
    assert _error(_gradients("cpu", sides), exact) > 3 * bound


def _gradients(backend: str, sides: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [side.clone().requires_grad_() for side in sides]
    positives = torch.arange(len(sides[0]))
    result = info_nce(*leaves, positives, temperature=0.05, dims=[600, 300], backend=backend)
    return torch.autograd.grad(result.loss, leaves)


def _error(gradients: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest, as a share of the largest component."""
    pairs = zip(gradients, exact, strict=True)
    return max(float((gradient - its).abs().max() / its.abs().max()) for gradient, its in pairs)

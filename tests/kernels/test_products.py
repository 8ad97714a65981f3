"""Products of the compiled kernels that the other tests' small inputs do not reach; attention's are its own tests'.

More than 256 of the depth, of which products take one part after the other; whole and partial tiles of rows and of
columns; padding, in new memory full of NaN.
"""

from __future__ import annotations

import pytest
import torch

from drama_dist.kernels import compiled_tiles, info_nce


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("rows, columns", [(300, 520), (49, 200), (16, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_errs_little_more_than_rounding(dtype: torch.dtype, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(6)
    sides = [torch.randn(count, 600, generator=generator).to(dtype).requires_grad_() for count in (rows, columns)]
    exact = [side.detach().double().requires_grad_() for side in sides]
    assert compiled_tiles.extension() is not None
    gradients = []
    for backend, both in (("streaming", sides), ("reference", exact)):
        result = info_nce(*both, torch.arange(rows), temperature=0.05, dims=[600, 300], backend=backend)
        gradients.append(torch.autograd.grad(result.loss, both))
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    for own, its in zip(*gradients, strict=True):
        assert (own - its).abs().max() <= bound * its.abs().max()

"""The fused mean pool and normalisation against PyTorch operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from drama_dist.encoder.packing import pack
from drama_dist.encoder.pooling import unit_vectors
from drama_dist.kernels.pooling import mean_pool_unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("lengths", "dim"), [([1], 5), ([3, 1, 11], 37), ([9, 2], 20)], ids=str)
def test_vectors_and_gradients_equal_plain_operations(lengths: list[int], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(sum(lengths), 37, device=DEVICE).to(dtype).requires_grad_()
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    found = mean_pool_unit(hidden, boundaries, dim)
    expected = torch.stack([normalize(part[:, :dim].double().mean(0), dim=0) for part in hidden.split(lengths)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(found)
    (own,) = torch.autograd.grad((found * upstream).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(own, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_the_encoders_vectors_are_those_of_the_cpu() -> None:
    hidden, packed = torch.randn(8, 37), pack([[3, 4, 5], [6], [7, 8, 9, 10]])
    found = unit_vectors(hidden.cuda(), pack([[3, 4, 5], [6], [7, 8, 9, 10]], "cuda"), 20)
    np.testing.assert_allclose(found, unit_vectors(hidden, packed, 20), rtol=1e-5, atol=1e-6)


def test_more_components_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=38: the hidden states have 37"):
        mean_pool_unit(torch.zeros(2, 37), torch.tensor([0, 2], dtype=torch.int32), 38)

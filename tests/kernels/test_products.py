"""Products of the compiled kernels whose depth is more than one part of 256: attention's are in test_attention.py."""

from __future__ import annotations

import torch

from drama_dist.kernels import compiled_tiles, info_nce


def test_the_loss_where_products_take_their_depth_in_parts() -> None:
    generator = torch.Generator().manual_seed(6)
    sides = [torch.randn(count, 600, generator=generator).requires_grad_() for count in (300, 520)]
    assert compiled_tiles.extension() is not None
    gradients = []
    for backend in ("streaming", "reference"):
        result = info_nce(*sides, torch.arange(300), temperature=0.05, dims=[600, 300], backend=backend)
        gradients.append(torch.autograd.grad(result.loss, sides))
    for own, its in zip(*gradients, strict=True):
        assert (own - its).abs().max() <= 3e-6 * its.abs().max()

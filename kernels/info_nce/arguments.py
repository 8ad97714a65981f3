"""Checks of what every loss is given: vectors, Matryoshka dims with weights, temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

_LEAST_TEMPERATURE = 1e-6  # scores reach its inverse, and the steps of float32 are 1/16 there
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NestedDims:
    """dims ascend, weights go with them; order: where each of the given dims is among them."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    order: list[int]


def check_sides(queries: torch.Tensor, passages: torch.Tensor, temperature: float) -> None:
    """Raise ValueError where these are no vectors of one space and no temperature."""
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"expected queries B × K and passages N × K, got {tuple(queries.shape)}, {tuple(passages.shape)}"
        )
    if not len(queries) or not len(passages):
        raise ValueError(f"expected queries and passages, got {len(queries)} and {len(passages)}")
    if (queries.dtype, queries.device) != (passages.dtype, passages.device) or queries.dtype not in _DTYPES:
        raise ValueError(
            f"expected queries and passages of one floating dtype on one device, got {queries.dtype} on "
            f"{queries.device} and {passages.dtype} on {passages.device}"
        )
    if not isinstance(temperature, Real):
        raise ValueError(f"temperature is a {type(temperature).__name__}: expected a number, it gets no gradient")
    if not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a number from {_LEAST_TEMPERATURE:g} on")


def nested_dims(dims: Sequence[int] | None, weights: Sequence[float] | None, components: int) -> NestedDims:
    """In ascending order; by default all components, and equal weights with the sum 1.

    Raises ValueError where dims are not different numbers up to `components`, or weights are not as many.
    """
    dims = list(dims) if dims else [components]
    weights = list(weights) if weights else [1 / len(dims)] * len(dims)
    if min(dims) < 1 or max(dims) > components or len(set(dims)) != len(dims):
        raise ValueError(f"dims={dims}: expected different numbers from 1 to {components}")
    if len(weights) != len(dims):
        raise ValueError(f"dim_weights={weights}: expected one for each of dims={dims}")
    ascending, sorted_weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)
    return NestedDims(ascending, sorted_weights, [ascending.index(dim) for dim in dims])

"""Problems for the loss, odd in every size, and how far a backend may be from the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from drama_dist.kernels import InfoNCE, SoftTargets, info_nce

K, DIMS, WEIGHTS = 37, [33, 20, 5], [0.5, 0.2, 0.3]
OPTIONS = ["plain", "same document", "excluded"]
BACKENDS = {
    "eager": [torch.float64, torch.float32],
    "cpu": [torch.float32, torch.bfloat16],
    "cuda": [torch.float32, torch.float16],
    "fused": [torch.float32, torch.float16],
}
ON_GPU = ("cuda", "fused")  # in Triton's interpreter where there is none
GPU = torch.cuda.is_available()
Result = TypeVar("Result", InfoNCE, SoftTargets)

every_backend = pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
uninterpreted = pytest.mark.parametrize(  # by default: Triton's interpreter is slow
    "backend", [pytest.param(name, marks=[pytest.mark.slow] * (name in ON_GPU)) for name in BACKENDS], indirect=True
)


def every_case(
    shapes: list[tuple[int, int]], options: list[str], interpreted: set[tuple[tuple[int, int], str, torch.dtype]]
) -> pytest.MarkDecorator:
    """Every backend, dtype, shape and option; Triton's interpreter takes seconds for each: by default `interpreted`."""
    cases = [
        pytest.param(
            backend,
            dtype,
            shape,
            option,
            id=f"{backend}-{str(dtype)[6:]}-{shape}-{option}",
            marks=[pytest.mark.slow] if backend in ON_GPU and (shape, option, dtype) not in interpreted else [],
        )
        for backend, dtypes in BACKENDS.items()
        for dtype in dtypes
        for shape in shapes
        for option in options
    ]
    return pytest.mark.parametrize(("backend", "dtype", "shape", "option"), cases, indirect=["backend"])


def device_of(backend: str) -> str:
    """Where a backend is tested: Triton's interpreter stands in for a GPU."""
    return "cuda" if GPU and backend in ON_GPU else "cpu"


def inputs(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Queries, passages (views into buffers of NaN), positives and ids."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    sides = []
    for count, scale in ((rows, 1), (columns, 3)):
        buffer = torch.full((count, K + 4), torch.nan, dtype=dtype, device=device)
        buffer[:, :K] = scale * torch.randn(count, K, generator=generator, dtype=torch.float64).to(buffer)
        sides.append(buffer[:, :K].requires_grad_())
    positives = torch.randint(columns, (rows,), generator=generator)
    ids = torch.randint(max(1, columns // 2), (columns,), generator=generator)
    return *sides, positives.to(device), ids.to(device)


def options(name: str, rows: int, columns: int, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of info_nce for one of OPTIONS."""
    if name == "plain":
        return {}
    generator = torch.Generator().manual_seed(5)
    excluded = torch.randint(-1, max(1, columns // 2), (rows, 3), generator=generator).to(ids)
    return {"passage_ids": ids} | ({"excluded_ids": excluded} if name == "excluded" else {})


Outcome = tuple[InfoNCE, list[torch.Tensor]]


def differentiated(
    loss_of: Callable[..., Result], queries: torch.Tensor, passages: torch.Tensor, *given: Any, **options: Any
) -> tuple[Result, list[torch.Tensor]]:
    """Result, and gradients of queries and passages in float64, for an upstream gradient of 2.5."""
    leaves = [side.detach().requires_grad_() for side in (queries, passages)]
    result = loss_of(*leaves, *given, **options)
    return result, [gradient.double() for gradient in torch.autograd.grad(2.5 * result.loss, leaves)]


def outcome(backend: str, *given: Any, **options: Any) -> Outcome:
    """Of a backend's InfoNCE."""
    return differentiated(info_nce, *given, backend=backend, **options)


def ours_and_truth(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, option: str, temperature: float = 0.05
) -> tuple[Outcome, Outcome]:
    """Of a backend and of the oracle, for the same inputs."""
    queries, passages, positives, ids = inputs(*shape, dtype, device_of(backend))
    arguments = {"temperature": temperature, "dims": DIMS, "dim_weights": WEIGHTS, **options(option, *shape, ids)}
    ours, truth = (outcome(name, queries, passages, positives, **arguments) for name in (backend, "reference"))
    return ours, truth


def allowed(dtype: torch.dtype) -> float:
    """Of the largest gradient: sums in float32, operands and results rounded to the inputs' precision."""
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def assert_gradients_close(ours: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Errors are shares of the side's largest gradient."""
    for gradient, exact in zip(ours, truth, strict=True):
        assert float((gradient - exact).abs().max()) <= allowed(dtype) * float(exact.abs().max()) + 1e-7

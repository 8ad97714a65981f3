"""Teachers for the soft targets: odd in every size, dense and sparse, with empty rows and full ones."""

from __future__ import annotations

from typing import Any

import torch
from cases import DIMS, WEIGHTS, device_of, differentiated, inputs

from drama_dist.kernels import SoftTargets, SparseLogits, TeacherScores, soft_targets

KINDS = ["dense", "both", "sparse"]
T = 19
Outcome = tuple[SoftTargets, list[torch.Tensor]]


def sparse_of(dense: torch.Tensor, columns: torch.dtype = torch.int32) -> SparseLogits:
    """What is not 0 of a matrix."""
    entries = dense.nonzero()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), dense.count_nonzero(1).cpu().cumsum(0)])
    return SparseLogits(starts.to(dense.device), entries[:, 1].to(columns), dense[dense != 0])


def teacher(kind: str, rows: int, columns: int, device: str = "cpu", scale: float = 1.0) -> TeacherScores:
    """Logits of a few units times `scale`; every third row of the sparse matrix is empty, and every seventh full."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + 1)
    components = 0 if kind == "sparse" else T
    dense = [scale**0.5 * torch.randn(count, components, generator=generator) for count in (rows, columns)]
    logits = scale * 3 * torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) < 0.2
    kept[::3], kept[1::7] = False, True
    sparse = None if kind == "dense" else sparse_of((logits * kept).to(device))
    return TeacherScores(*(side.to(device) for side in dense), sparse)


def outcome(backend: str, *given: Any, **options: Any) -> Outcome:
    """Of a backend's soft targets."""
    return differentiated(soft_targets, *given, backend=backend, **options)


def ours_and_truth(
    backend: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    temperature: float = 0.05,
    dims: list[int] = DIMS,
    scale: float = 1.0,
) -> tuple[Outcome, Outcome]:
    """Of a backend and of the oracle, for the same inputs."""
    queries, passages, *_ = inputs(*shape, dtype, device_of(backend))
    scores = teacher(kind, *shape, device_of(backend), scale)
    given = {"temperature": temperature, "dims": dims, "dim_weights": WEIGHTS[: len(dims)]}
    ours, truth = (outcome(name, queries, passages, scores, **given) for name in (backend, "reference"))
    return ours, truth


def assert_close(ours: SoftTargets, truth: SoftTargets, close: float) -> None:
    """Loss, per-dim losses and entropy; errors are relative to the largest loss or entropy, which its parts may be."""
    unit = 1 + max(float(truth.per_dim.max()), float(truth.entropy))
    for name in ("loss", "per_dim", "entropy"):
        found, expected = getattr(ours, name).detach().double(), getattr(truth, name).detach().double()
        torch.testing.assert_close(found, expected, rtol=0, atol=close * unit)

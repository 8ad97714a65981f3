"""What a backend does for a loss: the arithmetic on one chunk of rows.

Covers the protocol, chunk sizes, norms and what they add to the gradients, and padding of components. The
implementations are eager.py, cpu.py (with tiles.cpp) and cuda.py (with Triton kernels).
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.

With A the product over the first d components, the score is S = A / (|q| |p| temperature), and G = dL/dS. Then
dL/dA = G / (|q| |p| temperature), and the norms add −q / |q|² · rowsum(G ∘ S) to dL/dq, and alike to dL/dp with the
column sums. A vector no longer than FLOOR has scores of 0 and gets no gradient: its inverse norm is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch.nn.functional import pad

from drama_dist.kernels.info_nce.problem import Problem
from drama_dist.kernels.info_nce.rows import Rows

FLOOR = 1e-12  # of norms


@dataclass(frozen=True)
class Chunking:
    """How many rows a backend takes at a time: up to `most_rows`, in steps of `row_step`, as many as `score_bytes`
    holds float32 planes of scores for: one for each dim, and one for the teacher's logits where there is one.
    """

    score_bytes: int
    most_rows: int
    row_step: int

    def slices(self, rows: int, columns: int, planes: int) -> Iterator[slice]:
        """Slices of rows that cover all; columns: of the largest part."""
        fitting = min(self.most_rows, self.score_bytes // (4 * planes * columns)) // self.row_step * self.row_step
        size = max(self.row_step, fitting)
        for begin in range(0, rows, size):
            yield slice(begin, min(rows, begin + size))

    def largest(self, rows: int, columns: int, planes: int) -> int:
        """Rows of the largest chunk, the first."""
        return next(self.slices(rows, columns, planes)).stop


class Tiles(Protocol):
    """One loss call's running state; chunks are visited in order, `scores` before `add_gradients`.

    The problem says which loss, and thereby which statistics of rows.
    """

    chunking: ClassVar[Chunking]

    def __init__(
        self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem
    ) -> None: ...

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """See Backend."""
        ...

    def scores(self, rows: slice) -> Rows:
        """Statistics of a chunk; its scores are kept until the next call."""
        ...

    def add_gradients(self, shift_MR: torch.Tensor, other: torch.Tensor) -> None:
        """Add the gradients of the chunk in hand; the arguments are what `Rows.shifts` gives, merged over all parts.

        For InfoNCE, G = weight / B · exp(S − shift) for a negative, and −weight / B · other for the positive, other
        being M × R; for soft targets, weight / B · (exp(S − shift) − exp(the teacher's logit − other)), other being R.
        """
        ...

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries and passages, after the last chunk, for an upstream gradient of 1."""
        ...


def inverse_norms(vectors_RK: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """M × R, of the first d components for every dim, in float32 at least; 0 for norms up to FLOOR."""
    precision = torch.promote_types(vectors_RK.dtype, torch.float32)
    norms_MR = torch.stack([torch.linalg.vector_norm(vectors_RK[:, :dim], dim=1, dtype=precision) for dim in dims])
    return norms_MR.masked_fill_(norms_MR <= FLOOR, torch.inf).reciprocal_()


def add_norm_terms(
    gradient_RK: torch.Tensor,
    vectors_RK: torch.Tensor,
    dims: Sequence[int],
    terms_MR: torch.Tensor,
    norms_MR: torch.Tensor,
) -> None:
    """In place: what the norms of each dim add to the gradient of some rows; terms: sums of G ∘ S, norms: inverse."""
    for index, dim in enumerate(dims):
        factor_R1 = (terms_MR[index] * norms_MR[index].square()).unsqueeze(1)
        gradient_RK[:, :dim].addcmul_(vectors_RK[:, :dim].to(gradient_RK.dtype), factor_R1, value=-1)


def block_ends(dims: Sequence[int], step: int) -> list[int]:
    """Where each dim's block of components ends once every block is padded to whole steps."""
    ends: list[int] = []
    begin = 0
    for dim in dims:
        ends.append((ends[-1] if ends else 0) + -(-(dim - begin) // step) * step)
        begin = dim
    return ends


def pad_blocks(vectors: torch.Tensor, dims: Sequence[int], step: int) -> torch.Tensor:
    """The components of dims, every dim's block padded with zeros to whole steps; no copy where all are whole."""
    if block_ends(dims, step)[-1] == vectors.shape[1] == dims[-1]:
        return vectors.contiguous()
    blocks = [vectors[:, begin:end] for begin, end in zip((0, *dims), dims, strict=False)]
    return torch.cat([pad(block, (0, -block.shape[1] % step)) for block in blocks], 1)


def unpad_blocks(padded: torch.Tensor, dims: Sequence[int], step: int, width: int) -> torch.Tensor:
    """The inverse of pad_blocks, with zeros from the last dim on to `width`; no copy where nothing was padded."""
    if padded.shape[1] == width == dims[-1]:
        return padded
    whole = padded.new_zeros(len(padded), width)
    for begin, end, source in zip((0, *dims), dims, (0, *block_ends(dims, step)), strict=False):
        whole[:, begin:end] = padded[:, source : source + end - begin]
    return whole

"""What a backend does for the loss: the arithmetic on one chunk of rows.

Covers the protocol, norms, chunk sizes, padding of components, and the terms that the norms add to
the gradients. The backends are eager_tiles.py, compiled_tiles.py (with tiles.cpp) and triton_tiles.py.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.

With A the product over the first d components, the score is S = A / (|q| |p| temperature), a negative's
exponent is z = S · (1 + hardness · temperature), and G = dL/dS. Then dL/dA = G / (|q| |p| temperature),
and the norms add −q / |q|² · rowsum(G ∘ S) to dL/dq, and alike to dL/dp with the column sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import pad

from drama_dist.kernels.problem import Problem

MASKED = -1e30  # finite: a masked score times a zero gradient must stay zero
FLOOR = 1e-12  # of norms, as in torch.nn.functional.normalize


@dataclass(frozen=True)
class ChunkScores:
    """own_MR: scores of the positives; rivals_MR: logsumexp of z over the negatives; best_R: best negative's, last dim.

    A row without negatives has rivals and best near MASKED or at −inf. masked_pairs: how many
    (row, column) pairs were left out, a scalar.
    """

    own_MR: torch.Tensor
    rivals_MR: torch.Tensor
    best_R: torch.Tensor
    masked_pairs: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """Of the loss with upstream gradient 1."""

    queries_BK: torch.Tensor
    passages_NK: torch.Tensor
    temperature: torch.Tensor


class Tiles(Protocol):
    """One loss call's running state; chunks are visited in order, `scores` before what uses them."""

    def __init__(
        self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem
    ) -> None: ...

    def row_chunks(self) -> Iterator[slice]:
        """Slices of rows that cover all queries."""
        ...

    def scores(self, rows: slice) -> ChunkScores:
        """Scores of a chunk, kept until the next call."""
        ...

    def fold_columns(self) -> None:
        """Add the chunk in hand to the columns' normalisers."""
        ...

    def column_normalisers(self) -> torch.Tensor:
        """M × N: logsumexp over the rows for which the column is a negative."""
        ...

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        """Add the gradients of the chunk in hand.

        G = weight / B · (exp(z − shift) + symmetric · exp(z − column shift)) for a negative, and
        −weight / B · missed for the positive.
        """
        ...

    def gradients(self) -> Gradients:
        """The whole gradients, after the last chunk."""
        ...


class Norms:
    """Inverse norms of the first d components for every dim, and the gradient terms that they cause."""

    def __init__(self, query_BK: torch.Tensor, passage_NK: torch.Tensor, temperature: float, dims: Sequence[int]):
        self.temperature, self.dims = temperature, dims
        self.query_MB, self.passage_MN = _inverse_norms(query_BK, dims), _inverse_norms(passage_NK, dims)
        self.scaled_query_MB = self.query_MB / temperature

    def complete(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor],
        products: tuple[torch.Tensor, torch.Tensor],
        row_terms_MB: torch.Tensor,
        column_terms_MN: torch.Tensor,
    ) -> Gradients:
        """From dL/dA's products with the other side to the gradients of the inputs."""
        add_norm_terms(products[0], inputs[0], self.dims, row_terms_MB, self.query_MB)
        add_norm_terms(products[1], inputs[1], self.dims, column_terms_MN, self.passage_MN)
        return Gradients(*products, -row_terms_MB.sum() / self.temperature)


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


def _inverse_norms(vectors: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    precision = torch.promote_types(vectors.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(vectors[:, :dim], dim=1, dtype=precision) for dim in dims]
    return torch.stack(norms).clamp_min(FLOOR).reciprocal()


def row_chunks(rows: int, columns: int, dims: int, score_bytes: int, most: int, step: int) -> Iterator[slice]:
    """Slices of up to `most` rows, as many as `score_bytes` holds float32 scores for, in steps of `step`."""
    size = max(step, min(most, score_bytes // (4 * dims * columns)) // step * step)
    for begin in range(0, rows, size):
        yield slice(begin, min(rows, begin + size))


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
    places = zip((0, *dims), dims, (0, *block_ends(dims, step)), strict=False)
    for begin, end, place in places:
        whole[:, begin:end] = padded[:, place : place + end - begin]
    return whole

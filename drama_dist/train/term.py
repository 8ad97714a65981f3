"""What a term of the objective is given, and what it returns.

A term is an object with the one method of `Term`, in a file of its own beside this one; `objective_terms` in
objective.py lists those that the settings ask for. A term sees embeddings and what every rank knows of the batch, and
no texts, tokens or weights. What a new one needs to know of a batch becomes a field of EmbeddedBatch, which step.py
fills.
Shapes: B queries and N passages of a rank, or of all ranks where it says so; K components; E excluded ids of a query.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from drama_dist.kernels import TeacherScores


@dataclass(frozen=True)
class Relevance:
    """Which passage answers which query in a global batch: of all ranks, in order of rank, the same on every rank.

    positives_B: int64, the column of each query's positive among all passages. passage_ids_N: int64, equal for equal
    texts: no column with the positive's id is a negative. excluded_ids_BE: int64, ids that are no negatives of a query
    (its other positives), -1 where it has fewer; None where no query has any.
    """

    positives_B: torch.Tensor
    passage_ids_N: torch.Tensor
    excluded_ids_BE: torch.Tensor | None = None

    def to(self, device: torch.device) -> Relevance:
        """The same on another device."""
        excluded_ids_BE = None if self.excluded_ids_BE is None else self.excluded_ids_BE.to(device)
        return Relevance(self.positives_B.to(device), self.passage_ids_N.to(device), excluded_ids_BE)


@dataclass(frozen=True)
class TargetVectors:
    """queries_BK, passages_NK: float32, of length 1, what this rank's vectors are to become.

    passages_weigh: the share of the loss that is all passages', between 0 and 1.
    """

    queries_BK: torch.Tensor
    passages_NK: torch.Tensor
    passages_weigh: float

    def to(self, device: torch.device) -> TargetVectors:
        """The same on another device."""
        return replace(self, queries_BK=self.queries_BK.to(device), passages_NK=self.passages_NK.to(device))


@dataclass(frozen=True)
class EmbeddedBatch:
    """queries_BK, passages_NK: this rank's embeddings, float32, without graph, not normalised.

    teacher: on the embeddings' device, the vectors of this rank's queries and passages, and the sparse logits of its
    queries for all ranks' passages. Of this rank, because a vector is then read from storage once, by one rank, and
    terms gather one side of them: W ranks that each read the whole batch's would move W (B + N) vectors, this
    B + W N or W B + N.
    targets: on the embeddings' device, of this rank.
    """

    queries_BK: torch.Tensor
    passages_NK: torch.Tensor
    relevance: Relevance
    teacher: TeacherScores | None = None
    targets: TargetVectors | None = None


@dataclass(frozen=True)
class TermResult:
    """Gradients for this rank's embeddings, and what the log holds; the caller may change the gradients in place.

    loss, figures and distributions are of the global batch and the same on every rank; the gradients are those of the
    global loss. figures: numbers for a line of metrics.jsonl, under names that no other term has. distributions: many
    values each, logged as histograms.
    """

    loss: float
    query_gradient_BK: torch.Tensor
    passage_gradient_NK: torch.Tensor
    figures: dict[str, Any] = field(default_factory=dict)
    distributions: dict[str, list[float]] = field(default_factory=dict)


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Figures (or distributions) of one step together. Raises ValueError where two have the same name."""
    names = [name for part in parts for name in part]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two figures of a training step are named {', '.join(sorted(repeated))}: rename a term's")
    return {name: value for part in parts for name, value in part.items()}


class Term(Protocol):
    """One summand of the objective; every rank calls it once a step."""

    def __call__(self, batch: EmbeddedBatch) -> TermResult: ...

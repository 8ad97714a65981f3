"""What a loss is asked, for every backend: Matryoshka dims and weights; which columns count, or what a teacher says.

Shapes: B queries, N passages, M dims, R rows of a chunk, E excluded documents of a query, T components of a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from drama_dist.kernels.info_nce.teacher import TeacherScores


@dataclass(frozen=True)
class ColumnPart:
    """The passages of this call are a part of the columns; the others are somewhere else, with the same queries.

    positive_ids: int64 (B), the ids of all queries' positives, wherever they are; None for soft targets. most_columns:
    of the largest part, so that all parts visit the same chunks of rows. merge: of the statistics of a chunk's rows
    over this part it gives those over all parts (see `ContrastRows.merged` and `TeacherRows.merged`); called once a
    chunk.
    """

    positive_ids: torch.Tensor | None
    most_columns: int
    merge: Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of a loss. dims ascend, weights go with them. rounded: see `info_nce`."""

    loss: ClassVar[str]  # the public function's name

    dims: tuple[int, ...]
    weights: tuple[float, ...]
    part: ColumnPart | None = None
    rounded: bool = False

    @property
    def teacher_components(self) -> int | None:
        """Of a teacher's vectors; None without a teacher."""
        return None

    def most_columns(self, columns: int) -> int:
        """Of the largest part of the columns; the call's own `columns`, where these are all."""
        return columns if self.part is None else self.part.most_columns


@dataclass(frozen=True, kw_only=True)
class Distillation(Problem):
    """One call of `soft_targets`."""

    loss: ClassVar[str] = "soft_targets"

    teacher: TeacherScores

    @property
    def teacher_components(self) -> int | None:
        return self.teacher.queries_BT.shape[1]


@dataclass(frozen=True, kw_only=True)
class Contrast(Problem):
    """One call of `info_nce`; see there."""

    loss: ClassVar[str] = "info_nce"

    positives_B: torch.Tensor
    passage_ids_N: torch.Tensor | None = None
    excluded_ids_BE: torch.Tensor | None = None

    def positives_here(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of a chunk, columns) of the positives that are among the passages."""
        positives_R = self.positives_B[rows]
        if self.part is None:
            return torch.arange(len(positives_R), device=positives_R.device), positives_R
        here = torch.nonzero(positives_R >= 0).squeeze(1)
        return here, positives_R[here]

    def positive_ids(self) -> torch.Tensor | None:
        """Ids of the queries' positives, B; None without ids."""
        if self.part is not None:
            return self.part.positive_ids
        return None if self.passage_ids_N is None else self.passage_ids_N[self.positives_B]

    def masked(self, rows: slice) -> torch.Tensor | None:
        """R × N, true where a column is no negative of its row; None where every column counts.

        The row's positive is never masked here.
        """
        positive_ids_B = self.positive_ids()
        if self.passage_ids_N is None or positive_ids_B is None:
            return None
        masked_RN = self.passage_ids_N == positive_ids_B[rows, None]
        if self.excluded_ids_BE is not None:
            for ids_R in self.excluded_ids_BE[rows].unbind(1):
                masked_RN |= self.passage_ids_N == ids_R[:, None]
        masked_RN[self.positives_here(rows)] = False
        return masked_RN

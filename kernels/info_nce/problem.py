"""What the loss is asked: positives, Matryoshka dims, weights and which columns count, for every backend.

Shapes: B queries, N passages, M dims, R rows of a chunk, E excluded documents of a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ColumnPart:
    """The passages of this call are a part of the columns; the others are somewhere else, with the same queries.

    positive_ids: int64 (B), the ids of all queries' positives, wherever they are. most_columns: of the largest part,
    so that all parts visit the same chunks of rows. merge: of a chunk's scores of positives (M × R, 0 where they are
    elsewhere), logsumexps over negatives (M × R) and best negatives (R) gives the sum, the logsumexp and the maximum
    over all parts; called once a chunk.
    """

    positive_ids: torch.Tensor
    most_columns: int
    merge: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Problem:
    """One call of the loss. dims ascend, weights go with them; see `info_nce` for the rest."""

    positives_B: torch.Tensor
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    passage_ids_N: torch.Tensor | None = None
    excluded_ids_BE: torch.Tensor | None = None
    part: ColumnPart | None = None

    def most_columns(self, columns: int) -> int:
        """Of the largest part of the columns; the call's own `columns`, where these are all."""
        return columns if self.part is None else self.part.most_columns

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

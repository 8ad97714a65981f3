"""What the loss is asked: positives, Matryoshka dims, weights and which columns count, for every backend.

Shapes: B queries, N passages, M dims, R rows of a chunk, E excluded documents of a query, C own passages
of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize


@dataclass(frozen=True)
class TeacherMargin:
    """Leave out columns that a teacher scores above its score of the positive, less a margin.

    queries: B × Kt and passages: N × Kt, the teacher's vectors, any Kt; their cosines are compared
    (GISTEmbed, Solatorio 2024, section 3; a margin as in NV-Retriever, Moreira et al. 2024, section 3.2).
    """

    queries: torch.Tensor
    passages: torch.Tensor
    margin: float = 0.0


@dataclass(frozen=True)
class Distillation:
    """Add the divergence from a teacher's scores over each query's own passages.

    columns: int64 B × C, the passages' columns, -1 where a query has fewer. scores: B × C, the
    teacher's, already divided by its temperature. weight: of the divergence in the loss.
    """

    columns: torch.Tensor
    scores: torch.Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class ColumnPart:
    """The passages of this call are a part of the columns; the others are somewhere else, with the same queries.

    positive_ids: int64 (B), the ids of all queries' positives, wherever they are. most_columns: of the largest part,
    so that all parts visit the same chunks of rows. merge: of a chunk's own_MR (0 where the positive is elsewhere),
    rivals_MR and best_R gives the sum, the logsumexp and the maximum over all parts; called once a chunk.
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
    teacher: TeacherMargin | None = None
    hardness: float = 0.0
    symmetric: float = 0.0
    part: ColumnPart | None = None

    def most_columns(self, own: int) -> int:
        """Of the largest part of the columns; `own`, where these are all."""
        return own if self.part is None else self.part.most_columns

    def own_places(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of a chunk, columns) of the positives that are here."""
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

    def masked(self, rows: slice, columns: int) -> torch.Tensor | None:
        """R × N, true where a column is no negative of its row; None where every column counts.

        The row's own positive is never masked here.
        """
        parts = [*self._same_document(rows), *self._excluded(rows), *self.above_margin(rows)]
        if not parts:
            return None
        masked_RN = parts[0]
        for part in parts[1:]:
            masked_RN |= part
        masked_RN[self.own_places(rows)] = False
        return masked_RN

    def _same_document(self, rows: slice) -> Sequence[torch.Tensor]:
        positive_ids_B = self.positive_ids()
        if self.passage_ids_N is None or positive_ids_B is None:
            return ()
        return (self.passage_ids_N.unsqueeze(0) == positive_ids_B[rows].unsqueeze(1),)

    def _excluded(self, rows: slice) -> Sequence[torch.Tensor]:
        if self.excluded_ids_BE is None or self.passage_ids_N is None:
            return ()
        columns = self.excluded_ids_BE[rows].unbind(1)
        return tuple(self.passage_ids_N.unsqueeze(0) == ids_R.unsqueeze(1) for ids_R in columns)

    def above_margin(self, rows: slice) -> Sequence[torch.Tensor]:
        """R × N, true where a teacher's score is above the row's limit; nothing without a teacher."""
        if self.teacher is None:
            return ()
        query = normalize(self.teacher.queries[rows].float(), dim=1)
        passage = normalize(self.teacher.passages.float(), dim=1)
        scores_RN = query @ passage.T
        limit_R = scores_RN.gather(1, self.positives_B[rows].unsqueeze(1)) - self.teacher.margin
        return (scores_RN > limit_R,)

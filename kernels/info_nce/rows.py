"""Statistics of a chunk's rows over their columns, of each loss: losses, and what its gradients need, follow from them.

Covers merging them over parts of the columns. Which rows, and how scores come about, is the tiles' (see tiles.py).
Shapes: M dims, R rows of a chunk, P parts of the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn.functional import softplus

MASKED = -1e30  # finite: a masked score times a zero gradient must stay zero
_EXACT = 50.0  # softplus(x) is x beyond it; PyTorch's own 20 errs by 2e-9
Merge = Callable[..., tuple[torch.Tensor, ...]]


class Rows(Protocol):
    """Statistics of one loss."""

    def merged(self, merge: Merge) -> Rows:
        """Over all parts of the columns, from those over this part; merge: see ColumnPart."""
        ...

    def shifts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What Tiles.add_gradients takes."""
        ...

    def losses_MR(self) -> torch.Tensor:
        """The loss of each row in each dim."""
        ...

    def figures(self) -> tuple[torch.Tensor, ...]:
        """Of these rows, for the log; those of all chunks are joined end to end."""
        ...


@dataclass(frozen=True)
class ContrastRows:
    """InfoNCE. positive_MR: scores of the positives, 0 where they are elsewhere; negatives_MR: logsumexp over the
    negatives; best_negative_R: the best negative's score at the largest dim.

    A row without negatives has the last two near MASKED or at −inf. masked_pairs: how many (row, column) pairs were
    left out, a scalar.
    """

    positive_MR: torch.Tensor
    negatives_MR: torch.Tensor
    best_negative_R: torch.Tensor
    masked_pairs: torch.Tensor

    def merged(self, merge: Merge) -> ContrastRows:
        """merge takes and gives positives (of which it makes the sum), negatives (logsumexp), and best (maximum)."""
        positive_MR, negatives_MR, best_R = merge(self.positive_MR, self.negatives_MR, self.best_negative_R)
        return replace(self, positive_MR=positive_MR, negatives_MR=negatives_MR, best_negative_R=best_R)

    def shifts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """shift_MR and missed_MR: dL/dS is exp(S − shift) of a negative, and −missed of the positive."""
        return (
            torch.logaddexp(self.negatives_MR, self.positive_MR),
            torch.sigmoid(self.negatives_MR - self.positive_MR),
        )

    def losses_MR(self) -> torch.Tensor:
        return softplus(self.negatives_MR - self.positive_MR, threshold=_EXACT)

    def figures(self) -> tuple[torch.Tensor, ...]:
        """Margins, R; masked pairs, 1."""
        best_R = self.best_negative_R
        margins_R = torch.where(best_R > MASKED / 10, self.positive_MR[-1] - best_R, torch.nan)
        return margins_R, self.masked_pairs.unsqueeze(0)


@dataclass(frozen=True)
class TeacherRows:
    """Soft targets t. student_MR and teacher_R: logsumexp of scores and of the teacher's logits; expected_MR: Σ t · S;
    entropy_R: −Σ t · log t.
    """

    student_MR: torch.Tensor
    teacher_R: torch.Tensor
    expected_MR: torch.Tensor
    entropy_R: torch.Tensor

    @staticmethod
    def of_parts(
        student_MR: torch.Tensor,
        maxima_PR: torch.Tensor,
        sums_PR: torch.Tensor,
        terms_PR: torch.Tensor,
        expected_PMR: torch.Tensor,
    ) -> TeacherRows:
        """From sums over some columns each: with x = logit − maximum (MASKED where there is no column) and e = exp(x),
        of e, of e · x, and of e · S.
        """
        below_PR = maxima_PR - maxima_PR.amax(0)
        share_PR = below_PR.exp()
        sum_R = (share_PR * sums_PR).sum(0)
        terms_R = (share_PR * (terms_PR + below_PR * sums_PR)).sum(0)
        return TeacherRows(
            student_MR,
            maxima_PR.amax(0) + sum_R.log(),
            (share_PR.unsqueeze(1) * expected_PMR).sum(0) / sum_R,
            sum_R.log() - terms_R / sum_R,
        )

    def merged(self, merge: Merge) -> TeacherRows:
        """merge takes and gives all four, in this order.

        Over parts with teacher_R = l and their logsumexp L, a part's share of the targets is exp(l − L): expected_MR
        is the mean by these shares, and entropy_R that of entropy + L − l.
        """
        return TeacherRows(*merge(self.student_MR, self.teacher_R, self.expected_MR, self.entropy_R))

    def shifts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """student_MR and teacher_R: dL/dS is exp(S − student) − exp(logit − teacher)."""
        return self.student_MR, self.teacher_R

    def losses_MR(self) -> torch.Tensor:
        """KL(t ‖ p) = Σ t · log t − Σ t · log p."""
        return self.student_MR - self.expected_MR - self.entropy_R

    def figures(self) -> tuple[torch.Tensor, ...]:
        """The targets' entropies, R."""
        return (self.entropy_R,)

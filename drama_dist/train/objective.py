"""The objective: a weighted sum of terms, and which terms the settings ask for.

Terms are defined in term.py; each has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.info_nce_term import InfoNCETerm
from drama_dist.train.regression_term import RegressionTerm
from drama_dist.train.soft_target_term import SoftTargetTerm
from drama_dist.train.term import EmbeddedBatch, Term, TermResult, joined

WeightedTerm = tuple[float, Term]


def objective_terms(encoder: EncoderSettings, train: TrainSettings, rounded: bool = False) -> list[WeightedTerm]:
    """The terms of a training run, each with its weight in the sum. rounded: see `info_nce`."""
    terms: list[WeightedTerm] = [
        (train.info_nce_weight, InfoNCETerm(encoder, train, rounded)),
        (train.soft_target_weight, SoftTargetTerm(encoder, train, rounded)),
        (train.regression_weight, RegressionTerm(encoder, train)),
    ]
    return [(weight, term) for weight, term in terms if weight]


class Objective:
    """The sum of weight · term; itself a Term, with the figures of all of them."""

    def __init__(self, terms: Sequence[WeightedTerm]):
        self.terms = terms

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        return reduce(_added, (_scaled(weight, term(batch)) for weight, term in self.terms))


def _scaled(weight: float, result: TermResult) -> TermResult:
    result.query_gradient_BK.mul_(weight)
    result.passage_gradient_NK.mul_(weight)
    return replace(result, loss=weight * result.loss)


def _added(total: TermResult, result: TermResult) -> TermResult:
    return TermResult(
        total.loss + result.loss,
        total.query_gradient_BK.add_(result.query_gradient_BK),
        total.passage_gradient_NK.add_(result.passage_gradient_NK),
        joined(total.figures, result.figures),
        joined(total.distributions, result.distributions),
    )

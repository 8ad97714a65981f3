"""The objective is the weighted sum of its terms: loss, gradients, and what goes into the log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import load
from drama_dist.kernels import Backend, InfoNCE, info_nce
from drama_dist.kernels.info_nce.cpu import CPUTiles
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train import info_nce_term, partition
from drama_dist.train.info_nce_term import InfoNCETerm
from drama_dist.train.objective import Objective, objective_terms
from drama_dist.train.step import TrainingStep
from drama_dist.train.term import EmbeddedBatch, Relevance, TermResult


@dataclass
class SumOfSquares:
    """A term whose gradients are known: factor · squares of all components."""

    name: str
    factor: float

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        squares = batch.queries_BK.square().sum() + batch.passages_NK.square().sum()
        gradients = (2 * self.factor * embeddings for embeddings in (batch.queries_BK, batch.passages_NK))
        return TermResult(self.factor * float(squares), *gradients, {self.name: self.factor}, {f"{self.name}s": [1.0]})


def batch(queries: int = 3, passages: int = 5) -> EmbeddedBatch:
    generator = torch.Generator().manual_seed(0)
    queries_BK, passages_NK = (torch.randn(rows, 8, generator=generator) for rows in (queries, passages))
    return EmbeddedBatch(queries_BK, passages_NK, Relevance(torch.arange(queries), torch.arange(passages)))


def test_terms_add_up_by_their_weights() -> None:
    first, second, embedded = SumOfSquares("first", 1.0), SumOfSquares("second", 3.0), batch()
    total = Objective([(0.5, first), (2.0, second)])(embedded)
    plain = SumOfSquares("plain", 0.5 * 1.0 + 2.0 * 3.0)(embedded)
    assert abs(total.loss / plain.loss - 1) < 1e-6
    torch.testing.assert_close(total.query_gradient_BK, plain.query_gradient_BK)
    torch.testing.assert_close(total.passage_gradient_NK, plain.passage_gradient_NK)
    assert total.figures == {"first": 1.0, "second": 3.0} and set(total.distributions) == {"firsts", "seconds"}


def test_two_terms_figures_of_one_name_are_an_error() -> None:
    same = [(1.0, SumOfSquares("squares", 1.0)), (1.0, SumOfSquares("squares", 2.0))]
    with pytest.raises(ValueError, match="two figures of a training step are named squares"):
        Objective(same)(batch())


@pytest.mark.parametrize("other", ["eager", "cpu"])
def test_ranks_that_merge_chunks_agree_on_a_backend(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk is a collective, and backends have different chunks; this rank merges with one that has `other`."""
    monkeypatch.setattr(ranks, "on_every_rank", lambda value: [value, int(other == "eager")])
    monkeypatch.setattr(partition, "select_backend", lambda device, dtype: Backend("cpu", CPUTiles))
    assert InfoNCETerm(EncoderSettings(dims=[8, 4]), TrainSettings())._agreed_backend == other


def test_another_term_leaves_the_figures_of_info_nce() -> None:
    terms = objective_terms(EncoderSettings(dims=[8, 4]), TrainSettings())
    alone, both = Objective(terms)(batch()), Objective([*terms, (0.1, SumOfSquares("squares", 1.0))])(batch())
    assert both.figures == alone.figures | {"squares": 1.0} and both.loss > alone.loss
    assert not torch.equal(both.query_gradient_BK, alone.query_gradient_BK)


@pytest.mark.parametrize(("dtype", "rounded"), [("bfloat16", True), ("float32", False)])
def test_training_in_bfloat16_lets_the_losses_round(
    dtype: Literal["bfloat16", "float32"], rounded: bool, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the losses are called with in a step."""
    seen = []

    def loss(*sides: torch.Tensor, **options: Any) -> InfoNCE:
        seen.append(options["rounded"])
        return info_nce(*sides, **options)

    monkeypatch.setattr(info_nce_term, "info_nce", loss)
    step = TrainingStep(load(llm), TrainSettings(dtype=dtype, temperature=0.1, activation_budget=0))
    relevance = Relevance(torch.arange(2), torch.arange(2))
    step.of_tokens([[0, 5, 1], [0, 6, 1]], [[0, 7, 8, 1], [0, 9, 1]], relevance, learning_rate=0.0)
    assert seen == [rounded]

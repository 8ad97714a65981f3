"""The regression's term: distances, gradients and figures against the formula; targets missing; dims and weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.regression_term import RegressionTerm
from drama_dist.train.term import EmbeddedBatch, Relevance, TargetVectors, TermResult

QUERIES, PASSAGES, K, DIMS, WEIGHTS, SHARE = 5, 7, 13, [13, 4], [0.25, 0.75], 0.3


def batch(scale: float = 3.0) -> EmbeddedBatch:
    generator = torch.Generator().manual_seed(2)
    queries, passages = (scale * torch.randn(count, K, generator=generator) for count in (QUERIES, PASSAGES))
    targets = (normalize(torch.randn(count, K, generator=generator)) for count in (QUERIES, PASSAGES))
    return EmbeddedBatch(
        queries,
        passages,
        Relevance(torch.arange(QUERIES), torch.arange(PASSAGES)),
        targets=TargetVectors(*targets, SHARE),
    )


def term(given: EmbeddedBatch) -> TermResult:
    return RegressionTerm(EncoderSettings(dims=DIMS), TrainSettings(dim_weights=WEIGHTS))(given)


def test_loss_and_gradients_are_those_of_the_formula() -> None:
    given = batch()
    assert given.targets is not None
    leaves = [side.double().requires_grad_() for side in (given.queries_BK, given.passages_NK)]
    vectors = torch.cat(leaves)
    targets = torch.cat([given.targets.queries_BK, given.targets.passages_NK]).double()
    cosines = [torch.nn.functional.cosine_similarity(vectors[:, :dim], targets[:, :dim]) for dim in DIMS]
    distances = [(2 - 2 * cosine).sqrt() for cosine in cosines]
    per_dim = torch.stack([(1 - SHARE) * each[:QUERIES].mean() + SHARE * each[QUERIES:].mean() for each in distances])
    loss = (per_dim * torch.tensor(WEIGHTS)).sum()
    result = term(given)
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    assert result.figures["distance_per_dim"] == pytest.approx(dict(zip(DIMS, per_dim.tolist(), strict=True)), rel=1e-6)
    of_queries, of_passages = distances[0][:QUERIES].mean(), distances[0][QUERIES:].mean()
    assert result.figures["distance_of_queries"] == pytest.approx(float(of_queries), rel=1e-6)
    assert result.figures["distance_of_passages"] == pytest.approx(float(of_passages), rel=1e-6)
    alike = sum(weight * float(each.mean()) for weight, each in zip(WEIGHTS, distances, strict=True))
    assert result.loss != pytest.approx(alike, rel=1e-4)
    found = result.query_gradient_BK, result.passage_gradient_NK
    for gradient, expected in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_vector_that_is_its_target_has_no_gradient() -> None:
    given = batch()
    assert given.targets is not None
    there = EmbeddedBatch(
        2 * given.targets.queries_BK, given.passages_NK, given.relevance, targets=given.targets
    )  # 2: their length does not matter
    result = term(there)
    assert result.figures["distance_of_queries"] == pytest.approx(0, abs=1e-6)
    assert result.query_gradient_BK.isfinite().all()
    assert float(result.passage_gradient_NK.abs().max()) > 1e-3


def test_a_text_without_a_target_pulls_nowhere() -> None:
    given = batch()
    assert given.targets is not None
    given.targets.queries_BK[2] = 0
    result = term(given)
    assert float(result.query_gradient_BK[2].abs().max()) < 1e-8 < 1e-4 < float(result.query_gradient_BK[1].abs().max())


def test_a_batch_without_targets_is_refused() -> None:
    given = batch()
    with pytest.raises(ValueError, match="no targets"):
        term(EmbeddedBatch(given.queries_BK, given.passages_NK, given.relevance))

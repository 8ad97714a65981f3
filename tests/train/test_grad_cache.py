"""The gradient cache: kept, recomputed or in one piece, the gradients are those of the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.packing import pack
from drama_dist.kernels import info_nce
from drama_dist.settings import EncoderSettings
from drama_dist.train.grad_cache import GradCache

TEXTS = [
    "a row of flour",
    "the river",
    "x",
    "engine oil and a valve and a spark " * 3,
    "basis pivot",
    "rain on the lake",
]


class PlainEngine:
    """Accumulates gradients as autograd does, and counts what it was told."""

    def __init__(self) -> None:
        self.lasts: list[bool] = []

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.lasts.append(last)
        loss.backward()


@pytest.fixture
def encoder(llm: Path) -> Encoder:
    encoder = load(llm, contract=EncoderSettings(max_query_tokens=16, max_passage_tokens=48, dims=[48, 16]))
    return encoder.train()


def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
    return info_nce(embeddings[:2], embeddings[2:], torch.tensor([1, 3]), temperature=0.1, dims=[48, 16]).loss


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}


def plain(encoder: Encoder, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    loss_of(encoder(pack(sequences))).backward()
    return gradients(encoder)


@pytest.mark.parametrize(
    ("chunk", "kept", "share"),
    [(10**6, 10**6, 0.0), (10**6, 0, 1.0), (16, 10**6, 0.0), (16, 0, 1.0), (16, 20, None), (1, 25, None)],
    ids=["one chunk kept", "one chunk twice", "chunks kept", "chunks twice", "some kept", "a text a chunk"],
)
def test_gradients_equal_those_of_the_whole_batch(encoder: Encoder, chunk: int, kept: int, share: float | None) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    encoder.zero_grad()
    engine = PlainEngine()
    cache = GradCache(encoder, engine, chunk, kept)  # type: ignore[arg-type]
    embeddings = cache.encode(sequences).requires_grad_()
    (upstream,) = torch.autograd.grad(loss_of(embeddings), embeddings)
    repeated = cache.backward(upstream)
    assert share is None or repeated == share
    assert share is not None or 0 < repeated < 1
    assert engine.lasts == [False] * (len(engine.lasts) - 1) + [True]
    found = gradients(encoder)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) <= 1e-5 * scale, name


def test_the_comparison_notices_a_missing_chunk(encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    without = plain(encoder, [*sequences[:-1], sequences[0]])
    name = "backbone.layers.0.mlp.up_proj.weight"
    assert float((without[name] - expected[name]).abs().max()) > 1e-3 * float(expected[name].abs().max())


def test_embeddings_come_in_the_order_given(encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    cache = GradCache(encoder, PlainEngine(), 16, 20)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(cache.encode(sequences), encoder(pack(sequences)), rtol=1e-5, atol=1e-6)

"""The gradient cache: kept, recomputed or in one piece, the gradients are those of the whole batch."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.packing import Packed, filled, pack
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
    """Accumulates gradients as autograd does, and counts the calls."""

    lockstep = False

    def __init__(self) -> None:
        self.calls = 0

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        assert last
        self.calls += 1
        loss.backward()


CONTRACT = EncoderSettings(max_query_tokens=16, max_passage_tokens=48, dims=[48, 16])


@pytest.fixture(params=["llm", "fusing_llm"])
def folder(request: pytest.FixtureRequest) -> Path:
    model: Path = request.getfixturevalue(request.param)
    return model


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return load(folder, contract=CONTRACT).train()


def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
    return info_nce(embeddings[:2], embeddings[2:], torch.tensor([1, 3]), temperature=0.1, dims=[48, 16]).loss


def upstream_of(embeddings: torch.Tensor) -> torch.Tensor:
    leaf = embeddings.detach().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0]


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}


def plain(encoder: Encoder, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    loss_of(encoder(pack(sequences))).backward()
    return gradients(encoder)


ALL, NOTHING = 1e12, 0.0


@pytest.mark.parametrize("layers", [False, True], ids=["", "layers checkpointed"])
@pytest.mark.parametrize(
    ("chunk", "budget", "share"),
    [(10**6, ALL, 0.0), (10**6, NOTHING, 1.0), (16, ALL, 0.0), (16, NOTHING, 1.0), (16, None, 0.0), (16, "some", None)],
    ids=["one chunk kept", "one chunk twice", "chunks kept", "chunks twice", "measured", "some kept"],
)
def test_gradients_equal_those_of_the_whole_batch(
    encoder: Encoder, chunk: int, budget: float | str | None, share: float | None, layers: bool
) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    if layers:
        encoder.checkpoint_layers()
    engine = PlainEngine()
    cache = GradCache(encoder, engine, chunk, None)  # type: ignore[arg-type]
    if budget == "some":
        cache.encode(sequences)
        budget = 60 * cache._bytes_per_token
    cache.activation_budget = budget  # type: ignore[assignment]
    encoder.zero_grad()
    encoded = cache.encode(sequences)
    cache.backward(upstream_of(encoded.embeddings_NK))
    assert encoded.recomputed == share if share is not None else 0 < encoded.recomputed < 1
    assert engine.calls == 1
    assert gradients(encoder).keys() == expected.keys()
    for name, gradient in gradients(encoder).items():
        scale = float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("budget", [ALL, NOTHING])
def test_what_fills_a_chunk_has_no_part_in_the_gradients(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    """As in bfloat16, where only float32 shows that they are the same."""
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    made: list[int] = []

    def pack_filled(texts: list[list[int]]) -> Packed:
        made.append(len(filled(texts)) - len(texts))
        return pack(filled(texts))

    monkeypatch.setattr(encoder, "pack", pack_filled)
    cache = GradCache(encoder, PlainEngine(), 16, budget)  # type: ignore[arg-type]
    encoder.zero_grad()
    encoded = cache.encode(sequences)
    cache.backward(upstream_of(encoded.embeddings_NK))
    assert any(made) and encoded.recomputed == (budget == NOTHING)
    for name, gradient in gradients(encoder).items():
        assert float((gradient - expected[name]).abs().max()) <= 1e-5 * float(expected[name].abs().max()), name


def test_packed_and_padded_texts_have_the_same_gradients(encoder: Encoder) -> None:
    """Each text alone is what padding with a mask comes to."""
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    encoder.zero_grad()
    loss_of(torch.cat([encoder(pack([sequence])) for sequence in sequences])).backward()
    for name, gradient in gradients(encoder).items():
        assert float((gradient - expected[name]).abs().max()) <= 1e-5 * float(expected[name].abs().max()), name


def test_three_steps_end_in_the_same_weights(folder: Path) -> None:
    """Kept, encoded twice, or with checkpointed layers."""
    ends = []
    for budget, layers in ((ALL, False), (NOTHING, False), (NOTHING, True)):
        encoder = load(folder, contract=CONTRACT).train()
        if layers:
            encoder.checkpoint_layers()
        optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        cache = GradCache(encoder, PlainEngine(), 16, budget)  # type: ignore[arg-type]
        for _ in range(3):
            encoded = cache.encode(encoder.tokenize_passages(TEXTS))
            optimiser.zero_grad()
            cache.backward(upstream_of(encoded.embeddings_NK))
            optimiser.step()
        ends.append(torch.cat([weight.detach().flatten() for weight in encoder.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-5, atol=1e-7)


def test_dropout_is_the_same_when_a_chunk_is_encoded_again(encoder: Encoder) -> None:
    """Gradients with dropout equal those of a kept graph from the same random state."""
    encoder.backbone.config.attention_dropout = 0.5
    for layer in encoder.backbone.layers:
        layer.self_attn.attention_dropout = 0.5
    sequences, both = encoder.tokenize_passages(TEXTS), []
    upstream = torch.randn(len(sequences), encoder.hidden_size, generator=torch.Generator().manual_seed(1))
    for budget in (ALL, NOTHING):
        torch.manual_seed(4)
        encoder.zero_grad()
        cache = GradCache(encoder, PlainEngine(), 10**6, budget)  # type: ignore[arg-type]
        cache._bytes_per_token = 1.0
        cache.encode(sequences)
        torch.rand(7)  # the random state moves on
        cache.backward(upstream)
        both.append(gradients(encoder))
    for name, gradient in both[0].items():
        torch.testing.assert_close(both[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert not torch.equal(encoder(pack(sequences)), encoder(pack(sequences)))  # there is dropout


def test_what_is_measured_is_what_autograd_keeps(encoder: Encoder) -> None:
    """Bytes grow with tokens, and checkpointed layers keep a fraction."""
    sequences = [[3] * 40, [4] * 40]
    cache = GradCache(encoder, PlainEngine(), 40, ALL)  # type: ignore[arg-type]
    cache.encode(sequences)
    whole = cache._bytes_per_token
    encoder.checkpoint_layers()
    cache._bytes_per_token = math.inf
    cache.encode(sequences)
    assert 4 * 48 * 4 < cache._bytes_per_token < whole / 3  # at least an input of every layer


def test_weights_that_zero_3_gathers_are_no_part_of_the_graph(llm: Path) -> None:
    plain, split = (load(llm, contract=CONTRACT).train() for _ in range(2))
    sequences = plain.tokenize_passages(TEXTS)
    engines = (PlainEngine(), Engine(split, OptimiserSettings("float32", 3, 0.01, 1.0)))
    held = []
    for encoder, engine in zip((plain, split), engines, strict=True):
        cache = GradCache(encoder, engine, 16, ALL)  # type: ignore[arg-type]
        cache.encode(sequences)
        held.append(cache.held_bytes)
    assert held[1] == held[0]


def test_the_comparison_notices_a_missing_chunk(encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    expected = plain(encoder, sequences)
    without = plain(encoder, [*sequences[:-1], sequences[0]])
    name = "backbone.layers.0.mlp.up_proj.weight"
    assert float((without[name] - expected[name]).abs().max()) > 1e-3 * float(expected[name].abs().max())


def test_embeddings_come_in_the_order_given(encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages(TEXTS)
    cache = GradCache(encoder, PlainEngine(), 16, None)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(
            cache.encode(sequences).embeddings_NK, encoder(pack(sequences)), rtol=1e-5, atol=1e-6
        )


def test_equal_texts_are_encoded_once(encoder: Encoder) -> None:
    sequences = encoder.tokenize_passages([*TEXTS, TEXTS[3], TEXTS[0]])
    upstream = torch.randn(len(sequences), encoder.hidden_size, generator=torch.Generator().manual_seed(1))
    (encoder(pack(sequences)) * upstream).sum().backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    cache = GradCache(encoder, PlainEngine(), 16, NOTHING)  # type: ignore[arg-type]
    encoded = cache.encode(sequences)
    assert encoded.lengths == [len(sequence) for sequence in sequences[: len(TEXTS)]]
    assert torch.equal(encoded.embeddings_NK[len(TEXTS)], encoded.embeddings_NK[3])
    cache.backward(upstream)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_kept_graphs_stay_within_the_budget(encoder: Encoder) -> None:
    """By what autograd really holds for each chunk, and with longer texts than those of the first step."""
    sequences = encoder.tokenize_passages([text + " and more" * index for index, text in enumerate(TEXTS * 3)])
    cache = GradCache(encoder, PlainEngine(), 48, ALL)  # type: ignore[arg-type]
    cache.encode(sequences)
    whole = cache.held_bytes
    cache = GradCache(encoder, PlainEngine(), 48, 0.6 * whole)  # type: ignore[arg-type]
    cache.encode(sequences[:3])
    for _ in range(2):
        share = cache.encode(sequences).recomputed
        assert 0 < share < 1 and 0.3 * 0.6 * whole < cache.held_bytes <= 0.6 * whole


def test_graphs_that_nobody_takes_back_are_freed(encoder: Encoder) -> None:
    cache = GradCache(encoder, PlainEngine(), 48, ALL)  # type: ignore[arg-type]
    sequences = encoder.tokenize_passages(TEXTS)
    tensors = []
    for _ in range(4):
        cache.encode(sequences)
        gc.collect()
        tensors.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert tensors[-1] == tensors[1]

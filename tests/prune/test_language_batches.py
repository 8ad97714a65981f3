"""Language-weighted batches: what is drawn, the losses that count, and how the shares follow them."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from drama_dist.corpus.collection import open_collection
from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune import language_batches, language_loss
from drama_dist.prune.healing import heal
from drama_dist.prune.language_batches import LanguageBatches, updated
from drama_dist.prune.language_loss import Chunk, token_losses
from drama_dist.prune.source import calibration, load_source
from drama_dist.run import interrupts
from drama_dist.run.folder import open_stage
from drama_dist.run.runner import make
from drama_dist.settings import Settings


def texts(count: int, seed: int = 1, shortest: int = 2) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(500) for _ in range(chance.randint(shortest, 20))] for _ in range(count)]


def drawn_evenly(sequences: list[list[int]], tokens: int, share: float, seed: str) -> list[tuple[list, list[int]]]:
    """A step's chunks of some 64 tokens: texts of one language, without replacement."""
    generator = random.Random(seed)
    chunks: list[list[list[int]]] = [[]]
    taken = 0
    for index in generator.sample(range(len(sequences)), min(len(sequences), tokens)):
        if taken >= tokens:
            break
        if sum(map(len, chunks[-1])) >= 64:
            chunks.append([])
        chunks[-1].append(sequences[index])
        taken += len(sequences[index])
    found = []
    for chunk in chunks:
        ends = np.cumsum([len(ids) for ids in chunk])
        positions = sorted(set(range(ends[-1])) - set(ends - 1))
        found.append((chunk, sorted(generator.sample(positions, round(share * len(positions))))))
    return found


@pytest.mark.parametrize("languages", [[""] * 90, ["en"] * 90, ["en"] * 60 + ["none"] * 30])
def test_one_language_is_drawn_evenly(languages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_loss, "_CHUNK_TOKENS", 64)
    sequences = [ids[:1] if language == "none" else ids for ids, language in zip(texts(90), languages, strict=True)]
    batches = LanguageBatches(sequences, languages)
    for seed in ("1 heal 0", "1 heal 1"):
        found = [(chunk.sequences, chunk.scored) for chunk in batches.chunks(300, 0.5, seed)]
        assert len(found) > 3 and found == drawn_evenly(sequences, 300, 0.5, seed)
    batches.measure(None)  # type: ignore[arg-type]  # which would fail if it asked a model
    assert batches.finish_step(0) == {}
    several = LanguageBatches(sequences, ["en", "de"] * 45)
    assert [(chunk.sequences, chunk.scored) for chunk in several.chunks(300, 0.5, "1 heal 0")] != found


def test_texts_are_drawn_by_their_languages_shares() -> None:
    languages = ["en"] * 60 + ["de"] * 30 + ["fr"] * 10
    batches = LanguageBatches(texts(100), languages)
    assert batches.shares == {"de": 0.3, "en": 0.6, "fr": 0.1}
    batches.shares = {"de": 0.5, "en": 0.3, "fr": 0.2}
    counts: Counter[str] = Counter()
    for step in range(200):
        chunks = batches.chunks(10**9, 0.5, f"{step}")
        assert chunks == batches.chunks(10**9, 0.5, f"{step}")
        of_step = Counter(name for chunk in chunks for name in chunk.languages)
        assert sum(of_step.values()) == 100
        distinct = Counter((name, *ids) for chunk in chunks for name, ids in of_chunk(chunk))
        for name, all_of_it in Counter(languages).items():  # none comes twice before all have come once
            times = [count for text, count in distinct.items() if text[0] == name]
            assert max(times) == math.ceil(of_step[name] / all_of_it)
        counts += of_step
    assert {name: count / 20000 for name, count in counts.items()} == pytest.approx(batches.shares, abs=0.015)


def of_chunk(chunk: Chunk) -> list[tuple[str, list[int]]]:
    return list(zip(chunk.languages, chunk.sequences, strict=True))


def test_the_update_is_that_of_the_paper() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    losses, reference = {"a": 3.0, "b": 2.9, "c": 1.0}, {"a": 2.5, "b": 2.0, "c": 1.5}
    grown = np.array([0.5, 0.3, 0.2]) * np.exp(np.maximum(np.array([3.0, 2.9, 1.0]) - [2.5, 2.0, 1.5], 0))
    none = dict.fromkeys(shares, 0.0)
    assert list(updated(shares, losses, reference, none).values()) == pytest.approx(grown / grown.sum(), rel=1e-3)
    assert updated(shares, reference, reference, none) == shares
    far = {"a": 5000.0, "b": 2.0, "c": 1.5}
    assert updated(shares, far, reference, none) == {"a": 1.0, "b": 0.0, "c": 0.0}
    bound = updated(shares, far, reference, {"a": 0.1, "b": 0.06, "c": 0.04})
    assert list(bound.values()) == pytest.approx([1 / 1.1, 0.06 / 1.1, 0.04 / 1.1], rel=1e-3)
    without = updated(shares, {"a": 3.0, "c": 1.5}, reference, none)  # no token of b was scored
    assert without["b"] == 0.3 and sum(without.values()) == pytest.approx(1, abs=2e-4)
    assert without["a"] / without["c"] == pytest.approx(2.5 * math.exp(0.5), rel=1e-3)


@pytest.fixture
def plain(llm: Path) -> LanguageModel:
    return LlamaForCausalLM.from_pretrained(llm, attn_implementation=attention.NAME).eval()


def mean_losses(model: LanguageModel, chunks: list[Chunk]) -> dict[str, float]:
    """Of each language's scored tokens, every sequence by itself."""
    eager = copy.deepcopy(model)
    eager.config._attn_implementation = "eager"
    losses: dict[str, list[float]] = {}
    for chunk in chunks:
        begin = 0
        for name, ids in of_chunk(chunk):
            scored = [position - begin for position in chunk.scored if begin <= position < begin + len(ids)]
            begin += len(ids)
            with torch.no_grad():
                scores = eager(torch.tensor([ids])).logits[0, scored].double()
            losses.setdefault(name, []).extend(
                cross_entropy(scores, torch.tensor(ids)[torch.tensor(scored, dtype=torch.int64) + 1], reduction="none")
            )
    return {name: float(sum(values) / len(values)) for name, values in losses.items() if values}


def test_losses_are_those_of_each_languages_tokens(
    plain: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language_loss, "_CHUNK_TOKENS", 64)
    monkeypatch.setattr(language_batches, "_REFERENCE_TEXTS", 4)
    monkeypatch.setattr(language_batches, "_UPDATE_EVERY", 2)
    sequences, languages = [*texts(20), [7], [8]], [*["en", "de"] * 10, "one token", "de"]
    batches = LanguageBatches(sequences, languages)
    assert batches.shares == {"de": 0.5, "en": 0.5}
    batches.measure(plain)
    every = [(index % 2, sequences[index]) for index in range(20) if index // 2 % 3 == 0]  # 4 of 10, evenly
    whole = [Chunk([ids], list(range(len(ids) - 1)), [("en", "de")[number]]) for number, ids in every]
    reference = batches.state_dict()["reference"]
    assert reference == pytest.approx(mean_losses(plain, whole), rel=1e-5)
    student = copy.deepcopy(plain)
    student.model.norm.weight.data.mul_(3)
    steps = [batches.chunks(100, 0.4, f"{step}") for step in range(2)]
    for step, chunks in enumerate(steps):
        for chunk in chunks:
            batches.count(chunk, token_losses(student, chunk), 1.0)
            batches.count(chunk, token_losses(student, chunk), 0.0)  # as a rank without a chunk of its own
        assert batches.finish_step(step) == {"language_shares": {"de": 0.5, "en": 0.5}}
    expected = updated(
        {"de": 0.5, "en": 0.5}, mean_losses(student, [*steps[0], *steps[1]]), reference, {"de": 0.1, "en": 0.1}
    )
    assert batches.shares == pytest.approx(expected, rel=2e-3) and batches.shares["de"] != 0.5
    assert not any(map(any, batches.state_dict()["sums"]))  # the next update begins from nothing


@pytest.mark.parametrize("harmed", ["de", "en"])
def test_shares_move_to_the_language_that_is_farther_behind(
    harmed: str,
    small_settings: Callable[..., Settings],
    two_languages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language_batches, "_UPDATE_EVERY", 2)
    settings = small_settings(*two_languages, "prune.heal_steps=3")
    source, tokenizer = load_source(settings)
    sequences, languages = calibration(tokenizer, open_collection(make(settings, "corpus")).passages, settings)
    assert set(languages) == {"de", "en"}
    texts_of = list(zip(languages, sequences, strict=True))
    tokens, others = ({token for name, ids in texts_of if (name == harmed) == own for token in ids} for own in (1, 0))
    student = copy.deepcopy(source).float()
    student.model.embed_tokens.weight.data[sorted(tokens - others)] = 0
    batches = LanguageBatches(sequences, languages)
    before = batches.shares
    batches.measure(source)
    folder = open_stage(tmp_path / "run", "prune", {}, {})
    with interrupts.deferred():
        heal(folder, student, source, batches, settings.prune, 1)
    lines = [json.loads(line) for line in (folder.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    held = [line["language_shares"] for line in lines]
    assert held[:2] == [before, before] and held[2][harmed] > before[harmed] + 0.02

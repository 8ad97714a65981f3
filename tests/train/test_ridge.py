"""The closed form in a run: training begins from it, it is evaluated, and what is exported loads elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import drama_dist
from drama_dist.encoder.backbone import load, random_twin
from drama_dist.encoder.contract import with_dims_within
from drama_dist.encoder.head import LinearHead
from drama_dist.encoder.model_check import check_encoder
from drama_dist.export.stage import model_card
from drama_dist.records import Example, read_records
from drama_dist.run.runner import Run
from drama_dist.search.systems import SYSTEMS, ClosedFormSystem
from drama_dist.settings import Settings, SettingsError
from drama_dist.train import stage
from drama_dist.train.batches import batches
from drama_dist.train.ridge import in_closed_form
from drama_dist.train.target_vectors import VectorTargets

CHANGES = [
    "augment.synthetic_queries=0",
    "prune.heal_steps=0",
    "evaluate.systems=[drama, ridge, bm25]",
    "train.info_nce_weight=0",
    "train.regression_weight=1",
    "train.steps=60",
    "train.learning_rate=3e-3",
    "encoder.dims=[40, 16]",
    "targets.lexical_components=24",
    "train.superwords=200",
    "train.passage_share=0.5",
]


@pytest.fixture(scope="module")
def trained(small_settings_in: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run by regression alone, with vectors of more components than the hidden size."""
    run = Run(small_settings_in(tmp_path_factory.mktemp("ridge"), *CHANGES))
    run.make("evaluate/corpus", "export")
    return run


def test_the_system_gives_the_same_vectors_without_its_layers(trained: Run) -> None:
    texts = ["a river", "the delta of a long river, and its fishes", ""]
    system = SYSTEMS["ridge"]
    assert isinstance(system, ClosedFormSystem)
    encoder = system.load(trained.settings)
    assert not encoder.backbone.layers
    np.testing.assert_array_equal(
        encoder.encode_passages(texts), drama_dist.load(trained.path("ridge")).encode_passages(texts)
    )


def test_training_begins_at_the_closed_form_and_comes_closer(trained: Run) -> None:
    lines = [json.loads(line) for line in (trained.path("train") / "metrics.jsonl").read_text("utf-8").splitlines()]
    train = trained.settings.train
    assert lines[0]["queries_cut"]["texts"] == train.batch_size
    assert 0 < lines[0]["passages_cut"]["texts"] <= train.batch_size  # of which each query has two
    assert "accuracy" not in lines[0] and set(lines[0]["distance_per_dim"]) == {"40", "16"}
    start, end = (drama_dist.load(trained.path(name)) for name in ("ridge", "train"))
    targets = VectorTargets.open(trained.path("targets"))
    examples = read_records(trained.path("augment") / "examples.jsonl", Example.from_json)

    def distance(model: drama_dist.Encoder, rows: Sequence[int]) -> float:
        vectors = model.encode_queries([examples[row].query for row in rows])
        return float(np.linalg.norm(vectors - targets.queries.rows(rows), axis=1).mean())

    everything = range(len(examples))
    first = next(batches(examples, train.batch_size, train.hard_negatives, trained.settings.seed))
    assert lines[0]["distance_of_queries"] == pytest.approx(distance(start, first.examples), rel=1e-4)
    assert distance(end, everything) < 0.97 * distance(start, everything) < 0.97 * 1.2  # at random it is 1.4


def test_what_the_fit_took_is_recorded(trained: Run) -> None:
    record = json.loads((trained.path("ridge") / "provenance.json").read_text("utf-8"))
    examples = (trained.path("augment") / "examples.jsonl").read_text("utf-8").splitlines()
    of_queries, of_passages = record["cut"]["queries"], record["cut"]["passages"]
    assert record["queries"] == of_queries["texts"] == len(examples)
    assert record["passages"] == of_passages["texts"] > 0
    assert 0 < record["tokens"] < load(trained.path("ridge")).backbone.config.vocab_size


def test_the_closed_form_is_a_sum_of_token_vectors(trained: Run) -> None:
    """The order of words changes nothing: the layers add nothing, until they are trained."""
    model = drama_dist.load(trained.path("ridge"))
    one, other = model.encode_queries(["water bank flow bridge flood", "flood flow water bridge bank"])
    assert float(one @ other) == pytest.approx(1, abs=1e-4)
    outputs = [model.backbone.layers[0].self_attn.o_proj, drama_dist.load(trained.path("train")).backbone.layers[0].mlp]
    assert not outputs[0].weight.any() and outputs[1].down_proj.weight.any()


def test_the_report_has_the_closed_form_beside_the_trained_model(trained: Run) -> None:
    results = json.loads((trained.path("evaluate/corpus") / "results.json").read_text("utf-8"))
    assert {(row["system"], row["dim"]) for row in results} >= {("drama", 40), ("drama", 16), ("ridge", 40)}


def test_the_head_is_exported_as_a_dense_module(trained: Run) -> None:
    folder, texts = trained.path("export"), ["the river", "A longer text about a river and its banks. " * 4]
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Dense", "Normalize"]
    ours = drama_dist.load(folder)
    theirs.max_seq_length = ours.contract.max_passage_tokens
    np.testing.assert_allclose(ours.encode_passages(texts), theirs.encode_document(texts), atol=1e-5)
    assert ours.encode_passages(texts).shape == (2, 40)
    assert ours.head is not None
    with torch.no_grad():
        ours.head.weight += 0.1
    assert np.abs(ours.encode_passages(texts) - theirs.encode_document(texts)).max() > 1e-3


def test_superwords_are_in_the_encoder_and_its_export(trained: Run) -> None:
    folder = trained.path("export")
    start = load(trained.path("prune"))
    before, passage = start.backbone.config.vocab_size, "the river number 3 part 2 has water bank flow bridge flood"
    ours = drama_dist.load(folder)
    record = json.loads((trained.path("ridge") / "provenance.json").read_text("utf-8"))
    assert record["superwords"] > 10
    assert ours.backbone.config.vocab_size == before + record["superwords"]
    (short,), (long,) = ours.tokenize_passages([passage]), start.tokenize_passages([passage])
    assert len(short) < len(long) and max(short) >= before > max(long)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.tokenizer(passage)["input_ids"] == short


def test_a_start_loses_its_own_head(trained: Run) -> None:
    texts = ["the river", "A longer text about a river."]
    plain, headed = load(trained.path("prune")), load(trained.path("prune"))
    headed.head = LinearHead(headed.size, 7)
    expected, found = (in_closed_form(trained, start)[0] for start in (plain, headed))
    np.testing.assert_allclose(found.encode_passages(texts), expected.encode_passages(texts), atol=1e-5)
    assert found.contract == trained.settings.encoder


def test_random_weights_are_trained_by_regression_and_keep_the_heads_shape(trained: Run) -> None:
    start = load(trained.path("train"))
    twin = random_twin(start, 1)
    assert start.head is not None and twin.head is not None
    assert twin.head.weight.shape == start.head.weight.shape and not torch.equal(twin.head.weight, start.head.weight)
    run = Run(replace(trained.settings, train=replace(trained.settings.train, steps=2)))
    run.make("train-random-init")
    assert load(run.path("train-random-init")).encode_queries(["x"]).shape == (1, 40)


def test_the_model_card_tells_of_the_head_and_the_targets(trained: Run) -> None:
    card = (trained.path("export") / "README.md").read_text("utf-8")
    assert "Mean pooling, a linear layer to 40 components\n(0.0 million weights), cosine similarity;" in card
    assert "targets:\n  teacher_share: 0.8\n" in card and "General texts" not in card
    corpus = replace(trained.settings.corpus, general="installed-packages", general_packages=["numpy"])
    plain = load(trained.path("prune"))
    card = model_card(replace(trained.settings, corpus=corpus), plain)
    assert "\nGeneral texts beside it, as 20% of the passages: `installed-packages numpy`.\n" in card
    assert "Mean pooling, cosine similarity;" in card


def test_dims_are_cut_to_a_size(trained: Run) -> None:
    contract = trained.settings.encoder
    assert [with_dims_within(contract, size).dims for size in (40, 39, 15)] == [[40, 16], [16], [15]]


def test_a_starts_own_head_is_checked_with_its_weights(
    trained: Run, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(trained.path("export"), start)
    assert check_encoder(str(start)) == 40
    stage.check(small_settings(f"train.start={start}", "encoder.dims=[40]"), "drama")
    too_many = small_settings(f"train.start={start}", "encoder.dims=[41]")
    with pytest.raises(SettingsError, match="asks for 41 components, but the model's vectors have 40"):
        stage.check(too_many, "drama")
    stage.check(replace(too_many, train=replace(too_many.train, regression_weight=1.0)), "drama")
    weights = start / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(SettingsError, match=r"2_Dense/model\.safetensors: not a whole safetensors file"):
        stage.check(too_many, "drama")

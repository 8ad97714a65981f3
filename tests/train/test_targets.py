"""Targets of training: the teacher's vectors and BM25's scores of a batch, as a distribution over its passages."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from drama_dist.corpus.collection import open_collection
from drama_dist.encoder.pooling import unit_rows
from drama_dist.records import Example, read_records
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import QUERY_VECTORS, EmbeddingShards
from drama_dist.search.systems import SYSTEMS, DenseSystem
from drama_dist.search.target_space import TargetSpace, joined_parts, principal_axes
from drama_dist.settings import Settings, SettingsError
from drama_dist.train.batches import batches, texts_of
from drama_dist.train.nested_axes import nested_turn
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.targets import open_targets

CHANGES = ["augment.synthetic_queries=0", "prune.heal_steps=0", "evaluate.systems=[drama]", "train.steps=2"]


def standardised(scores_BN: np.ndarray) -> np.ndarray:
    return (scores_BN - scores_BN.mean(1, keepdims=True)) / scores_BN.std(1, keepdims=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run for all shares: its artefacts do not depend on them."""
    return tmp_path_factory.mktemp("targets")


@pytest.mark.parametrize("common", [0.5, -1.0])
def test_vectors_are_those_of_the_texts_in_the_target_space(
    common: float, tmp_path: Path, small_settings_in: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are, and with means taken off, which this teacher's are below the limit for."""
    monkeypatch.setattr("drama_dist.train.target_fit.COMMON", common)
    more = ["targets.teacher_share=0.6", "targets.lexical_components=20", "encoder.dims=[40,16]"]
    settings = small_settings_in(tmp_path, *CHANGES, *more, "train.regression_weight=1")
    run = Run(settings)
    run.make("encode/windows/teacher", "encode/windows/bm25", "augment", "windows", "targets")
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    table = open_collection(run.path("windows")).passages
    space, lexical = TargetSpace.open(run.path("targets")), LexicalIndex(run.path("encode/windows/bm25"))
    teacher = SYSTEMS["teacher"]
    assert isinstance(teacher, DenseSystem) and space.words_VL is not None and space.axes_JK.shape == (384 + 20, 40)
    encoder, written = teacher.load(settings), VectorTargets.open(run.path("targets"))
    assert (len(written.queries), len(written.passages)) == (len(examples), len(table))
    assert written.passages_weigh == pytest.approx(10 * len(table) / (len(examples) + 10 * len(table)))

    queries, some = [example.query for example in examples], [0, 7, 23, len(table) - 1]  # of several shards
    folders = (run.path("augment") / QUERY_VECTORS, run.path("encode/windows/teacher"))
    teachers = [vectors.rows(range(len(vectors))) for vectors in map(EmbeddingShards, folders)]
    encoded = encoder.encode_queries([queries[row] for row in some]), encoder.encode_passages(table.contents(some))
    for teacher_nT, of_some in zip(teachers, encoded, strict=True):
        np.testing.assert_allclose(teacher_nT[some], of_some, atol=1e-5)
    words = [unit_rows(each @ space.words_VL) for each in (lexical.counts(queries), lexical.weights())]
    assert (space.means_2T is None) == (common > 0)
    if space.means_2T is not None:
        np.testing.assert_allclose(space.means_2T, [each.mean(0) for each in teachers], atol=1e-5)
        assert np.abs(space.means_2T[0] - space.means_2T[1]).max() > 0.02
        teachers = [unit_rows(each - mean_T) for each, mean_T in zip(teachers, space.means_2T, strict=True)]
    spread = [np.sqrt(np.square((of[0] @ of[1].T).std(1)).mean()) for of in (teachers, words)]
    weight = 0.6 / spread[0] / (0.6 / spread[0] + 0.4 / spread[1])
    assert space.teacher_weight == pytest.approx(weight, rel=1e-3)

    parts = [joined_parts(space.teacher_weight, *both) for both in zip(teachers, words, strict=True)]
    for found, part_nJ in zip((written.queries, written.passages), parts, strict=True):
        expected_nK = unit_rows(part_nJ[some] @ space.axes_JK)
        np.testing.assert_allclose(found.rows(some), expected_nK, atol=1e-5)
        assert (np.abs(found.rows(some[::-1]) - expected_nK).max(1) > 1e-2).all()

    axes_JK = principal_axes(np.sum([part.T.astype(np.float64) @ part / len(part) for part in parts], axis=0), 40, 20)
    turn_KK = nested_turn(*(unit_rows(part @ axes_JK) for part in parts), [40, 16], settings.seed)
    np.testing.assert_allclose(axes_JK.T @ space.axes_JK, turn_KK, atol=1e-4)
    assert not np.allclose(turn_KK, turn_KK.T, atol=1e-2)


@pytest.mark.parametrize("share", [0.7, 1.0, 0.0])
def test_the_mix_of_a_batch_is_that_of_its_texts(
    share: float, folder: Path, small_settings_in: Callable[..., Settings]
) -> None:
    settings = small_settings_in(folder, *CHANGES, f"targets.teacher_share={share}", "train.teacher_temperature=0.5")
    run = Run(settings)
    names = ["encode/windows/teacher", "encode/windows/bm25", "augment", "windows"]
    run.make(*names)
    targets = open_targets(run)
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    table = open_collection(run.path("windows")).passages
    assert (targets.lexical is None) == (share == 1)
    teacher = SYSTEMS["teacher"]
    assert isinstance(teacher, DenseSystem)
    encoder = teacher.load(settings)
    _, second = islice(batches(examples, 9, 1.0, seed=3), 2)
    batch = texts_of(second, table)
    logits_BN = targets.of(batch).logits(slice(0, 9), torch.float64).numpy()
    dense_BN = encoder.encode_queries(batch.queries) @ encoder.encode_passages(batch.passages).T
    mix_BN = share * standardised(dense_BN.astype(np.float64))
    if share < 1:
        scores, positions = LexicalIndex(run.path("encode/windows/bm25")).search(batch.queries, len(table))
        all_BN = np.zeros((9, len(table)))
        for row in range(9):
            there = positions[row] >= 0
            all_BN[row, positions[row][there]] = scores[row][there]
        mix_BN = mix_BN + (1 - share) * standardised(all_BN[:, batch.positions])
    expected_BN = mix_BN / 0.5
    shifted = logits_BN - logits_BN.mean(1, keepdims=True)
    np.testing.assert_allclose(shifted, expected_BN - expected_BN.mean(1, keepdims=True), atol=2e-4)
    swapped = shifted[:, ::-1]
    assert np.abs(swapped - expected_BN).max() > 0.1  # the columns matter


@pytest.mark.slow
def test_training_takes_them_where_the_settings_ask(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(*CHANGES, "train.info_nce_weight=0", "train.soft_target_weight=1", "train.steps=30")
    run = Run(settings)
    run.make("train")
    lines = [json.loads(line) for line in (run.path("train") / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert "accuracy" not in lines[0] and set(lines[0]["soft_per_dim"]) == {"32", "16"}
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.8 * np.mean([line["loss"] for line in lines[:5]])
    with pytest.raises(SettingsError, match="nothing to learn from"):
        small_settings("train.info_nce_weight=0")

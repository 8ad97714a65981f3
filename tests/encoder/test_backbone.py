"""The encoder contract: packed equals padded, bidirectional, no leaks, tokens as promised."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import drama_dist
from drama_dist.encoder import attention, backbone
from drama_dist.encoder.backbone import Encoder, LeakError, from_config, load
from drama_dist.encoder.fused_layers import FusedLayer
from drama_dist.encoder.threads import side_by_side
from drama_dist.kernels.llama_cpu import attention as attention_kernel
from drama_dist.settings import EncoderSettings, SettingsError
from tests.conftest import padded_vectors

CONTRACT = EncoderSettings(max_query_tokens=16, max_passage_tokens=24, dims=[48, 16])
TEXTS = ["The bread has flour", "x", "matrix " * 60, "", "The river number 3 flows to the delta with water."]


@pytest.fixture(scope="module", params=["llm", "fusing_llm"])
def folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load(folder, contract=CONTRACT)


def test_layers_are_fused_where_they_fit(llm: Path, fusing_llm: Path) -> None:
    fusing = load(fusing_llm)
    assert all(type(layer) is FusedLayer for layer in fusing.backbone.layers)
    assert not any(type(layer) is FusedLayer for layer in load(llm).backbone.layers)
    fresh = from_config(fusing.backbone.config, fusing.tokenizer, CONTRACT, seed=1)
    assert all(type(layer) is FusedLayer for layer in fresh.backbone.layers)


def test_packed_vectors_equal_those_of_a_padded_model(encoder: Encoder, folder: Path) -> None:
    expected = padded_vectors(folder, encoder.tokenize_passages(TEXTS))
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), expected, atol=1e-5)


def test_a_texts_vector_does_not_depend_on_its_neighbours(encoder: Encoder) -> None:
    alone = np.concatenate([encoder.encode_passages([text]) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), alone, atol=1e-5)
    encoder.tokens_per_batch = 7
    batches: list[int] = []
    np.testing.assert_allclose(encoder.encode_passages(TEXTS, progress=batches.append), alone, atol=1e-5)
    encoder.tokens_per_batch = None
    assert len(batches) > 1 and sum(batches) == len(TEXTS)


def many_texts() -> list[str]:
    """For three threads two chunks each of 50 tokens and more, at most 24 tokens a text."""
    return [f"The river number {number} flows to the delta with water." for number in range(60)] + TEXTS


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Three threads of PyTorch's; how many chunks each call of `side_by_side` gets."""
    calls: list[int] = []

    def spy(call: Callable[[list[int]], int], jobs: Sequence[list[int]]) -> Iterator[int]:
        if jobs:
            calls.append(len(jobs))
        return side_by_side(call, jobs)

    monkeypatch.setattr(backbone, "side_by_side", spy)
    monkeypatch.setattr(backbone, "_LEAST_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield calls
    torch.set_num_threads(before)


def test_threads_encode_chunks_side_by_side_to_the_same_vectors(
    encoder: Encoder, spied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, told = many_texts(), []
    alone = np.concatenate([encoder.encode_passages([text]) for text in texts])
    assert not spied
    monkeypatch.setattr(encoder, "tokens_per_batch", 150)
    vectors = encoder.encode_passages(texts, progress=told.append)
    assert len(spied) == 1 and spied[0] >= 6
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert sum(told) == len(texts)


def test_a_text_longer_than_a_threads_share_is_encoded_by_all_threads(
    encoder: Encoder, spied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["The bread"] * 60 + ["matrix " * 60] * 7
    alone = np.concatenate([encoder.encode_passages([text]) for text in texts])
    monkeypatch.setattr(encoder, "tokens_per_batch", 3 * 23)
    told: list[int] = []
    vectors = encoder.encode_passages(texts, progress=told.append)
    assert spied == [len(told) - 4] and told[-4:] == [2, 2, 2, 1]  # of 24 tokens, 69 at a time
    np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_few_chunks_are_encoded_one_after_another(
    encoder: Encoder, spied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "tokens_per_batch", 150)
    encoder.encode_passages(many_texts()[:10])
    monkeypatch.setattr(backbone, "_LEAST_PER_THREAD", 51)
    encoder.encode_passages(many_texts())
    assert not spied


def test_a_progress_bar_that_fails_ends_the_encoding(
    encoder: Encoder, spied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "tokens_per_batch", 150)
    packed: list[int] = []
    pack = encoder.pack
    monkeypatch.setattr(encoder, "pack", lambda sequences: packed.append(len(sequences)) or pack(sequences))

    def fail(count: int) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        encoder.encode_passages(many_texts() * 50, progress=fail)
    assert list(side_by_side(abs, range(9))) == list(range(9))  # behind all that was not taken back
    assert len(packed) < spied[0]


def test_in_bfloat16_numbers_of_tokens_are_round_and_what_fills_them_is_dropped(
    folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = load(folder, dtype="bfloat16", contract=CONTRACT)
    tokens: list[int] = []
    states = rounded.hidden_states
    monkeypatch.setattr(
        rounded, "hidden_states", lambda packed, _: tokens.append(len(packed.token_ids_T)) or states(packed)
    )
    for count in range(1, len(TEXTS) + 1):
        np.testing.assert_allclose(
            rounded.encode_passages(TEXTS[:count]), encoder.encode_passages(TEXTS[:count]), atol=0.05
        )
    assert all(count % 8 == 0 for count in tokens)
    assert len(encoder.pack([[5] * 9]).token_ids_T) == 9  # float32 is as it comes


@pytest.mark.parametrize("why", ["autocast", "rope", "hook"])
def test_what_threads_do_not_bear_is_encoded_by_the_caller(
    encoder: Encoder, spied: list[int], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(encoder, "tokens_per_batch", 150)
    with contextlib.ExitStack() as stack:
        if why == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif why == "rope":
            monkeypatch.setattr(encoder.backbone.rotary_emb, "rope_type", "longrope")
            monkeypatch.setattr(
                encoder, "hidden_states", lambda packed, _: torch.ones(len(packed.token_ids_T), encoder.hidden_size)
            )
        else:
            handle = encoder.backbone.norm.register_forward_hook(lambda *_: None)
            stack.callback(handle.remove)
        encoder.encode_passages(many_texts())
    assert not spied


def test_tokens_are_bos_prefix_text_eos_and_truncation_keeps_eos(encoder: Encoder) -> None:
    bos, eos = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    queries, passages = encoder.tokenize_queries(TEXTS), encoder.tokenize_passages(TEXTS)
    for row in [*queries, *passages]:
        assert row[0] == bos and row[-1] == eos and row.count(eos) == 1
    assert (len(queries[2]), len(passages[2])) == (16, 24)
    assert encoder.tokenizer.decode(queries[0][1:-1]) == "query: the bread has flour"
    assert encoder.tokenizer.decode(passages[0][1:-1]) == "the bread has flour"


def test_vectors_are_float32_units_and_the_cut_is_normalised_again(encoder: Encoder) -> None:
    whole, cut = encoder.encode_queries(TEXTS), encoder.encode_queries(TEXTS, dim=16)
    assert whole.dtype == np.float32 and whole.shape == (5, encoder.hidden_size)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6)
    assert encoder.encode_queries([]).shape == (0, encoder.hidden_size)
    with pytest.raises(ValueError, match=f"dim=65: these vectors have {encoder.hidden_size} components"):
        encoder.encode_queries(TEXTS, dim=65)


def test_an_encoder_that_is_causal_although_it_should_not_be_is_refused(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def causal(*args: torch.Tensor, **options: object) -> torch.Tensor:
        return sdpa(*args, **{**options, "is_causal": True})

    monkeypatch.setattr(attention, "scaled_dot_product_attention", causal)
    with pytest.raises(LeakError, match="attention is causal"):
        load(llm, contract=CONTRACT)


def test_layers_that_add_nothing_or_little_are_no_leak(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(llm, contract=CONTRACT)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        for layer in encoder.backbone.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        backbone.probe(encoder)
        encoder.backbone.layers[0].self_attn.o_proj.weight.normal_(std=1e-3)
    backbone.probe(encoder)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a, **o: sdpa(*a, **{**o, "is_causal": True}))
    with pytest.raises(LeakError, match="attention is causal"):
        backbone.probe(encoder)


def test_the_tokenizer_cannot_be_replaced(llm: Path) -> None:
    encoder = load(llm, contract=CONTRACT)
    with pytest.raises(AttributeError, match="tokenizer"):
        encoder.tokenizer = AutoTokenizer.from_pretrained(llm)  # type: ignore[misc]


def test_packed_sequences_that_see_each_other_are_refused(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "probe", lambda encoder: None)
    leaky = load(llm, contract=CONTRACT)
    monkeypatch.undo()

    def one_run(packed: object) -> list[tuple[int, int]]:
        return [(1, len(packed.token_ids_T))]  # type: ignore[attr-defined]

    monkeypatch.setattr(backbone.Packed, "runs", property(one_run))
    with pytest.raises(LeakError, match="depends on its neighbour"):
        backbone.probe(leaky)


def test_fused_layers_that_let_sequences_see_each_other_are_refused(
    fusing_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = attention_kernel.attend
    monkeypatch.setattr(attention_kernel, "attend", lambda rows, ends, scaling: attend(rows, ends[[0, -1]], scaling))
    with pytest.raises(LeakError, match="packed attention leaks"):
        load(fusing_llm)


def test_an_unpruned_language_model_stays_causal_when_asked(llm: Path) -> None:
    causal = load(llm, contract=CONTRACT, bidirectional=False)
    both = load(llm, contract=CONTRACT)
    assert np.abs(causal.encode_passages(TEXTS) - both.encode_passages(TEXTS)).max() > 1e-3


def test_saving_and_loading_keep_vectors_and_contract(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    again = drama_dist.load(tmp_path)
    assert again.contract == CONTRACT
    np.testing.assert_array_equal(again.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


def test_dims_beyond_the_hidden_size_are_refused(llm: Path) -> None:
    with pytest.raises(SettingsError, match="asks for 64 components, but the model's vectors have 48"):
        load(llm, contract=EncoderSettings(dims=[64]))


def test_other_model_types_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', "utf-8")
    with pytest.raises(ValueError, match="model type 'bert'; only Llama, Mistral, Qwen2 and Qwen3 models"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


PUBLISHED = {  # facebook/drama-base (arXiv 2502.18460), with fewer layers and words for memory's sake
    "architectures": ["DramaModel"],
    "auto_map": {"AutoModel": "modeling_drama.DramaModel"},
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "intermediate_size": 3072,
    "vocab_size": 2048,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}


def test_the_published_drama_base_config_loads(tmp_path: Path, llm: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), "utf-8")
    config = LlamaConfig.from_pretrained(tmp_path)
    made = from_config(config, AutoTokenizer.from_pretrained(llm), EncoderSettings(), seed=1)
    made.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), "utf-8")
    (tmp_path / "drama.json").unlink()  # the published folder has none
    encoder = load(tmp_path)
    assert encoder.backbone.config.rope_parameters["factor"] == 32.0
    assert encoder.backbone.config.rope_parameters["rope_theta"] == 500000.0
    assert encoder.encode_passages(TEXTS, dim=256).shape == (5, 256)
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), made.encode_passages(TEXTS), atol=1e-6)

"""Model folders that are damaged or do not fit themselves: one sentence, by the check and by loading alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaModel

import drama_dist
from drama_dist.encoder.model_check import check_encoder, check_llama
from drama_dist.encoder.pretrained import load_weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a" + "\nsize 269060552\n"
Spoil = Callable[[Path], Any]


def config(**changes: Any) -> Spoil:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content, "utf-8")


def cut(name: str, keep: float) -> Spoil:
    def spoil(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(keep * len(whole))])

    return spoil


def shards(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-0000*.safetensors"))[1].unlink()


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


DAMAGE: dict[str, tuple[Spoil, str]] = {
    "weights are a pointer": (text("model.safetensors", POINTER), "/model.safetensors: a pointer of Git LFS"),
    "the tokenizer is a pointer": (text("tokenizer.json", POINTER), "/tokenizer.json: a pointer of Git LFS"),
    "weights cut short": (cut("model.safetensors", 0.5), "/model.safetensors: not a whole safetensors file"),
    "weights cut in their header": (cut("model.safetensors", 0.001), "/model.safetensors: not a whole safetensors"),
    "weights empty": (cut("model.safetensors", 0), "/model.safetensors: not a whole safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights: neither"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is not read, as such files can run code",
    ),
    "a shard is missing": (shards, "files of the weights are missing, first model-00002"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "/config.json: missing"),
    "a configuration that is not JSON": (cut("config.json", 0.5), "/config.json: not JSON"),
    "a configuration that is a list": (text("config.json", "[]"), "/config.json: expected a JSON object, found list"),
    "a tokenizer cut short": (cut("tokenizer.json", 0.5), "/tokenizer.json: not JSON"),
    "a tokenizer's settings cut short": (cut("tokenizer_config.json", 0.5), "/tokenizer_config.json: not JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer cannot be read"),
    "a token beyond the embeddings": (more_tokens, r"1 tokens that the model has no embedding for, first '\[PAD\]'"),
    "another vocab_size": (config(vocab_size=600), "embed_tokens.weight is .* × 48 and 600 × 48 in the weights and by"),
    "another shape": (config(intermediate_size=90), r"proj.weight is .* in the weights and by config.json"),
    "fewer layers than weights": (config(num_hidden_layers=2), "config.json says nothing of .*layers.2"),
    "more layers than weights": (config(num_hidden_layers=5), r"the weights lack .*layers.4.* and \d+ more"),
    "biases that the configuration denies": (
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        "config.json says nothing of .*layers.0.self_attn.q_proj.bias in the weights",
    ),
    "weights in whole numbers": (
        weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
        "/model.safetensors: model.norm.weight is stored as I8, not in floating point",
    ),
    "biases that are not there": (config(attention_bias=True), r"the weights lack .*proj.bias and \d+ more"),
    "an unknown rotary embedding": (config(rope_parameters={"rope_type": "nope"}), "has rope_type 'nope'; known are"),
    "an unknown activation": (config(hidden_act="nope"), "has hidden_act 'nope'; known are"),
    "a number that is text": (config(hidden_size="x"), "its config.json cannot be read: .*hidden_size"),
    "another model type": (
        config(model_type="bert"),
        "model type 'bert'; only Llama, Mistral, Qwen2 and Qwen3 models",
    ),
    "an unknown model type": (config(model_type="nope"), "its config.json cannot be read: .*`nope`"),
    "quantized weights": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "its weights are quantized"),
    "code of the hub": (config(attn_implementation="some/kernel"), "asks for code of the hub, some/kernel"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_said_in_one_sentence(damage: str, llm: Path, tmp_path: Path) -> None:
    spoil, message = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(llm, folder)
    spoil(folder)
    for use in (check_llama, drama_dist.load):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^{folder}.*{message}") as failure:
            use(str(folder))
        assert len(str(failure.value).splitlines()) == 1


def test_a_whole_folder_passes_and_no_weight_is_read(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "numpy", None)  # a meta tensor has no values
    assert check_llama(str(llm), with_head=True).hidden_size == 48


def test_a_head_is_asked_for_only_where_it_is_used(llm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llm, folder)
    config(tie_word_embeddings=False)(folder)
    check_llama(str(folder))
    options: dict[str, Any] = {"trust_remote_code": False}
    load_weights(LlamaForCausalLM, str(folder), optional=["lm_head.weight"], **options)
    for use in (
        lambda: check_llama(str(folder), with_head=True),
        lambda: load_weights(LlamaForCausalLM, str(folder), **options),
    ):
        with pytest.raises(ValueError, match=r"the weights lack lm_head\.weight, which would be random"):
            use()


def test_weights_saved_without_their_prefix_fit(llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "model")
    LlamaModel.from_pretrained(llm).save_pretrained(tmp_path / "model")
    assert check_llama(str(tmp_path / "model"), with_head=True).hidden_size == 48  # the head is tied


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_give_no_numbers_are_named(number: float, llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "model")
    weights(lambda tensors: tensors["model.norm.weight"].fill_(number))(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model: its outputs are NaN or infinite, in torch.float32"):
        drama_dist.load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("drama.json", "{", "drama.json: not JSON"),
        ("drama.json", '{"dims": [64]}', "drama.json: encoder.dims=.* asks for 64 components"),
        ("modules.json", "{", "modules.json: not JSON"),
        ("modules.json", "{}", "modules.json: expected a list of modules"),
        ("modules.json", '[{"type": "Pooling"}]', "modules.json: expected a list of modules"),
        ("config_sentence_transformers.json", '{"prompts": []}', None),
        ("config_sentence_transformers.json", '{"prompts": ["query"]}', "expected an object of prompts, found list"),
        ("config_sentence_transformers.json", '{"prompts": {"query": null, "document": null}}', None),
        (
            "config_sentence_transformers.json",
            '{"prompts": {"passage": 1}}',
            "rs.json: prompts: passage=1: must be a valid string",
        ),
        ("config_sentence_transformers.json", '{"prompts": {"query": "\\ud800"}}', "rs.json: "),
        ("sentence_bert_config.json", '{"max_seq_length": null}', None),
        ("sentence_bert_config.json", '{"max_seq_length": "x"}', "g.json: max_seq_length='x': must be a valid integer"),
        (
            "sentence_bert_config.json",
            '{"max_seq_length": 1}',
            "g.json: max_seq_length=1: must be greater than or equal to 3",
        ),
        (
            "sentence_bert_config.json",
            '{"max_seq_length": 99.5}',
            "g.json: max_seq_length=99.5: must be a valid integer",
        ),
        (
            "sentence_bert_config.json",
            '{"max_seq_length": true}',
            "g.json: max_seq_length=True: must be a valid integer",
        ),
        ("sentence_bert_config.json", "[", "sentence_bert_config.json: not JSON"),
    ],
)
def test_what_a_folder_says_of_its_encoder_is_checked(
    name: str, content: str, message: str | None, llm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llm, folder)
    text("modules.json", "[]")(folder)
    text(name, content)(folder)
    if message is None:
        check_encoder(str(folder))
        return
    for use in (check_encoder, drama_dist.load):
        with pytest.raises(ValueError, match=rf"^{folder}.*{message}") as failure:
            use(str(folder))
        assert len(str(failure.value).splitlines()) == 1

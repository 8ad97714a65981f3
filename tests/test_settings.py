"""Settings: files, overrides, and errors that say where and what."""

from __future__ import annotations

from pathlib import Path

import pytest

from drama_dist.settings import SettingsError, read_settings, write_settings

ROOT = Path(__file__).parent.parent
GOOD = "run: runs/x\nllm: some/model\ncorpus:\n  path: docs.jsonl\ntrain:\n  steps: 7\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD, "utf-8")
    return path


def test_the_file_is_read_and_overrides_win(file: Path) -> None:
    settings = read_settings(file, ["train.steps=9", "encoder.dims=[64,32]", "run=runs/y"])
    assert (settings.train.steps, settings.encoder.dims, settings.run) == (9, [64, 32], "runs/y")
    assert read_settings(file).train.steps == 7


def test_what_is_written_is_read_back(file: Path, tmp_path: Path) -> None:
    settings = read_settings(file, ["encode.max_passage_tokens=99", "corpus.packages=[numpy]"])
    write_settings(settings, tmp_path / "again.yaml")
    assert read_settings(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize("name", ["quickstart.yaml", "your-corpus.yaml", "long-8k.yaml"])
def test_the_shipped_settings_are_valid(name: str) -> None:
    settings = read_settings(ROOT / "configs" / name, [] if name.startswith("quickstart") else ["corpus.path=docs"])
    assert max(settings.encoder.dims) == settings.prune.hidden


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  stepz: 3\n", r"s.yaml:7: train.stepz: .*; did you mean train.steps\?"),
        (GOOD.replace("steps: 7", "steps: many"), r"s.yaml:6: train.steps: Value 'many'"),
        (GOOD.replace("train:", "training:"), r"s.yaml:5: training"),
        ("run: [unclosed", "s.yaml: not YAML"),
        ("- a\n- b\n", "expected sections with keys, found list"),
        ("run: runs/x\nllm: m\n", "no value for corpus.path; set it in the file or as corpus.path=VALUE"),
    ],
    ids=["unknown key", "wrong type", "unknown section", "not YAML", "a list", "missing value"],
)
def test_a_bad_file_is_refused_with_line_and_reason(file: Path, text: str, message: str) -> None:
    file.write_text(text, "utf-8")
    with pytest.raises(SettingsError, match=message):
        read_settings(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"override 'train.stepz=3': train.stepz: .*did you mean train.steps\?"),
        ("train.steps=many", "override 'train.steps=many'"),
        ("train.steps", "expected section.key=value"),
        ("train.steps=0", "train.steps=0: expected 1 or more"),
        ("train.temperature=0", "train.temperature=0.0: expected more than 0"),
        ("train.dtype=float16", "train.dtype='float16': expected one of auto, bfloat16, float32"),
        ("train.activation_budget=half", "train.activation_budget='half': expected auto, or GiB, 0 or more"),
        ("slurm.minutes=6", "slurm.warning_seconds=300: expected a minute less than the time limit, slurm.minutes=6"),
        ("train.activation_budget=-1", "train.activation_budget=-1: expected auto, or GiB"),
        ("train.zero_stage=4", "train.zero_stage=4: expected 0, 1, 2 or 3"),
        ("train.zero_stage=0", "train.zero_stage=0 takes train.dtype=float32 only"),
        ("train.loss_partition=both", "train.loss_partition='both': expected one of auto, passages, queries"),
        ("encoder.dims=[]", "encoder.dims"),
        ("encoder.dims=[8,8]", "expected different positive numbers"),
        ("train.dim_weights=[1.0]", "expected one weight for each of encoder.dims"),
        ("evaluate.systems=[drama,colbert]", "evaluate.systems has 'colbert': expected drama, random-init"),
        ("train.hard_negatives=9", "train.hard_negatives=9.0 is more than augment.negatives=8"),
        ("augment.negatives_to_rank=12", "augment.negatives=8 do not fit between ranks 10 and 12"),
        ("corpus.path=installed-packages", "corpus.packages is empty"),
        ("prune.heal_scored_share=0", "prune.heal_scored_share=0.0: expected more than 0, up to 1"),
    ],
)
def test_a_bad_value_is_refused_with_the_allowed_ones(file: Path, override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(file, [override])


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("2", 2), ("0.5", 0.5)])
def test_the_activation_budget_is_a_number_or_auto(file: Path, text: str, value: object) -> None:
    assert read_settings(file, [f"train.activation_budget={text}"]).train.activation_budget == value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: no such settings file"):
        read_settings(tmp_path / "nowhere.yaml")

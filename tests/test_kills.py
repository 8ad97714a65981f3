"""A killed process costs no record and no bit: see kills.py, which has the trials."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import STAGES, WAYS, Ground, Trial, can_fill, differences, ground, trials


@pytest.fixture(scope="module")
def place() -> Iterator[Ground]:
    with ground() as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize(
    "trial", trials(len(STAGES) * len(WAYS), 100), ids=lambda trial: f"{trial.stage}, {trial.way}, {trial.launcher}"
)
def test_a_stopped_stage_ends_as_if_nobody_had_stopped_it(trial: Trial, place: Ground) -> None:
    if trial.way == "full disk" and not can_fill():
        pytest.skip("a full disk needs root")
    outcome = place.take(trial)
    assert not outcome.differences and outcome.starts == 1
    # A deepspeed command does not tell of a killed child; a stage that needs no more room ignores a full disk.
    assert outcome.status != 0 or trial.launcher == "deepspeed" or trial.way == "full disk"


def test_a_changed_byte_a_lost_step_and_a_left_file_are_told(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "weights").write_text("12", "utf-8")
        (folder / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', "utf-8")
    assert differences(whole, run, "train") == []
    (run / "train" / "weights").write_text("13", "utf-8")
    (run / "train" / "metrics.jsonl").write_text("", "utf-8")
    (run / "train.partial").mkdir()
    assert differences(whole, run, "train") == [
        "train.partial: left behind",
        "train/weights: other bytes",
        "train/metrics.jsonl: other steps or losses",
    ]

"""Signals: outside training they end the run at once, in training after a step, with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drama_dist.cli import main
from drama_dist.distributed import ranks
from drama_dist.run import interrupts
from drama_dist.run.folder import StageFolder
from drama_dist.run.runner import make
from drama_dist.settings import Settings, write_settings

SIGNALS = [signal.SIGUSR1, signal.SIGTERM]


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    interrupts.listen()
    yield
    for signum, handler in zip(SIGNALS, before, strict=True):
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_stops_at_once_unless_deferred(signum: signal.Signals) -> None:
    with pytest.raises(interrupts.Stopped, match=signum.name):
        signal.raise_signal(signum)
    with pytest.raises(interrupts.Stopped, match="at the end of a stage"), interrupts.deferred():
        assert not interrupts.wanted()
        signal.raise_signal(signum)
        assert interrupts.wanted()
    with interrupts.deferred():
        assert not interrupts.wanted()  # an earlier one does not count


def test_a_signal_to_another_rank_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupts.deferred():
        monkeypatch.setattr(ranks, "on_every_rank", lambda value: [value, int(signal.SIGUSR1)])
        assert interrupts.wanted()
        monkeypatch.setattr(ranks, "on_every_rank", lambda value: [value, 0])
        assert not interrupts.wanted()


def test_training_saves_exits_with_stopped_and_resumes_to_the_same_weights(
    small_settings_in: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["train.steps=5", "train.checkpoint_every=100"]
    whole, stopped = (small_settings_in(tmp_path, f"run={tmp_path / name}", *changes) for name in ("whole", "stopped"))
    make(whole, "train")
    make(stopped, "prune")
    make(stopped, "augment")
    log = StageFolder.log

    def log_and_signal(self: StageFolder, **values: Any) -> None:
        log(self, **values)
        if values["step"] == 2:
            signal.raise_signal(signal.SIGUSR1)

    path = tmp_path / "stopped.yaml"
    write_settings(stopped, path)
    monkeypatch.setattr(StageFolder, "log", log_and_signal)
    assert main(["train", str(path)]) == interrupts.STOPPED == 85
    assert "train: saved after step 2" in capsys.readouterr().err
    partial = tmp_path / "stopped" / "train.partial"
    assert [path.name for path in (partial / "checkpoints").iterdir()] == ["step-0000002"]
    assert len((partial / "metrics.jsonl").read_text("utf-8").splitlines()) == 2
    monkeypatch.setattr(StageFolder, "log", log)
    assert main(["train", str(path)]) == 0
    weights = [(Path(settings.run) / "train" / "model.safetensors").read_bytes() for settings in (whole, stopped)]

    assert weights[0] == weights[1]


@pytest.mark.parametrize("stage", ["prune", "train"])
def test_a_signal_in_the_last_step_lets_the_stage_finish_and_nothing_follow(
    stage: str, small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings("train.steps=2", "prune.heal_steps=2")
    log = StageFolder.log

    def log_and_signal(self: StageFolder, **values: Any) -> None:
        log(self, **values)
        if self.name == stage and values["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StageFolder, "log", log_and_signal)
    with pytest.raises(interrupts.Stopped):
        make(settings, stage)
    assert (Path(settings.run) / stage / "model.safetensors").exists()
    assert make(settings, stage) == Path(settings.run) / stage

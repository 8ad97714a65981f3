"""What a message tells a user to change can be changed: the same command then goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.cli import main
from drama_dist.distributed.engine import Engine
from drama_dist.settings import Settings, write_settings

CHANGES = ["prune.heal_steps=0", "augment.synthetic_queries=0", "augment.crops=64", "train.steps=2"]


@pytest.fixture
def command(small_settings: Callable[..., Settings], corpus_file: Path, tmp_path: Path) -> Callable[..., int]:
    """Run a verb of the command with the small settings and overrides; returns its status."""
    write_settings(small_settings(f"corpus.path={tmp_path / 'data'}", *CHANGES), tmp_path / "whole.yaml")
    (tmp_path / "data").mkdir()
    lines = corpus_file.read_text("utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "data" / "corpus.jsonl").write_text("".join(lines), "utf-8")

    def start(verb: str, *overrides: str) -> int:
        return main([verb, str(tmp_path / "whole.yaml"), *overrides])

    return start


@pytest.mark.parametrize("remedy", ["mended", "limit", "limit and other settings"])
def test_a_corpus_is_mended_or_its_limit_raised(
    remedy: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data" / "corpus.jsonl"
    whole = path.read_text("utf-8")
    path.write_text(whole + "{broken\n" * 4, "utf-8")
    assert command("corpus") == 2
    assert "raise the limit" in capsys.readouterr().err
    if remedy == "mended":
        path.write_text(whole, "utf-8")
        assert command("corpus") == 0
    else:
        others = ["corpus.min_words=1"] if "other" in remedy else []
        assert command("corpus", "corpus.bad_record_limit=0.2", *others) == 0
    assert (tmp_path / "run" / "corpus" / "provenance.json").exists()


def test_a_batch_size_and_a_learning_rate_are_lowered(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(self: Engine, learning_rate: float) -> float:
        raise FloatingPointError("lower the learning rate")

    assert command("train", "train.batch_size=128") == 2
    assert "lower the batch size" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", diverge)
        assert command("train", "train.batch_size=16", "train.learning_rate=1") == 2
    said = capsys.readouterr().err
    assert "train: starts anew" in said and "lower the learning rate" in said
    assert command("train", "train.batch_size=16", "train.learning_rate=1e-3") == 0
    assert "train: starts anew" in capsys.readouterr().err


def test_more_than_a_limit_allows_is_allowed(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "augment.synthetic_queries=4", "augment.bad_answer_limit=0", "augment.max_new_tokens=1"
    assert command("augment", *bad) == 2
    assert "Raise the limit" in capsys.readouterr().err
    other = "augment.synthetic_queries=4", "augment.bad_answer_limit=1", "augment.max_new_tokens=2"
    assert command("augment", *other) == 2
    said = capsys.readouterr().err
    assert re.search(r"max_new_tokens: 1 in the folder, 2 now(.|\n)*--discard-partial .*1 stored part", said)
    assert command("augment", *other, "--discard-partial") == 0
    counts = json.loads((tmp_path / "run" / "augment" / "counts.json").read_text("utf-8"))
    assert counts["crop examples"]

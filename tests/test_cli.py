"""The command: exit status and messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.cli import VERBS, main
from drama_dist.run.runner import make
from drama_dist.settings import Settings, write_settings


@pytest.fixture
def file(small_settings: Callable[..., Settings], tmp_path: Path) -> Path:
    write_settings(small_settings(), tmp_path / "whole.yaml")
    return tmp_path / "whole.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=1"], "drama corpus: override 'train.stepz=1': train.stepz: "),
        (["corpus.path=/no/such"], "drama corpus: corpus.path=/no/such: no such file or folder"),
    ],
)
def test_a_users_mistake_is_a_message_and_status_2(
    file: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["corpus", str(file), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_settings_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "drama run: nowhere.yaml: no such settings file" in capsys.readouterr().err


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(verb in out for verb in [*VERBS, "search", "compare", "submit", "plan", "doctor"])


def test_an_unknown_option_is_refused_and_local_rank_is_not(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["corpus", str(file), "--fast"])
    assert "unknown option --fast" in capsys.readouterr().err
    assert main(["corpus", str(file), "--local_rank=0"]) == 0


def test_an_override_may_stand_after_an_option_and_the_last_one_counts(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["corpus", str(file), "corpus.path=/first", "--collection", "corpus", "corpus.path=/no/such"]
    assert main(words) == 2
    assert "corpus.path=/no/such: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["corpus", str(file), "--collection", "corpus", "stray"])
    assert "unknown argument stray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "0"], "argument -k: '0': must be a whole number, 1 or more"),
        (["-k", "-3"], "argument -k: '-3': must be a whole number, 1 or more"),
        (["-k", "nan"], "argument -k: 'nan': must be"),
        (["-k", "²"], "argument -k: '²': must be"),
        (["-k", "9" * 5000], "argument -k: '99999999999999999999': must be"),
        (["--dim", "0"], "argument --dim: '0': must be"),
        (["--hybrid", "1.5"], "argument --hybrid: '1.5': must be a number from 0 to 1"),
        (["--hybrid", "nan"], "argument --hybrid: 'nan': must be a number from 0 to 1"),
        (["caf\udce9"], r"argument query: 'caf\udce9': is not UTF-8 text"),
    ],
)
def test_what_search_cannot_mean_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["search", "nowhere", *(["a query"] if words[0].startswith("-") else []), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "--share", "4/4"], "--share 4/4: expected INDEX/COUNT"),
        (["encode", "--share", "0/4"], "corpus: not found, and every share reads it; run first: drama corpus"),
        (["augment", "--share", "0/4"], "corpus: not found, and every share reads it; run first: drama corpus"),
    ],
)
def test_a_share_does_not_make_what_all_shares_read(
    words: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = words
    assert main([verb, str(file), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (file.parent / "run").exists()


def test_search_answers_from_a_finished_run_and_says_what_is_missing(
    small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings("train.steps=2")
    assert main(["search", settings.run, "the river"]) == 2
    assert "make it first: drama run SETTINGS run=" in capsys.readouterr().err
    make(settings, "encode")
    make(settings, "encode", system="bm25")
    capsys.readouterr()
    assert main(["search", settings.run, "the river", "-k", "3", "--dim", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == ["1.", "2.", "3."]
    assert main(["search", settings.run, "the river delta", "-k", "2", "--hybrid", "0"]) == 0
    assert all("river" in line for line in capsys.readouterr().out.splitlines()[::2])
    assert main(["search", settings.run, "the river", "--hybrid"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    shutil.rmtree(Path(settings.run) / "encode" / "corpus" / "bm25")
    assert main(["search", settings.run, "the river", "--hybrid"]) == 2
    assert "make it first: drama encode --system bm25 SETTINGS run=" in capsys.readouterr().err
    assert main(["search", settings.run, "the river", "--dim", "99"]) == 2
    assert "dim=99: these vectors have 32 components" in capsys.readouterr().err

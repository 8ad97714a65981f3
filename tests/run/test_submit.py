"""Batch scripts: what is in them, and in which order they are submitted. A real slurm reads them in tests/slurm/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.cli import _read as read_words
from drama_dist.cli import main
from drama_dist.run.submit import chain, script, submit
from drama_dist.settings import Settings, write_settings

TEACHER, DRAMA = ([f"encode-{name}-array", f"encode-{name}"] for name in ("windows-teacher", "corpus-drama"))
EXAMPLES = ["corpus", "windows", *TEACHER, "encode-windows-bm25", "augment-array", "augment"]
CHAIN = [*EXAMPLES, "prune", "train", *DRAMA, "encode-corpus-bm25", "rest"]


FOR_EXAMPLES = ["corpus", "windows", "encode/windows/teacher", "encode/windows/bm25"]


def options(text: str) -> dict[str, str]:
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(pairs) == text.count("#SBATCH")
    return dict(pairs)


def scripts(settings: Settings, stage: str = "run") -> dict[str, str]:
    return {
        job.name: script(settings, job, ["my settings.yaml", "train.steps=3"], "") for job in chain(settings, stage)
    }


def finished(settings: Settings, *names: str) -> Settings:
    """As if these artefacts were there."""
    for name in names:
        folder = Path(settings.run) / name
        folder.mkdir(parents=True)
        (folder / "provenance.json").write_text("{}", "utf-8")
    return settings


def trained(settings: Settings) -> Settings:
    return finished(settings, *FOR_EXAMPLES, "augment", "prune", "train", "encode/corpus/bm25")


def names(settings: Settings, verb: str = "run") -> list[str]:
    return [job.name for job in chain(settings, verb)]


def test_the_whole_job_is_a_chain_and_skips_what_is_not_needed(small_settings: Callable[..., Settings]) -> None:
    assert names(small_settings()) == CHAIN
    without = names(small_settings("augment.synthetic_queries=0", "train.start=models/x"))
    assert without == [name for name in CHAIN if name not in ("augment-array", "prune")]
    assert names(small_settings("evaluate.systems=[bm25]")) == ["corpus", "encode-corpus-bm25", "rest"]
    teacher = ["encode-corpus-teacher-array", "encode-corpus-teacher"]
    assert names(small_settings("evaluate.systems=[teacher]")) == ["corpus", *teacher, "rest"]
    ends = {verb: names(small_settings(), verb) for verb in ("augment", "train", "encode")}
    assert ends == {"augment": EXAMPLES, "train": [*EXAMPLES, "prune", "train"], "encode": CHAIN[:-2]}


def test_what_is_finished_is_not_submitted_again(small_settings: Callable[..., Settings]) -> None:
    settings = finished(small_settings(), *FOR_EXAMPLES, "encode/corpus/bm25")
    assert names(settings, "train") == ["augment-array", "augment", "prune", "train"]
    finished(settings, "augment", "prune", "train")
    assert names(settings, "encode") == DRAMA and names(settings) == [*DRAMA, "rest"]
    with pytest.raises(ValueError, match="run: train is finished already"):
        submit(settings, "train", ["s.yaml"], dry_run=True)


def test_other_collections_are_stored_before_tasks_share_their_encoding(
    small_settings: Callable[..., Settings],
) -> None:
    settings = trained(small_settings("evaluate.collections=[data/cisi]"))
    jobs = {job.name: " ".join(job.command) for job in chain(settings, "run")}
    assert jobs["collections-cisi"] == "corpus --collection cisi"
    assert jobs["encode-cisi-drama-array"] == "encode --collection cisi"
    assert list(jobs).index("collections-cisi") < list(jobs).index("encode-cisi-drama-array")


def test_the_command_line_accepts_the_words_of_every_job(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(
        "train.regression_weight=1",
        "evaluate.systems=[drama,ridge,random-init,teacher,bm25]",
        "evaluate.collections=[data/cisi]",
    )
    commands = {job.name: job.command for job in chain(settings, "run")}
    assert {"targets", "ridge", "train", "train-random-init"} <= commands.keys()
    for name, (verb, *options) in commands.items():
        assert read_words([verb, "settings.yaml", "train.steps=3", *options]).verb == verb, name


def test_only_training_takes_several_nodes(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("slurm.nodes=3", "slurm.tasks_per_node=2", "evaluate.systems=[drama,random-init]")
    of_jobs = {name: options(text) for name, text in scripts(settings).items()}
    several = {name for name, options in of_jobs.items() if options["nodes"] == "3"}
    assert several == {"train", "train-random-init"}
    assert {name for name, options in of_jobs.items() if options["ntasks-per-node"] != "2"} == {
        "corpus",
        "windows",
        "encode-windows-bm25",
        "encode-corpus-bm25",
    }


def test_a_collection_that_cannot_be_had_is_told_before_anything_is_submitted(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DRAMA_CACHE", str(tmp_path / "cache"))
    for change, message in (
        ("evaluate.collections=[data/none]", "evaluate.collections=data/none: no such file or folder"),
        ("corpus.path=huggingface:a/b", "corpus.path=huggingface:a/b: is not in .* and cannot be fetched"),
    ):
        settings = small_settings(change)
        with pytest.raises((ValueError, OSError), match=message):
            submit(settings, "run", ["s.yaml"], dry_run=False)
        assert not Path(settings.run).exists()
        submit(settings, "run", ["s.yaml"], dry_run=True)  # prints what would be submitted


def test_a_line_break_does_not_become_a_line_of_the_script(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings()
    settings.slurm.partition = "all\nrm -rf /"
    with pytest.raises(ValueError, match=r"partition=all.*cannot have line breaks"):
        scripts(settings)


def test_every_setting_reaches_the_script(small_settings: Callable[..., Settings]) -> None:
    plain = options(scripts(small_settings())["encode-corpus-drama-array"])
    assert not plain.keys() & {"partition", "account", "gpus-per-node", "cpus-per-task"}
    changes = ["partition=p", "account=a", "minutes=90", "warning_seconds=60", "tasks_per_node=4", "gpus_per_node=4"]
    changes += ["cpus_per_task=8", "array=5", "options=[--mem=0]", "setup=[module load cuda,echo hello]"]
    text = scripts(small_settings(*(f"slurm.{change}" for change in changes)))["encode-corpus-drama-array"]
    expected = {"partition": "p", "account": "a", "time": "90", "signal": "B:USR1@60", "ntasks-per-node": "4"}
    expected |= {"gpus-per-node": "4", "cpus-per-task": "8", "array": "0-4", "mem": "0", "chdir": os.getcwd()}
    assert expected.items() <= options(text).items()
    assert "module load cuda\necho hello\n" in text and "export OMP_NUM_THREADS=8\n" in text
    assert "srun --cpus-per-task=8 " in text
    assert "drama_dist.cli encode 'my settings.yaml' train.steps=3 --share $SLURM_ARRAY_TASK_ID/5 &" in text


def test_the_scripts_are_good_shell(small_settings: Callable[..., Settings]) -> None:
    for text in scripts(small_settings()).values():
        assert text.startswith("#!/bin/bash\n") and "%%" not in text
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_jobs_wait_for_one_another(
    small_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho "$(wc -l <{tmp_path}/calls);cluster"\n', "utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    settings = small_settings()
    trained(settings)
    assert submit(settings, "encode", ["s.yaml"], dry_run=False) == ["1", "2"]
    first, second = (tmp_path / "calls").read_text("utf-8").splitlines()
    folder = Path(settings.run) / "slurm"
    assert first == f"--parsable --kill-on-invalid-dep=yes {folder}/encode-corpus-drama-array.sh"
    assert second == f"--parsable --kill-on-invalid-dep=yes --dependency=afterany:1 {folder}/encode-corpus-drama.sh"
    assert "--share" in (folder / "encode-corpus-drama-array.sh").read_text("utf-8")
    assert f"2  {folder}/encode-corpus-drama.sh, after encode-corpus-drama-array" in capsys.readouterr().out
    shutil.rmtree(settings.run)
    submit(settings, "augment", ["s.yaml"], dry_run=False)
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()[2:]
    waits = [match[1] if (match := re.search(r"--dependency=(\S+)", call)) else "" for call in calls]

    # After arrays: however their tasks ended.
    assert waits == [
        "",
        "afterok:3",
        "afterok:4",
        "afterok:4,afterany:5",
        "afterok:6",
        "afterok:7",
        "afterok:7,afterany:8",
    ]


def test_where_a_job_is_refused_those_before_it_are_cancelled(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, does in {
        "sbatch": 'case "$*" in *drama.sh) echo no such account >&2; exit 1;; esac; echo 7',
        "scancel": f'echo "$@" >{tmp_path}/cancelled',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"sbatch refused .*encode-corpus-drama\.sh: no such account"):
        submit(trained(small_settings()), "encode", ["s.yaml"], dry_run=False)
    assert (tmp_path / "cancelled").read_text("utf-8") == "7\n"


def test_the_command_prints_or_says_that_there_is_no_slurm(
    small_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = trained(small_settings())
    write_settings(settings, tmp_path / "s.yaml")
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["submit", str(tmp_path / "s.yaml"), "slurm.array=3", "--stage", "encode"]
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash\n") == 2 and "#SBATCH --array=0-2\n" in printed and "slurm.array=3" in printed
    assert not (Path(settings.run) / "slurm").exists()
    assert main(words) == 2
    assert "sbatch not found" in capsys.readouterr().err

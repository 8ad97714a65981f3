"""Launchers' variables: what cannot be is refused, so that no process works alone or not at all by mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drama_dist.cli import main
from drama_dist.distributed import launchers, ranks
from drama_dist.distributed.launchers import place

FAMILIES = [(each.rank, each.size, each.local_rank) for each in (launchers.TORCHRUN, *launchers.MPI, launchers.SLURM)]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    for name in (*launchers.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[int, int, int | None, int | None]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = place()
    return found.rank, found.size, found.local_rank, found.local_size


@pytest.mark.parametrize(
    "variables",
    [
        {names[index]: value for index, value in given.items()}
        for names in FAMILIES
        for given in (
            {0: "1"},
            {1: "2"},
            {0: "2", 1: "2"},
            {0: "0", 1: "0"},
            {0: "-1", 1: "2"},
            {0: "one", 1: "2"},
            {0: "1", 1: "2.0"},
            {0: "1", 1: "1_0"},
            {0: "1", 1: "2", 2: "2"},
            {0: "1", 1: "2", 2: "-1"},
            {0: "1", 1: "2", 2: "cuda:0"},
            {2: "1"},
        )
    ]
    + [
        {"RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "SLURM_PROCID": "1"},
        {"WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"},
        {"RANK": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"},
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
        {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_variables_and_values(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    with pytest.raises(ValueError) as error:
        told(monkeypatch, variables)
    message = str(error.value)
    assert any(f"{name}={value}" in message or f"{name}={value!r}" in message for name, value in variables.items())
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, None, None)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, None, None)),
        ({"WORLD_SIZE": "1"}, (0, 1, None, None)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "8"}, (0, 1, 0, 1)),
        (
            {"WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
            (5, 8, 1, None),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
            (5, 8, 1, None),
        ),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            (5, 8, 1, None),
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "TORCHELASTIC_RUN_ID": "7",
                "SLURM_PROCID": "2",
                "SLURM_STEP_NUM_TASKS": "4",
            },
            (0, 1, None, None),
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            (1, 2, None, None),
        ),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0"}, (3, 4, None, None)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (3, 4, 1, 2)),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "3",
                "SLURM_NTASKS_PER_NODE": "1",  # of the job; the step has another number
            },
            (3, 4, 3, 1),
        ),
    ],
    ids=[
        "one process",
        "empty",
        "a world of one",
        "batch script",
        "a size by hand in a step",
        "both by hand in a step",
        "torchrun in a step",
        "a torchrun of its own in each task",
        "mpirun in an interactive step",
        "mpirun in a batch script",
        "mpiexec",
        "a step with more tasks than the job's default",
    ],
)
def test_what_launchers_do_say_is_believed(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int | None, int | None]
) -> None:
    assert told(monkeypatch, variables) == expected


def test_the_command_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    settings = tmp_path / "s.yaml"
    settings.write_text(f"run: {tmp_path / 'run'}\nllm: none/none\ncorpus: {{path: {tmp_path}}}\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "drama_dist.cli", "corpus", str(settings)],
        env={**os.environ, "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.count("\n") == 1 and "RANK=1, but WORLD_SIZE is not set" in done.stderr


def test_no_stage_begins_with_a_rank_beyond_the_world(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "s.yaml"
    settings.write_text(f"run: {tmp_path / 'run'}\nllm: none/none\ncorpus: {{path: {tmp_path}}}\n", "utf-8")
    monkeypatch.setenv("SLURM_PROCID", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert main(["run", str(settings)]) == 2
    assert "SLURM_PROCID=4, SLURM_STEP_NUM_TASKS=4: a rank must be less" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

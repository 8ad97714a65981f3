"""Which rank this is, and where ranks rendezvous, by whichever launcher's variables are there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drama_dist.distributed import ranks


def set_all(patch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST"):
        patch.setenv(name, "")  # so that what the test's code sets is taken back
        patch.delenv(name)
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"},
    ],
    ids=["torchrun", "mpirun", "srun"],
)
def test_each_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_all(monkeypatch, **variables)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.local_world_size()) == (3, 8, 1, 2)


def test_the_shell_of_an_allocation_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM_JOB_ID="7", SLURM_NTASKS="8", SLURM_PROCID="0")
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    assert ranks.world_size() == 1


def test_in_a_step_of_slurm_ranks_meet_on_its_first_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[4-5]" ] && printf "gpu4\\ngpu5\\n"\n', "utf-8")
    scontrol.chmod(0o755)
    step = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gpu[4-5]",
        "SLURM_JOB_ID": "7000",
        "SLURM_STEP_ID": "1",
    }
    set_all(monkeypatch, PATH=f"{tmp_path}:/usr/bin:/bin", **step)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    ranks._rendezvous()
    assert (ranks.os.environ["MASTER_ADDR"], ranks.os.environ["MASTER_PORT"]) == ("gpu4", str(12000 + 49001 % 20000))


def test_without_a_launcher_that_says_where_the_message_names_some(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, RANK="0", WORLD_SIZE="2")
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="start several ranks with deepspeed, torchrun, srun or mpirun"):
        ranks._rendezvous()


ENDS_WHILE_GLOO_ASKS = """
import sys, time
import torch
import torch.distributed as dist
from drama_dist.distributed import ranks

ranks.start()
group = dist.group.WORLD  # something outlives stop
sys.setswitchinterval(1000)  # whoever asks for the interpreter waits
both = [torch.zeros(1), torch.zeros(1)]
dist.all_gather(both, torch.ones(1), async_op=True)
until = time.monotonic() + 3
while time.monotonic() < until:
    pass
{end}(3)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("ranks.end", 3), pytest.param("sys.exit", -signal.SIGABRT, marks=pytest.mark.slow)],
)
def test_a_rank_ends_with_its_status_while_gloo_still_frees_tensors(end: str, status: int) -> None:
    """The second case shows that the first needs care: where it fails, Python or PyTorch has mended its part."""
    program = [sys.executable, "-c", ENDS_WHILE_GLOO_ASKS.replace("{end}", end)]
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks._free_port())}
    meet = {**os.environ, **meet, "CUDA_VISIBLE_DEVICES": ""}
    started = [subprocess.Popen(program, env={**meet, "RANK": rank}) for rank in ("0", "1")]
    try:
        assert started[0].wait(timeout=120) == status
    finally:
        for rank in started:
            rank.kill()
            rank.wait()

"""mpirun: its ranks find each other, split the corpus, and leave what one process leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from drama_dist import pipeline
from drama_dist.settings import Settings, write_settings

PROGRAMS = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
}


def mpirun(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("MASTER_")}
    return subprocess.run(
        ["mpirun", "-n", "2", "--oversubscribe", *command], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each rank has: sums in another order have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_of_mpirun_write_and_encode_what_one_process_does(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changes = ["augment.synthetic_queries=12", "augment.generation_batch=4", "encode.shard_passages=10"]
    one, two = (small_settings(f"run={tmp_path / name}", *changes) for name in ("one", "two"))
    pipeline.train(one)
    pipeline.encode(one)
    run, whole = Path(two.run), Path(one.run)
    shutil.copytree(whole, run)
    for made in ("augment", "encode"):
        shutil.rmtree(run / made)
    path = tmp_path / "two.yaml"
    write_settings(two, path)
    for command in (["augment"], ["encode"]):
        done = mpirun("drama", *command, str(path))
        assert done.returncode == 0, done.stdout + done.stderr
    for folder in ("augment", "encode/teacher", "encode/drama"):
        assert '"world_size": 2' in (run / folder / "provenance.json").read_text("utf-8")
        names = {file.name for file in (whole / folder).iterdir()} - {"provenance.json"}
        assert names == {file.name for file in (run / folder).iterdir()} - {"provenance.json"}
        for name in names:
            assert (run / folder / name).read_bytes() == (whole / folder / name).read_bytes(), f"{folder}/{name}"


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(
        "from drama_dist import ranks\nranks.start()\nassert ranks.rank() == 0, 'on purpose'\nranks.barrier()\n",
        "utf-8",
    )
    done = mpirun(sys.executable, str(program))
    assert done.returncode != 0 and "on purpose" in done.stderr


def test_without_mpi4py_the_message_says_what_to_do(tmp_path: Path) -> None:
    program = tmp_path / "without.py"
    program.write_text(
        "import sys\nsys.modules['mpi4py'] = None\nfrom drama_dist import ranks\nranks.start()\n", "utf-8"
    )
    done = mpirun(sys.executable, str(program))
    assert done.returncode != 0 and "pip install mpi4py" in done.stderr and "-x MASTER_PORT" in done.stderr

"""mpirun: its ranks find each other, split the corpus, and leave what one process leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from drama_dist.distributed import ranks
from drama_dist.settings import Settings, write_settings

PROGRAMS = Path(sys.executable).parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in (*ranks.VARIABLES, "MASTER_PORT")},
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
}


def mpirun(*command: str) -> subprocess.CompletedProcess[str]:
    return start("mpirun", "-n", "2", "--oversubscribe", *command)


def start(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, also what is compared: the last bits of sums depend on what a process did before."""
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def files_below(folder: Path) -> set[Path]:
    """But for the provenance, which says how many ranks there were."""
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()} - {Path("provenance.json")}


def test_two_ranks_of_mpirun_write_and_encode_what_one_process_does(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changes = ["augment.synthetic_queries=12", "augment.generation_batch=4", "encode.shard_passages=10"]
    single, two = (small_settings(f"run={tmp_path / name}", *changes) for name in ("one", "two"))
    paths = [tmp_path / name for name in ("one.yaml", "two.yaml")]
    for path, settings in zip(paths, (single, two), strict=True):
        write_settings(settings, path)
    for done in (start("drama", "augment", str(paths[0])), mpirun("drama", "augment", str(paths[1]))):
        assert done.returncode == 0, done.stdout + done.stderr
    run, whole = Path(two.run), Path(single.run)
    for folder in ("augment", "encode/windows/teacher"):
        assert '"world_size": 2' in (run / folder / "provenance.json").read_text("utf-8")
        names = files_below(whole / folder)
        assert names == files_below(run / folder)
        for name in names:
            assert (run / folder / name).read_bytes() == (whole / folder / name).read_bytes(), f"{folder}/{name}"


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(
        "from drama_dist.distributed import ranks\nranks.start()\n"
        "assert ranks.rank() == 0, 'on purpose'\nranks.barrier()\n",
        "utf-8",
    )
    done = mpirun(sys.executable, str(program))
    assert done.returncode != 0 and "on purpose" in done.stderr


def test_without_mpi4py_the_message_says_what_to_do(tmp_path: Path) -> None:
    program = tmp_path / "without.py"
    program.write_text(
        "import sys\nsys.modules['mpi4py'] = None\nfrom drama_dist.distributed import ranks\nranks.start()\n", "utf-8"
    )
    done = mpirun(sys.executable, str(program))
    assert done.returncode != 0 and "pip install mpi4py" in done.stderr and "-x MASTER_PORT" in done.stderr

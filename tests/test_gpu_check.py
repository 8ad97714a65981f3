"""`make gpu-check` as far as it goes without a GPU: what it says, its limits, and a dry run of all parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"


def start(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, in an environment without Triton's interpreter."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), *words]
    return subprocess.run(command, env=own | variables, capture_output=True, text=True, timeout=2400)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = start("--out", str(tmp_path / "out"))
    assert done.returncode == 1 and "finds no CUDA GPU here; --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    done = start("--out", str(tmp_path), "--dry-run", TRITON_INTERPRET="1")
    assert done.returncode == 1 and "TRITON_INTERPRET=1 is set" in done.stderr


@pytest.mark.slow
def test_a_dry_run_tries_every_part(tmp_path: Path) -> None:
    done = start("--out", str(tmp_path), "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.md").read_text("utf-8").splitlines()[4:]
    assert len(lines) == 7 and all("| done |" in line for line in lines)
    assert "test_gpu.py" in (tmp_path / "tests.log").read_text("utf-8")


def test_a_part_with_an_unknown_option_would_not_end_well() -> None:
    program, environment = [sys.executable, str(PROGRAM.with_name("tiles.py")), "--check-options"], os.environ
    endings = [
        subprocess.run([*program, *words], env=environment, capture_output=True, text=True, timeout=300)
        for words in (["--size", "64"], ["--sise", "64"])
    ]
    assert [each.returncode for each in endings] == [0, 2] and "unrecognized arguments: --sise" in endings[1].stderr

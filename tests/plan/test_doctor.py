"""The doctor: a check's process may die, and what is missing is said to be missing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from drama_dist.plan import probes
from drama_dist.plan.doctor import CHECKS, Check, Finding, examine, lines


def findings(**variables: str) -> dict[str, Finding]:
    """What `drama doctor --json` says, with other variables."""
    command = [sys.executable, "-m", "drama_dist.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return {finding.name: finding for finding in (Finding(**each) for each in json.loads(done.stdout))}


def test_a_check_that_crashes_hangs_exits_or_raises_is_a_line_like_the_others() -> None:
    checks = (
        Check("crashes", os.abort, "goes on", "mend it"),
        Check("exits", partial(os._exit, 3)),
        Check("raises", partial(int, "x")),  # type: ignore[arg-type]
        Check("works", platform.system),
    )
    found = {finding.name: finding for finding in examine(checks)}
    assert found["crashes"] == Finding("crashes", False, "the check's process crashed: SIGABRT", "goes on", "mend it")
    assert found["exits"].seen == "the check's process ended with status 3"
    assert found["raises"].seen.startswith("ValueError: invalid literal for int()")
    assert found["works"] == Finding("works", True, platform.system())
    (hangs,) = examine([Check("hangs", partial(time.sleep, 60))], seconds=1)  # type: ignore[arg-type]
    assert not hangs.there and hangs.seen == "no answer in 1 s"


def test_a_finding_says_what_happens_instead_and_what_changes_that() -> None:
    text = lines(Finding("GPU", False, "none", "the CPU", "a GPU"))
    assert text.split() == ["no", "GPU", "none", "then:", "the", "CPU", "to", "change", "that:", "a", "GPU"]
    assert "then" not in lines(Finding("GPU", True, "one"))


@pytest.mark.slow
def test_without_a_compiler_the_doctor_says_so_and_names_what_goes_on(tmp_path: Path) -> None:
    with_all = findings()
    assert list(with_all) == [check.name for check in CHECKS]
    needs = ["C++ compiler", "loss on the CPU", "attention on the CPU", "layers on the CPU"]
    assert all(with_all[name].there for name in [*needs, "DeepSpeed", "faiss"])
    found = findings(PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert not any(found[name].there for name in needs)
    assert "c++" in found["C++ compiler"].seen
    assert "the loss goes on with slower PyTorch operations" in found["loss on the CPU"].seen
    assert "g++" in found["loss on the CPU"].install
    assert found["cores"].there


def test_a_command_that_is_there_and_fails_is_not_counted_as_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(probes.Missing, match="no sbatch on the path"):
        probes.slurm()
    for name in ("sbatch", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho slurm 1.2\n")
        (tmp_path / name).chmod(0o755)
    assert probes.slurm() == "slurm 1.2, nodes: slurm 1.2"
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    with pytest.raises(probes.Missing, match="sinfo: no controller"):
        probes.slurm()

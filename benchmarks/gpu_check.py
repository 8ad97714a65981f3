"""Ten minutes of a GPU: its tests, the loss over tile shapes, a step, encoding, long passages; made for a rented one.

python benchmarks/gpu_check.py [--out OUT] [--data DIR] [--model DIR] [--dry-run]

Parts come in order of importance, each in a process of its own with a limit of its own, so that a cut loses the tail
only. After each, OUT has its whole log, the results files that it wrote, and summary.md. The tests run first and
alone: with a Triton cache of their own, and every launch waited for, so that the first that fails is the one that is
named (an access beyond memory fails every later one too); then again. Without DIRs (collections in BEIR form, and the
quickstart's export) the parts that need them are left out, and say so.
--dry-run needs no GPU: every program reads its options and ends, the tests tell their names, and nothing is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
MOST_SECONDS = 600
REHEARSAL_SECONDS = 300  # of a part: a busy machine takes a minute to import everything


@dataclass(frozen=True)
class Part:
    """A program with its arguments and its limit in seconds; needs: folders without which it is left out."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def parts(data: Path, model: Path) -> list[Part]:
    """All parts, the most important first."""
    tests = ("-m", "pytest", "-rA", "--tb=long", "-p", "no:cacheprovider", "-m", "gpu or not (slow or slurm)")
    tests += ("-k", "cuda or fused or gpu", "tests/kernels/info_nce", "tests/test_gpu.py")
    lengths = ("--lengths", "1024", "8192", "--rounds", "3")
    device, folders = ("--device", "cuda"), ("--data", str(data), "--model", str(model))
    loss = ("--dtype", "bfloat16", "--sizes", "16384", "--hard-sizes", "2048")
    both = (str(data), str(model))
    return [
        Part("tests", 180, tests),
        Part("tests-again", 60, tests),
        Part("tiles", 100, ("benchmarks/tiles.py",)),
        Part("loss", 70, ("benchmarks/loss.py", *device, *loss)),
        Part("step", 90, ("benchmarks/step.py", *device, *folders, "--batches", "256", "--dtypes", "bfloat16"), both),
        Part("encode", 50, ("benchmarks/encode.py", *device, *folders, "--sets", "cisi"), both),
        Part("lengths", 50, ("benchmarks/lengths.py", *device, *folders, *lengths), both),
    ]


def rehearsed(part: Part) -> tuple[str, ...]:
    """The same program as far as its tests' names, or as its options."""
    return (*part.command, "--collect-only", "-q") if part.command[0] == "-m" else (*part.command, "--check-options")


def run(command: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> str:
    """In a process group that ends with its limit; how it ended, in words."""
    with log.open("w", encoding="utf-8") as lines:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"cut after {seconds:g} s"
    return "done" if code == 0 else f"failed, exit code {code}"


def environment_of(part: Part, out: Path, dry: bool) -> dict[str, str]:
    """Of the tests: nothing shared with any other process. What would turn a GPU's run into another is unset."""
    own = {"PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu" if dry else "cuda"}
    if part.name.startswith("tests"):
        own |= {"TRITON_CACHE_DIR": str(out / "triton-tests"), "CUDA_LAUNCH_BLOCKING": "1"}
    return own


def keep_results(out: Path, since: float) -> list[str]:
    """Copy what was written since to OUT; their names."""
    written = [path for path in sorted((BENCHMARKS / "results").iterdir()) if path.stat().st_mtime >= since]
    for path in written:
        shutil.copy2(path, out / path.name)
    return [path.name for path in written]


def last_line(log: Path) -> str:
    """The last that says something."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:160] if lines else ""


def check(options: argparse.Namespace) -> bool:
    """Run all parts; whether all that had what they need were done."""
    options.out.mkdir(parents=True, exist_ok=True)
    place = "a dry run, no GPU" if options.dry_run else torch.cuda.get_device_name()
    rows = ["| part | seconds, of | how it ended | results | last line |", "|---|--:|---|---|---|"]
    good = True
    for part in parts(options.data, options.model):
        started, began = time.monotonic(), time.time()
        missing = [folder for folder in part.needs if not Path(folder).is_dir()]
        if missing and not options.dry_run:
            ended, results, said = f"left out: no folder {', '.join(missing)}", [], ""
        else:
            log = options.out / f"{part.name}.log"
            command = rehearsed(part) if options.dry_run else part.command
            environment = environment_of(part, options.out, options.dry_run)
            limit = REHEARSAL_SECONDS if options.dry_run else part.seconds
            ended = run(command, limit, log, environment)
            results, said = keep_results(options.out, began), last_line(log)
            good = good and ended == "done"
        taken = time.monotonic() - started
        rows.append(f"| {part.name} | {taken:.0f}, {part.seconds} | {ended} | {', '.join(results)} | {said} |")
        text = f"# gpu-check: {place}\n\n" + "\n".join(rows) + "\n"
        (options.out / "summary.md").write_text(text, "utf-8")
        print(f"{part.name}: {ended} ({taken:.0f} s of {part.seconds})", flush=True)
    print(options.out / "summary.md")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu-check"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with xquad-en/, cisi/ and time/")
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/export"), help="an exported folder")
    parser.add_argument("--dry-run", action="store_true", help="try everything that needs no GPU")
    options = parser.parse_args()
    for name in ("out", "data", "model"):  # parts run in the repository's root
        setattr(options, name, getattr(options, name).absolute())
    assert sum(part.seconds for part in parts(options.data, options.model)) <= MOST_SECONDS
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu-check: PyTorch finds no CUDA GPU here; --dry-run tries what needs none")
    if interpreting := os.environ.get("TRITON_INTERPRET"):
        raise SystemExit(
            f"gpu-check: TRITON_INTERPRET={interpreting} is set, with which no kernel runs on a GPU: unset it"
        )
    raise SystemExit(0 if check(options) else 1)


if __name__ == "__main__":
    main()

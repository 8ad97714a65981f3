"""The only place that times: sides of a comparison in turns, peak memory, and the results files.

A round runs every side once, so that a change of the machine's load meets all of them; the first rounds
are not counted. Freed memory goes back to the system before each run, so every side pays for its own
pages. Memory is the process's peak above what it held before (Linux: VmHWM of /proc/self/status; CUDA:
PyTorch's own count).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from drama_dist.distributed.precision import AUTO, bfloat16_instructions, cpuinfo, dtype_name

RESULTS = Path(__file__).parent / "results"
DTYPES = ("bfloat16", "float32")
NOTES = "## Notes"  # in a results file: what a person wrote below stays when the file is written again
MACHINE = ("processor", "threads")  # what tells machines apart
PACKAGES = ("torch", "triton", "sentence-transformers", "transformers", "inf-cl", "liger-kernel")


@dataclass(frozen=True)
class Measured:
    """Of the rounds: median, fastest and slowest seconds. megabytes: extra peak memory, the rounds' median or alone."""

    seconds: float
    fastest: float
    slowest: float
    megabytes: float
    rounds: int


def in_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, Measured]:
    """Median time and peak memory of every side, over `rounds` rounds after `warm_up` that do not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    with tqdm(total=(warm_up + rounds) * len(sides), unit=" calls", mininterval=1, leave=False) as bar:
        for number, (name, call) in product(range(warm_up + rounds), sides.items()):
            bar.set_description(name)
            held = begin(device)
            started = time.perf_counter()
            call()
            _wait(device)
            took = time.perf_counter() - started
            if number >= warm_up:
                memory[name].append(peak_megabytes(device) - held)
                times[name].append(took)
            bar.update()
    return {
        name: Measured(statistics.median(taken), min(taken), max(taken), statistics.median(memory[name]), rounds)
        for name, taken in times.items()
    }


def alone_megabytes(prepare: Callable[[], Callable[[], Any]], device: str) -> float:
    """Extra peak memory of two calls of what `prepare` gives, on CPUs in a process of their own.

    `prepare` (one that can be pickled) makes what is not counted: inputs, and what a first call takes once. In a
    process that runs other sides too, the heap that they leave is full of holes; CUDA's count is of what is in use.
    """
    if device == "cuda":
        return _peak_of(prepare, device)
    held_megabytes(device)  # gives freed memory back, which the other process needs
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of, prepare, device).result()


def _peak_of(prepare: Callable[[], Callable[[], Any]], device: str) -> float:
    call = prepare()
    held = begin(device)
    for _ in range(2):  # the first may leave something for later ones, as an optimiser's state
        call()
    return peak_megabytes(device) - held


def arguments(
    doc: str | None,
    rounds: int = 5,
    data: str | None = None,
    model: bool = False,
    devices: Sequence[str] = ("cpu", "cuda"),
    dtype: bool = False,
) -> argparse.ArgumentParser:
    """What every benchmark can be told; data: what its folder must hold; dtype: whether it runs in a chosen one."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    if data:
        parser.add_argument("--data", type=Path, required=True, help=f"folder with {data} in BEIR form")
    if model:
        parser.add_argument("--model", type=Path, default=Path("runs/quickstart/export"), help="an exported folder")
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--check-options", action="store_true", help="end when the options are read")
    if dtype:
        parser.add_argument("--dtype", choices=(AUTO, *DTYPES), default=AUTO, help="auto: what suits the machine")
    return parser


def seconds_of(one: Measured) -> str:
    """Median (fastest–slowest), to three digits or more."""
    decimals = max(0, 2 - math.floor(math.log10(one.seconds)))
    return f"{one.seconds:.{decimals}f} ({one.fastest:.{decimals}f}–{one.slowest:.{decimals}f})"


def rate_of(count: int, one: Measured) -> str:
    """So many a second: median (slowest–fastest)."""
    return f"{count / one.seconds:.0f} ({count / one.slowest:.0f}–{count / one.fastest:.0f})"


def use(options: argparse.Namespace) -> None:
    """Keep to the chosen device, in everything that chooses for itself, and settle the dtype.

    Ends the program where there is no CUDA, and with --check-options.
    """
    if options.check_options:
        raise SystemExit(0)
    os.environ["DS_ACCELERATOR"] = options.device
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no CUDA GPU here")
    if "dtype" in options:
        options.dtype = dtype_name(options.dtype)


def held_megabytes(device: str) -> float:
    """What the process holds now; freed memory is given back first."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") / 1e6


def begin(device: str) -> float:
    """Let `peak_megabytes` count from here on; returns what the process holds."""
    held = held_megabytes(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return held


def peak_megabytes(device: str) -> float:
    """The most that the process has held at once since `begin`."""
    return (float(torch.cuda.max_memory_allocated()) if device == "cuda" else _status("VmHWM")) / 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith(field)))


def processor() -> str:
    """The processor's name, and its bfloat16 instructions."""
    name = cpuinfo("model name") or platform.processor()
    return f"{name} ({', '.join(bfloat16_instructions()) or 'no bfloat16 instructions'})"


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Machine, date, versions and command."""
    return {
        "machine": {
            "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: found for name in PACKAGES if (found := _of(name))}},
        "command": f"python {' '.join(map(_without_folders, sys.argv))}",
    }


def _without_folders(word: str) -> str:
    """An absolute path's last part: where this machine keeps it is nobody's business."""
    return Path(word).name if Path(word).is_absolute() else word


def _commit() -> str:
    """Of this clone, without regard to its results; empty outside of one."""
    of_head = ["git", "rev-parse", "--short", "HEAD"]
    of_files = ["git", "status", "--porcelain", "--untracked-files=no", ":!benchmarks/results"]
    try:
        commit, changes = (
            subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True).stdout
            for command in (of_head, of_files)
        )
    except OSError:
        return ""
    return commit.strip() + (" with changes" if changes else "")


def _of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_row(measured: Measured) -> dict[str, Any]:
    """For the JSON file."""
    return asdict(measured)


def earlier_rows(name: str) -> list[dict[str, Any]]:
    """The rows of results/NAME.json; none where it was not measured."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    return rows


def add_row(rows: list[dict[str, Any]], row: dict[str, Any], facts: dict[str, Any], *keys: str) -> None:
    """Put a row, stamped with when, where and how it was measured, in place of the same machine's of equal `keys`."""
    stamp = {name: facts[name] for name in ("date", "commit", "command", "versions")}
    stamp |= {name: facts["machine"][name] for name in MACHINE}
    row = stamp | json.loads(json.dumps(row))  # as it is when read again: lists for tuples
    for place, one in enumerate(rows):
        if all(one[key] == row[key] for key in (*keys, *MACHINE)):
            rows[place] = row
            return
    rows.append(row)


def by_run(rows: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str]) -> str:
    """Markdown: a table for each run, under its machine, versions and command."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(_run(row), []).append(row)
    return "\n\n".join(f"{heading}\n\n{table(own)}" for heading, own in runs.items())


def _run(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"""## {row["processor"]}, {row["threads"]} threads, {row["date"]}

Commit {row["commit"] or "unknown"}, {versions}. Command: `{row["command"]}`."""


def write_rows(
    name: str, rows: list[dict[str, Any]], legend: str, table: Callable[[list[dict[str, Any]]], str]
) -> Path:
    """Write results/NAME.json and results/NAME.md of rows that `add_row` stamped."""
    return _write(name, {"rows": rows}, f"{legend}\n\n{by_run(rows, table)}")


def write_results(name: str, facts: dict[str, Any], rows: list[dict[str, Any]], markdown: str) -> Path:
    """Write results/NAME.json and results/NAME.md of one run, under a heading that says where and when."""
    machine, versions = facts["machine"], ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    heading = f"""{facts["date"]}, {machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} threads, \
{machine["system"]};
commit {facts["commit"] or "unknown"}, {versions}. Command: `{facts["command"]}`."""
    return _write(name, {**facts, "rows": rows}, f"{heading}\n\n{markdown}")


def _write(name: str, content: dict[str, Any], markdown: str) -> Path:
    """The notes that the file has stay below."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    path = RESULTS / f"{name}.md"
    _, heading, notes = path.read_text("utf-8").partition(NOTES) if path.exists() else ("", "", "")
    path.write_text(f"# {name}\n\n{markdown}\n" + (f"\n{heading}{notes}" if heading else ""), "utf-8")
    return path

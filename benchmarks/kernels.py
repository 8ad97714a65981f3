"""What the compilers make of the Triton kernels, beside what their memory traffic takes at least: nothing was timed.

python benchmarks/kernels.py [--forms chunks fused] [--processes ...]

Every shipped variant is compiled for every target; registers, spills and shared memory are the compilers' own report
(kernels/info_nce/ahead_of_time.py). The chunks' kernels stand between matrix products, which are the library's: a
score of each dim is read once and, for gradients, written once. Milliseconds are those bytes for B = N = 8,192 at the
bandwidth of NVIDIA's data sheets (A100 80GB SXM 2,039 GB/s, H100 SXM 3,350 GB/s).

The fused kernels have the products inside; of them the instructions of a tile are counted in the machine code, for
each score and dim: outside the loops over components, where a score is taken up, and inside. They have a file of
their own, kernels-fused.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import circumstances, write_results
from tqdm import tqdm

from drama_dist.kernels.info_nce import ahead_of_time
from drama_dist.kernels.info_nce.ahead_of_time import TARGETS, Compiled, Variant

ROWS = COLUMNS = 8192
BANDWIDTHS = {"sm_80": ("A100", 2039e9), "sm_90": ("H100", 3350e9)}
READ = 4  # bytes of a score
WRITTEN = {"bf16": 2, "fp16": 2, "fp32": 4}  # of a gradient


def least_milliseconds(variant: Variant, target: str) -> float | None:
    """Of one launch over all scores, by memory; None for the norms' kernels, which see vectors only."""
    constants = dict(variant.constants)
    if target not in BANDWIDTHS or "M" not in constants or variant.kernel.startswith("fused"):
        return None
    teacher = variant.kernel == "soft rows" or constants.get("HAS_TEACHER", False)
    written = WRITTEN[variant.precision] if variant.kernel == "gradients" else 0
    bytes_of_pair = (READ + written) * constants["M"] + READ * teacher
    return 1e3 * bytes_of_pair * ROWS * COLUMNS / BANDWIDTHS[target][1]


def compile_all(form: str, processes: int | None) -> list[tuple[str, Variant, Compiled]]:
    """Every variant of a form for every target."""
    jobs = [
        (target, variant)
        for target in TARGETS
        for variant in (ahead_of_time.variants() if form == "chunks" else ahead_of_time.fused_variants(target))
    ]
    targets, variants = zip(*jobs, strict=True)
    with ProcessPoolExecutor(processes) as pool:
        reports = pool.map(ahead_of_time.compile_variant, variants, targets)
        shown = tqdm(reports, total=len(jobs), unit=" kernels")
        return [(*job, report) for job, report in zip(jobs, shown, strict=True)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a section a target."""
    lines = ["Compiled, not measured: no GPU was used. Milliseconds are lower bounds of one launch."]
    for target in TARGETS:
        name = BANDWIDTHS[target][0] if target in BANDWIDTHS else None
        heads = ["kernel", "registers", "spilled bytes", "shared bytes", *(["memory ms"] if name else [])]
        lines += ["", f"## {target}{f' ({name})' if name else ''}", ""]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in (row for row in rows if row["target"] == target):
            cells = [row["kernel"], *(str(row["compiled"][name]) for name in ("registers", "spilled", "shared"))]
            if name:
                cells.append("–" if row["memory_ms"] is None else f"{row['memory_ms']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fused_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a section a target."""
    lines = [
        "Compiled, not measured: no GPU was used. Instructions are a thread's, for each score and dim: outside the",
        "loops over components, of which exponentials; and in these loops (–: some are unrolled, and counted outside).",
    ]
    heads = ["kernel", "registers", "spilled bytes", "shared bytes", "outside", "exponentials", "in loops", "products"]
    for target in TARGETS:
        lines += ["", f"## {target}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in (row for row in rows if row["target"] == target):
            found = row["compiled"]
            counts = [
                "–" if found[name] is None else f"{found[name]:.1f}" for name in ("outside", "exponentials", "in_loops")
            ]
            cells = [row["kernel"], *(str(found[name]) for name in ("registers", "spilled", "shared")), *counts]
            lines.append(f"| {' | '.join(cells)} | {found['matrix'] or '–'} |")
    return "\n".join(lines)


FORMS = {"chunks": ("kernels-compiled", table), "fused": ("kernels-fused", fused_table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    for form in options.forms:
        print(_written(form, options.processes))


def _written(form: str, processes: int | None) -> Path:
    name, table_of = FORMS[form]
    rows = [
        {
            "target": target,
            "kernel": variant.name,
            "compiled": asdict(report),
            "memory_ms": least_milliseconds(variant, target),
        }
        for target, variant, report in compile_all(form, processes)
    ]
    return write_results(name, circumstances(), rows, table_of(rows))


if __name__ == "__main__":
    main()

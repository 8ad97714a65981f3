"""What the compilers make of the Triton kernels, beside what their memory traffic takes at least: nothing was timed.

python benchmarks/kernels.py

Every shipped variant is compiled for every target; registers, spills and shared memory are the compilers' own report
(kernels/info_nce/ahead_of_time.py). The kernels stand between matrix products, which are the library's: a score of each
dim is read once and, for gradients, written once. Milliseconds are those bytes for B = N = 8,192 at the bandwidth of
NVIDIA's data sheets (A100 80GB SXM 2,039 GB/s, H100 SXM 3,350 GB/s).
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
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
    if target not in BANDWIDTHS or "M" not in constants:
        return None
    teacher = variant.kernel == "soft rows" or constants.get("HAS_TEACHER", False)
    written = WRITTEN[variant.precision] if variant.kernel == "gradients" else 0
    bytes_of_pair = (READ + written) * constants["M"] + READ * teacher
    return 1e3 * bytes_of_pair * ROWS * COLUMNS / BANDWIDTHS[target][1]


def compile_all() -> list[tuple[str, Variant, Compiled]]:
    """Every variant for every target, on all cores."""
    jobs = [(target, variant) for target in TARGETS for variant in ahead_of_time.variants()]
    targets, variants = zip(*jobs, strict=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    rows = [
        {
            "target": target,
            "kernel": variant.name,
            "compiled": asdict(report),
            "memory_ms": least_milliseconds(variant, target),
        }
        for target, variant, report in compile_all()
    ]
    print(write_results("kernels-compiled", circumstances(), rows, table(rows)))


if __name__ == "__main__":
    main()

"""What the compilers make of the Triton kernels, beside a roofline: nothing here was timed.

python benchmarks/kernels.py

Every shipped variant is compiled for every target; registers, spills and shared memory are the compilers' own
report (kernels/ahead_of_time.py), matrix instructions are counted in the assembly. Matrix products, operations and
bytes follow from the tile shapes, for B = N = 8,192 and dims 768, 512 and 256. The roofline takes the peaks of
NVIDIA's data sheets (A100 80GB SXM: 312 Tflop/s in bfloat16, 2,039 GB/s; H100 SXM: 989 Tflop/s, 3,350 GB/s).
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from measure import circumstances, write_results
from tqdm import tqdm

from drama_dist.kernels import ahead_of_time
from drama_dist.kernels.ahead_of_time import DIMS, TARGETS, Compiled, Variant

ROWS = COLUMNS = 8192
PEAKS = {"sm_80": ("A100", 312e12, 2039e9), "sm_90": ("H100", 989e12, 3350e9)}
HALF_BYTES = 2


def products(variant: Variant) -> float | None:
    """B × N × K products of one launch; None for the pooling kernels."""
    chosen = dict(variant.constants)
    if variant.kernel == "separate":  # the scores once more for every segment, and the segment's own product
        segments = sum(-(-(end - begin) // chosen["SEGMENT"]) for begin, end in zip((0, *DIMS), DIMS, strict=False))
        return segments + 1.0
    return {"forward": 1.0, "shared": 3.0}.get(variant.kernel)


def bound(variant: Variant, target: str) -> dict[str, float] | None:
    """Least milliseconds of one launch by arithmetic, and by memory if no tile is found in a cache, or if all are."""
    count = products(variant)
    if target not in PEAKS or count is None or variant.precision == "fp32":
        return None
    _, flops, bandwidth = PEAKS[target]
    chosen = dict(variant.constants)
    tiles = (ROWS // chosen["BLOCK_R"]) * (COLUMNS // chosen["BLOCK_C"])
    uncached = count * tiles * (chosen["BLOCK_R"] + chosen["BLOCK_C"]) * max(DIMS) * HALF_BYTES
    once = (ROWS + COLUMNS) * max(DIMS) * HALF_BYTES
    return {
        "arithmetic": 1e3 * count * 2 * ROWS * COLUMNS * max(DIMS) / flops,
        "memory, no cache": 1e3 * uncached / bandwidth,
        "memory, each vector once": 1e3 * once / bandwidth,
    }


def compile_all() -> list[tuple[str, Variant, Compiled]]:
    """Every variant for every target, on all cores."""
    jobs = [(target, variant) for target in TARGETS for variant in ahead_of_time.variants(target)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(ahead_of_time.compile_variant, *zip(*((v, t) for t, v in jobs), strict=True))
        return [
            (*job, report) for job, report in zip(jobs, tqdm(reports, total=len(jobs), unit=" kernels"), strict=True)
        ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a section a target."""
    lines = ["Computed and compiled, not measured: no GPU was used. Milliseconds are lower bounds of one launch."]
    for target in TARGETS:
        name = PEAKS[target][0] if target in PEAKS else None
        lines += ["", f"## {target}{f' ({name})' if name else ''}", ""]
        heads = ["kernel", "registers", "spilled", "shared bytes", "matrix instructions", "products"]
        heads += ["arithmetic ms", "memory ms (each vector once – no cache)"] if name else []
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join(_cells(row, bool(name)))} |" for row in rows if row["target"] == target]
    return "\n".join(lines)


def _cells(row: dict[str, Any], roofline: bool) -> list[str]:
    report, limits = row["compiled"], row["bound_ms"]
    instructions = ", ".join(f"{count} {kind}" for kind, count in report["matrix_instructions"].items()) or "none"
    cells = [row["kernel"], *(str(report[name]) for name in ("registers", "spilled", "shared")), instructions]
    cells.append("–" if row["products"] is None else f"{row['products']:g}")
    if roofline:
        cells += (
            ["–", "–"]
            if limits is None
            else [
                f"{limits['arithmetic']:.2f}",
                f"{limits['memory, each vector once']:.2f} – {limits['memory, no cache']:.2f}",
            ]
        )
    return cells


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    rows = [
        {
            "target": target,
            "kernel": variant.name,
            "compiled": asdict(report),
            "products": products(variant),
            "bound_ms": bound(variant, target),
        }
        for target, variant, report in compile_all()
    ]
    print(write_results("kernels-compiled", circumstances(), rows, table(rows)))


if __name__ == "__main__":
    main()

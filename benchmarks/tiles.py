"""The loss's two forms on a GPU, and the fused one over a list of tile shapes: what decides which is kept, and how.

python benchmarks/tiles.py [--size 16384] [--few 2048] [--rounds 7]

B = N = size, dims 768/512/256, bfloat16. First the chunks as they are; then the fused form's forward pass with every
shape of ROWS, its whole call with the fastest of these and every shape of GRADIENTS; then both forms as training calls
them (float32 vectors, rounded), with one dim, and on few rows. A shape that fails, or disagrees with the chunks, gets
no time. The results file is written after every line.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from loss import DIMS, FEW, Step, disagreement, ours, vectors
from measure import arguments, as_row, circumstances, in_turns, use, write_results

from drama_dist.kernels.info_nce import fused
from drama_dist.kernels.info_nce.fused import Shape

ROWS = (  # queries, passages, components of a step, warps, stages
    Shape(128, 128, 64, 8, 3),
    Shape(128, 128, 64, 8, 4),
    Shape(128, 128, 64, 4, 3),
    Shape(128, 128, 128, 8, 2),
    Shape(128, 256, 64, 8, 3),
    Shape(64, 128, 64, 4, 4),
    Shape(64, 256, 64, 4, 3),
    Shape(128, 64, 64, 4, 4),
)
GRADIENTS = (
    Shape(128, 128, 64, 8, 3),
    Shape(64, 128, 64, 8, 3),
    Shape(64, 128, 64, 4, 4),
    Shape(128, 64, 64, 4, 3),
    Shape(64, 64, 64, 4, 4),
    Shape(128, 128, 64, 16, 3),
    Shape(128, 128, 128, 8, 2),
)
AGREEMENT = (0.002, 0.01)  # of the loss, and of the gradients' norm; both sides multiply in bfloat16


def forward(leaves: list[torch.Tensor], dims: tuple[int, ...], backend: str) -> Step:
    """Without gradients: the loss three times."""
    return ours(*(leaf.detach() for leaf in leaves), dims, backend, learns=False)


def timed(name: str, step: Step, exact: tuple[torch.Tensor, ...] | None, options: argparse.Namespace) -> dict[str, Any]:
    """One line; exact: what a whole call is to agree with."""
    row: dict[str, Any] = {"side": name}
    try:
        if exact is not None:
            row["disagreement"] = disagreement(exact, step())
            if any(not found <= most for found, most in zip(row["disagreement"], AGREEMENT, strict=True)):
                return row | {"failed": "disagrees with the chunks"}
        return row | {"measured": as_row(in_turns({name: step}, options.rounds, "cuda", warm_up=2)[name])}
    except Exception as error:  # a shape that a chip cannot take: the next is tried
        return row | {"failed": f"{type(error).__name__}: {error}"[:200]}


class Report:
    """The lines so far, in the results file."""

    def __init__(self, options: argparse.Namespace):
        self.rows: list[dict[str, Any]] = []
        self._options, self._facts = options, circumstances("cuda")

    def add(self, name: str, step: Step, exact: tuple[torch.Tensor, ...] | None = None) -> float:
        """Returns the median's seconds; infinity for a failure."""
        self.rows.append(timed(name, step, exact, self._options))
        write_results("tiles-cuda-bfloat16", self._facts, self.rows, table(self.rows))
        return float(self.rows[-1].get("measured", {}).get("seconds", torch.inf))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["Milliseconds: median (fastest to slowest).", "", "| side | ms | MB | difference |", "|---|--:|--:|---|"]
    for row in rows:
        difference = ", ".join(f"{found:.1e}" for found in row.get("disagreement", ()))
        if "failed" in row:
            lines.append(f"| {row['side']} | {row['failed']} | | {difference} |")
            continue
        found = row["measured"]
        taken = [1e3 * found[name] for name in ("seconds", "fastest", "slowest")]
        lines.append(
            f"| {row['side']} | {taken[0]:.2f} ({taken[1]:.2f}–{taken[2]:.2f}) | {found['megabytes']:.0f} "
            f"| {difference} |"
        )
    return "\n".join(lines)


def try_shapes(report: Report, leaves: list[torch.Tensor], dims: tuple[int, ...]) -> None:
    """Leaves the fastest in fused.TILES."""
    exact = ours(*leaves, dims, "cuda")()
    report.add("chunks", ours(*leaves, dims, "cuda"))
    report.add("chunks, forward", forward(leaves, dims, "cuda"))
    loss = forward(leaves, dims, "cuda")()
    usual = fused.shapes(torch.bfloat16, True, len(dims))
    best = usual
    fastest = torch.inf
    for shape in ROWS:
        fused.TILES = replace(usual, rows=shape)
        seconds = report.add(f"fused, forward, {shape}", forward(leaves, dims, "fused"), loss)
        if seconds < fastest:
            fastest, best = seconds, fused.TILES
    fastest = torch.inf
    for shape in GRADIENTS:
        fused.TILES = replace(best, gradients=shape)
        seconds = report.add(f"fused, {shape}", ours(*leaves, dims, "fused"), exact)
        if seconds < fastest:
            fastest, chosen = seconds, fused.TILES
    fused.TILES = chosen if fastest < torch.inf else best


def main() -> None:
    parser = arguments(__doc__, rounds=7, devices=("cuda",))
    parser.set_defaults(device="cuda", dtype="bfloat16")
    parser.add_argument("--size", type=int, default=16384, help="B = N")
    parser.add_argument("--few", type=int, default=2048, help="B, with N = size")
    options = parser.parse_args()
    use(options)
    one, three, _ = DIMS
    report = Report(options)
    leaves = vectors(options.size, options.size, max(three), options)
    for form in ("cuda", "fused"):  # compiled on few rows first
        ours(*(leaf[:FEW].detach().requires_grad_() for leaf in leaves), three, form)()
    try_shapes(report, leaves, three)
    few = vectors(options.few, options.size, max(three), options)
    for form in ("cuda", "fused"):
        wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
        call = partial(ours, backend=form)
        report.add(f"{form}, as training calls it", call(*wide, three, rounded=True))
        report.add(f"{form}, one dim", call(*leaves, one))
        report.add(f"{form}, {options.few} rows", call(*few, three))
        report.add(f"{form}, {options.few} rows, one dim", call(*few, one))
    print(table(report.rows))


if __name__ == "__main__":
    main()

"""Soft targets from a teacher beside InfoNCE alone, forward and backward, on given vectors; and both beside dense ones.

python benchmarks/soft_targets.py [--sizes 4096] [--dtype auto] [--device cpu] [--rounds 5]

All sides get the same embeddings and the soft targets the same teacher, of 384 components; once with sparse logits
beside them, 100 for a query. dense: what one writes without a library, a matrix of scores for every dim and one of the
teacher's. Memory is what two calls of a side add at their peak, vectors aside, on CPUs in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from loss import FEW, TEMPERATURE, Step, disagreement, ours, vectors
from measure import (
    Measured,
    add_row,
    alone_megabytes,
    arguments,
    as_row,
    by_run,
    circumstances,
    earlier_rows,
    in_turns,
    seconds_of,
    use,
    write_rows,
)
from torch.nn.functional import kl_div, normalize

from drama_dist.kernels import SparseLogits, TeacherScores, soft_targets

DIMS = (768, 512, 256)
COMPONENTS, ENTRIES = 384, 100


def teacher_of(rows: int, columns: int, device: str, sparse: bool = False) -> TeacherScores:
    """Logits of a few units."""
    generator = torch.Generator().manual_seed(rows + 1)
    sides = (
        COMPONENTS**-0.25 * 3**0.5 * torch.randn(count, COMPONENTS, generator=generator) for count in (rows, columns)
    )
    entries = min(ENTRIES, columns)
    names = torch.rand(rows, columns, generator=generator).topk(entries).indices.sort().values
    values = 3 * torch.rand(rows * entries, generator=generator)
    logits = SparseLogits(entries * torch.arange(rows + 1), names.flatten(), values)
    return TeacherScores(*sides, logits if sparse else None).to(torch.device(device))


def soft(queries: torch.Tensor, passages: torch.Tensor, teacher: TeacherScores) -> Step:
    """The public function."""

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result = soft_targets(queries, passages, teacher, temperature=TEMPERATURE, dims=DIMS)
        return (result.loss.detach(), *torch.autograd.grad(result.loss, (queries, passages)))

    return step


def dense(queries: torch.Tensor, passages: torch.Tensor, teacher: TeacherScores) -> Step:
    """Without sparse logits."""

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        targets = (teacher.queries_BT @ teacher.passages_NT.T).softmax(1)
        loss = torch.zeros((), device=queries.device)
        for dim in DIMS:
            scores = normalize(queries[:, :dim], dim=1) @ normalize(passages[:, :dim], dim=1).T / TEMPERATURE
            loss = loss + kl_div(scores.float().log_softmax(1), targets, reduction="batchmean") / len(DIMS)
        return (loss.detach(), *torch.autograd.grad(loss, (queries, passages)))

    return step


def sides_of(rows: int, columns: int, options: argparse.Namespace) -> dict[str, Step]:
    """Every side, on the same vectors."""
    leaves = vectors(rows, columns, max(DIMS), options)
    teacher = teacher_of(rows, columns, options.device)
    return {
        "InfoNCE": ours(*leaves, DIMS),
        "soft targets": soft(*leaves, teacher),
        "with sparse": soft(*leaves, teacher_of(rows, columns, options.device, sparse=True)),
        "dense": dense(*leaves, teacher),
    }


def _prepared(name: str, size: int, options: argparse.Namespace) -> Step:
    """One side, for its memory; imports and builds are done, on a few rows."""
    sides_of(FEW, FEW, options)[name]()
    return sides_of(size, size, options)[name]


def measure(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    sides: dict[str, Callable[[], Any]] = dict(sides_of(size, size, options))
    loss, gradients = disagreement(sides["soft targets"](), sides["dense"]())
    measured = {
        name: replace(value, megabytes=alone_megabytes(partial(_prepared, name, size, options), options.device))
        for name, value in in_turns(sides, options.rounds, options.device).items()
    }
    return {
        "size": size,
        "measured": {name: as_row(value) for name, value in measured.items()},
        "disagreement": [loss, gradients],
    }


LEGEND = f"""Seconds (median; fastest to slowest) and extra peak MB, on CPUs alone in a process; dims
{"/".join(map(str, DIMS))}, a teacher of {COMPONENTS} components, with sparse {ENTRIES} entries a query. over
InfoNCE: soft targets over InfoNCE alone, without sparse logits and with them; over dense: over plain PyTorch."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds and megabytes of each side, and ratios."""
    names = list(rows[0]["measured"])
    heads = ["B = N", *names, "over InfoNCE", "with sparse", "over dense", "difference from dense (loss, gradients)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        measured = {name: Measured(**value) for name, value in row["measured"].items()}
        seconds = {name: value.seconds for name, value in measured.items()}
        cells = [
            str(row["size"]),
            *(f"{seconds_of(measured[name])}, {measured[name].megabytes:.0f}" for name in names),
            f"{seconds['soft targets'] / seconds['InfoNCE']:.2f}",
            f"{seconds['with sparse'] / seconds['InfoNCE']:.2f}",
            f"{seconds['soft targets'] / seconds['dense']:.2f}",
            ", ".join(f"{error:.1e}" for error in row["disagreement"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, dtype=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096], help="B = N")
    options = parser.parse_args()
    use(options)
    name, facts = f"soft-targets-{options.device}-{options.dtype}", circumstances(options.device)
    rows = earlier_rows(name)
    for size in options.sizes:
        add_row(rows, measure(size, options), facts, "size")
        path = write_rows(name, rows, LEGEND, table)
    print(by_run(rows, table), path, sep="\n")


if __name__ == "__main__":
    main()

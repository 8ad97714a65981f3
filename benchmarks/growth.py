"""Growth: time and memory of the loss, and of a training step, as the batch doubles.

python benchmarks/growth.py [--loss 1024 ... 32768] [--step 1024 ... 32768] [--dtype auto]

The loss: B = N, dims 768, 512 and 256, given vectors; time grows with B², memory should grow with B.
The step: B pairs of texts of 8 and 24 random tokens (all that matters here is how many there are), the
quickstart's encoder, nothing kept: memory should hardly grow.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lengths import on_pairs, training_step
from loss import ours
from measure import Measured, arguments, as_row, circumstances, in_turns, seconds_of, use, write_results

DIMS = (768, 512, 256)
TOKENS = (8, 24)  # of a query and of a passage
CHUNK_TOKENS = 4096


def loss_rows(sizes: list[int], rounds: int, device: str, dtype: str) -> list[dict[str, Any]]:
    """The loss alone."""
    sides = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        sides_of = [
            torch.randn(size, max(DIMS), generator=generator).to(device, getattr(torch, dtype)) for _ in range(2)
        ]
        sides[str(size)] = ours(*(side.requires_grad_() for side in sides_of), DIMS)
    return _rows("loss", sides, rounds, device)


def step_rows(model: Path, sizes: list[int], rounds: int, device: str, dtype: str) -> list[dict[str, Any]]:
    """The training step, without checkpointed layers."""
    step = training_step(model, dtype, CHUNK_TOKENS, checkpointed=False)
    vocabulary = step.encoder.backbone.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    sides = {}
    for size in sizes:
        texts = [torch.randint(vocabulary, (size, length), generator=generator).tolist() for length in TOKENS]
        sides[str(size)] = partial(on_pairs, step, [*texts[0], *texts[1]])
    return _rows("step", sides, rounds, device)


def _rows(job: str, sides: dict[str, Any], rounds: int, device: str) -> list[dict[str, Any]]:
    measured = in_turns(sides, rounds, device)
    return [{"job": job, "batch": int(size), "measured": as_row(side)} for size, side in measured.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each line with its growth over the one before."""
    lines = [
        "Median; fastest to slowest round. Growth is over the line before, where the batch is half.",
        "",
        "| job | batch | seconds | growth | extra peak MB | growth |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    before: dict[str, Measured] = {}
    for row in rows:
        measured = Measured(**row["measured"])
        last = before.get(row["job"])
        growth = (
            ["", ""]
            if last is None
            else [
                f"{measured.seconds / last.seconds:.2f}",
                f"{measured.megabytes / max(1.0, last.megabytes):.2f}",
            ]
        )
        lines.append(
            f"| {row['job']} | {row['batch']} | {seconds_of(measured)} | {growth[0]} "
            f"| {measured.megabytes:.0f} | {growth[1]} |"
        )
        before[row["job"]] = measured
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, rounds=3, model=True, dtype=True)
    parser.add_argument("--loss", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--step", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384, 32768])
    options = parser.parse_args()
    use(options)
    where = options.rounds, options.device, options.dtype
    rows = loss_rows(options.loss, *where) + step_rows(options.model, options.step, *where)
    print(
        table(rows),
        write_results(f"growth-{options.device}-{options.dtype}", circumstances(options.device), rows, table(rows)),
        sep="\n",
    )


if __name__ == "__main__":
    main()

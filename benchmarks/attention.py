"""Attention on the CPU: ours, PyTorch's flash kernel, and plain products, by length of the sequences.

python benchmarks/attention.py [--dtype auto] [--lengths 16 ... 8192] [--tokens 8192] [--rounds 7]

All get the same rows of queries, keys and values, 6 heads of 64 as in the quickstart's encoder, and give
rows of attended heads and, in training, the rows' gradients. Plain products are left out beyond PLAIN_LIMIT tokens:
their scores are heads × length × length. encoder/attention.py, for layers that are not fused, takes plain products for
gradients up to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Measured, arguments, as_row, circumstances, in_turns, seconds_of, use, write_results
from torch.nn.functional import scaled_dot_product_attention

from drama_dist.encoder.attention import plain_attention
from drama_dist.kernels.llama_cpu.attention import attend

HEADS, SIZE = 6, 64
SCALING = SIZE**-0.5
PLAIN_LIMIT = 1024
AGREEMENT = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # relative difference of outputs and gradients
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Side = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(rows: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """The kernel."""
    return attend(rows, boundaries, SCALING)


def by_heads(attention: Attention, rows: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """An attention over sequences × heads × length × size, with views there and back, and one copy."""
    shape = (len(boundaries) - 1, -1, HEADS, SIZE)
    q, k, v = (part.view(shape).transpose(1, 2) for part in rows.split(HEADS * SIZE, dim=1))
    return attention(q, k, v).transpose(1, 2).reshape(len(rows), -1)


def sides_of(length: int) -> dict[str, Side]:
    """Ours first."""
    flash = partial(by_heads, partial(scaled_dot_product_attention, scale=SCALING))
    plain = {"plain": partial(by_heads, partial(plain_attention, scaling=SCALING))} if length <= PLAIN_LIMIT else {}
    return {"ours": ours, "flash": flash, **plain}


def call(side: Side, rows: torch.Tensor, boundaries: torch.Tensor) -> list[torch.Tensor]:
    """The output; and the gradient where the rows want one."""
    output = side(rows, boundaries)
    learned = torch.autograd.grad(output, rows, torch.ones_like(output)) if rows.requires_grad else ()
    return [output.detach(), *learned]


def measure(length: int, tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """One line: all sides, with and without gradients."""
    width = HEADS * SIZE
    scales = torch.tensor([4.0, 1.0, 1.0]).repeat_interleave(width)
    count = max(1, tokens // length)
    given = (torch.randn(count * length, 3 * width) * scales).to(dtype)
    boundaries = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    learning = given.clone().requires_grad_()
    outputs = {name: call(side, learning, boundaries) for name, side in sides_of(length).items()}
    differences = {
        name: max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(outputs["ours"], its, strict=True)
        )
        for name, its in outputs.items()
    }
    calls = {
        f"{name}, {job}": partial(call, side, rows, boundaries)
        for job, rows in (("training", learning), ("encoding", given))
        for name, side in sides_of(length).items()
    }
    measured = {name: as_row(timed) for name, timed in in_turns(calls, rounds).items()}
    return {
        "length": length,
        "tokens": count * length,
        "measured": measured,
        "difference": max(differences.values()),
        "agree": max(differences.values()) <= AGREEMENT[dtype],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a line costs, and how many times as fast ours is as the best other."""
    lines = [
        "Seconds (median; fastest to slowest) and extra peak MB; gain: the best other over ours, in time.",
        "",
        "| length | tokens | job | ours | flash | plain | gain | largest difference |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for job in ("training", "encoding"):
            by_side = {
                name.removesuffix(f", {job}"): Measured(**value)
                for name, value in row["measured"].items()
                if name.endswith(job)
            }
            gain = min(value.seconds for name, value in by_side.items() if name != "ours") / by_side["ours"].seconds
            shown = [
                f"{seconds_of(by_side[name])}, {by_side[name].megabytes:.0f}" if name in by_side else "–"
                for name in ("ours", "flash", "plain")
            ]
            lines.append(
                f"| {row['length']} | {row['tokens']} | {job} | {' | '.join(shown)} "
                f"| {f'{gain:.2f}' if row['agree'] else 'no agreement'} | {row['difference']:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, rounds=7, devices=("cpu",), dtype=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="of a line, in sequences of the line's length")
    options = parser.parse_args()
    use(options)
    facts, dtype = circumstances(), getattr(torch, options.dtype)
    rows = [measure(length, options.tokens, options.rounds, dtype) for length in options.lengths]
    print(table(rows), write_results(f"attention-cpu-{options.dtype}", facts, rows, table(rows)), sep="\n")


if __name__ == "__main__":
    main()

"""Attention on the CPU: plain products against PyTorch's flash kernel, by length of the sequences.

python benchmarks/attention.py [--tokens 4096] [--rounds 7]

Both get the same views of packed bfloat16 tensors, 6 heads of 64 as in the quickstart's encoder, and give the
output and, in training, the three gradients. encoder/attention.py takes products for gradients up to 256 tokens:
beyond, they gain less, and their scores (heads × length × length) outgrow everything else that is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Measured, as_row, circumstances, in_turns, write_results
from torch.nn.functional import scaled_dot_product_attention

from drama_dist.encoder.attention import plain_attention

HEADS, SIZE = 6, 64
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
AGREEMENT = 0.02  # relative difference of outputs and gradients
SIDES: dict[str, Callable[..., torch.Tensor]] = {
    "plain": lambda q, k, v: plain_attention(q, k, v, SIZE**-0.5),
    "flash": lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=SIZE**-0.5),
}


def call(attend: Callable[..., torch.Tensor], packed: list[torch.Tensor], length: int, learn: bool) -> torch.Tensor:
    """Attention within runs of `length` tokens; with its backward pass where `learn`."""
    output = attend(*(part.unflatten(1, (-1, length)).transpose(0, 1) for part in packed))
    if learn:
        output.backward(torch.ones_like(output))
    return output.detach()


def measure(length: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One line: both sides, with and without gradients."""
    packed = [torch.randn(HEADS, tokens, SIZE).mul(scale).bfloat16().requires_grad_() for scale in (4, 1, 1)]
    given = [part.detach() for part in packed]
    found = []
    for attend in SIDES.values():
        output = call(attend, packed, length, True)
        found.append([output, *(part.grad.clone() for part in packed)])
        for part in packed:
            part.grad = None
    calls = {f"{name}, training": partial(call, attend, packed, length, True) for name, attend in SIDES.items()}
    calls |= {f"{name}, encoding": partial(call, attend, given, length, False) for name, attend in SIDES.items()}
    pairs = [(own.float(), other.float()) for own, other in zip(*found, strict=True)]
    difference = max(float((own - other).norm() / other.norm()) for own, other in pairs)
    measured = {name: as_row(one) for name, one in in_turns(calls, rounds).items()}
    return {"length": length, "measured": measured, "difference": difference, "agree": difference <= AGREEMENT}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, and how many times as fast plain products are."""
    names = list(rows[0]["measured"])
    lines = [
        "Milliseconds (median; fastest to slowest); the last columns: flash over plain.",
        "",
        f"| length | {' | '.join(names)} | training | encoding | largest difference |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in rows:
        one = {name: Measured(**value) for name, value in row["measured"].items()}
        cells = [f"{1e3 * m.seconds:.1f} ({1e3 * m.fastest:.1f}–{1e3 * m.slowest:.1f})" for m in one.values()]
        gains = [
            f"{one[f'flash, {job}'].seconds / one[f'plain, {job}'].seconds:.2f}" for job in ("training", "encoding")
        ]
        shown = gains if row["agree"] else ["no agreement"] * 2
        lines.append(f"| {row['length']} | {' | '.join([*cells, *shown])} | {row['difference']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    facts = circumstances()
    rows = [measure(length, options.tokens, options.rounds) for length in LENGTHS]
    print(table(rows), write_results("attention-cpu", facts, rows, table(rows)), sep="\n")


if __name__ == "__main__":
    main()

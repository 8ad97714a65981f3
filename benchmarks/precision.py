"""What the precision of the loss's products does to its gradients: an emulation on the CPU, beside the encoder's own.

python benchmarks/precision.py [--rows 2048] [--seeds 3]

Operands of products are rounded (bfloat16, TF32: 10 bits of mantissa) and multiplied in float32, forward and
backward, dL/dA among them; the rest is float32, as in the kernels (kernels/info_nce/fused.py). Errors are against
float64 on the vectors as they are. "vectors rounded to bfloat16" is float64 too, on the vectors that an encoder in
bfloat16 gives at best. Vectors are made up: a spectrum that falls, a common mean, positives that are near their query.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import circumstances, write_results

from drama_dist.kernels import info_nce

DIMS = (256, 512, 768)
TEMPERATURES = (0.02, 0.05)
Rounding = Callable[[torch.Tensor], torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor]


def bfloat16(values: torch.Tensor) -> torch.Tensor:
    """To the nearest, as float32."""
    return values.bfloat16().float()


def tf32(values: torch.Tensor) -> torch.Tensor:
    """To the nearest of 10 bits of mantissa, ties to even."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def vectors(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and passages, float32; row i of one answers row i of the other, cosines of some 0.6 against 0.3."""
    generator = torch.Generator().manual_seed(seed)
    size = DIMS[-1]
    spectrum = torch.arange(1, size + 1).float().rsqrt()[torch.randperm(size, generator=generator)]
    mean = 0.6 * spectrum * torch.randn(size, generator=generator)
    topic, one, other = (spectrum * torch.randn(rows, size, generator=generator) for _ in range(3))
    queries, passages = mean + topic + 0.8 * one, mean + topic + 0.8 * other
    return 3 * queries, 3 * passages


def gradients(queries_BK: torch.Tensor, passages_BK: torch.Tensor, temperature: float, rounded: Rounding) -> Gradients:
    """Of the mean over DIMS, with products of rounded operands; the vectors' norms are those of the operands."""
    sides = rounded(queries_BK), rounded(passages_BK)
    count, results = len(queries_BK), [torch.zeros_like(side) for side in sides]
    terms = [torch.zeros_like(side) for side in sides]
    for dim in DIMS:
        query, passage = (side[:, :dim] for side in sides)
        norms = query.norm(dim=1, keepdim=True), passage.norm(dim=1)
        score_BB = query @ passage.T / (norms[0] * norms[1] * temperature)
        gradient_BB = (score_BB.softmax(1) - torch.eye(count)) / (count * len(DIMS))
        upstream_BB = rounded(gradient_BB / (norms[0] * norms[1] * temperature))
        of_scores_BB = gradient_BB * score_BB
        results[0][:, :dim] += upstream_BB @ passage
        results[1][:, :dim] += upstream_BB.T @ query
        terms[0][:, :dim] += query * (of_scores_BB.sum(1, keepdim=True) / norms[0].square())
        terms[1][:, :dim] += passage * (of_scores_BB.sum(0) / norms[1].square())[:, None]
    return results[0] - terms[0], results[1] - terms[1]


def exact(queries_BK: torch.Tensor, passages_BK: torch.Tensor, temperature: float) -> Gradients:
    """In float64, by the oracle."""
    leaves = [side.double().requires_grad_() for side in (queries_BK, passages_BK)]
    positives = torch.arange(len(queries_BK))
    result = info_nce(*leaves, positives, temperature=temperature, dims=DIMS, backend="reference")
    return torch.autograd.grad(result.loss, leaves)


def measure(rows: int, seeds: int, temperature: float) -> dict[str, Any]:
    """Errors of each side's gradients, the norm of the difference over the norm; the largest of the seeds."""
    errors: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        sides = vectors(rows, seed)
        truth = exact(*sides, temperature)
        found = {
            "float32": gradients(*sides, temperature, torch.Tensor.clone),
            "TF32": gradients(*sides, temperature, tf32),
            "bfloat16": gradients(*sides, temperature, bfloat16),
            "vectors rounded to bfloat16, then float64": exact(*(bfloat16(side) for side in sides), temperature),
        }
        for name, pair in found.items():
            own = [float((one - its).norm() / its.norm()) for one, its in zip(pair, truth, strict=True)]
            errors.setdefault(name, []).append(own)
    worst = {name: [max(each) for each in zip(*of_seeds, strict=True)] for name, of_seeds in errors.items()}
    return {"rows": rows, "temperature": temperature, "seeds": seeds, "errors": worst}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"B = N, dims {'/'.join(map(str, DIMS))}; relative errors of the gradients, the largest of the seeds.",
        "",
        "| B | temperature | products in | queries | passages |",
        "|--:|--:|---|--:|--:|",
    ]
    for row in rows:
        for name, (queries, passages) in row["errors"].items():
            lines.append(f"| {row['rows']} | {row['temperature']} | {name} | {queries:.1e} | {passages:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=2048, help="queries, and as many passages")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = [measure(options.rows, options.seeds, temperature) for temperature in TEMPERATURES]
    print(write_results("loss-precision", circumstances(), rows, table(rows)))


if __name__ == "__main__":
    main()

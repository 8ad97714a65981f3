"""Where a training step's time goes, and what bounds it: PyTorch's profiler over our step of benchmarks/step.py.

python benchmarks/step_profile.py --data DIR [--batch 256] [--budgets 0 4] [--dtype auto]

Own time of each operation, by kind; of the matrix products their rate, beside the best rate of large products
here. bound: how much faster the step could be if nothing but the products took time.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from statistics import median
from typing import Any

import torch
from measure import arguments, circumstances, use, write_results
from step import ours
from texts import Texts, abstracts, questions
from torch.profiler import ProfilerActivity, profile

from drama_dist.train.telemetry import matrix_product_peak

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("_Attend", "_AttendBackward"),
    "norms, rotation, SwiGLU": ("_Project", "_ProjectBackward", "_FeedForward", "_FeedForwardBackward"),
    "loss": ("FusedInfoNCE",),
    "optimiser": ("aten::_fused_adamw_", "aten::linalg_vector_norm"),
    "copies and sums": ("aten::copy_", "aten::cat", "aten::add_", "aten::fill_", "aten::mul", "aten::clone"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def profiled(step: Any, texts: Texts) -> tuple[Counter[str], float]:
    """Seconds by kind of one step, and the operations of its products."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        step(texts)
    seconds: Counter[str] = Counter()
    flops = 0.0
    for event in profiler.key_averages():
        kind = KIND_OF.get(event.key, "everything else")
        seconds[kind] += event.self_cpu_time_total / 1e6
        flops += event.flops if kind == "products" else 0
    return seconds, flops


def measure(texts: Texts, budget: float, options: Any) -> dict[str, Any]:
    """One line of the table; medians of the rounds."""
    step = ours(options.model, options.dtype, options.chunk_tokens, budget)
    step(texts)
    rounds = [profiled(step, texts) for _ in range(options.rounds)]
    seconds = {kind: median(by_kind[kind] for by_kind, _ in rounds) for kind in [*KINDS, "everything else"]}
    return {
        "texts": texts.name,
        "batch": options.batch,
        "budget_gib": budget,
        "seconds": seconds,
        "products_per_second": rounds[0][1] / seconds["products"],
        "peak_per_second": matrix_product_peak(getattr(torch, options.dtype), torch.device(options.device)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the share of each kind."""
    kinds = list(rows[0]["seconds"])
    lines = [
        f"| texts | GiB kept | seconds | {' | '.join(kinds)} | products, Gflop/s | peak | bound |",
        "|" + "---|" * (len(kinds) + 6),
    ]
    for row in rows:
        total = sum(row["seconds"].values())
        shares = " | ".join(f"{row['seconds'][kind] / total:.1%}" for kind in kinds)
        rates = f"{row['products_per_second'] / 1e9:.0f} | {row['peak_per_second'] / 1e9:.0f}"
        bound = total / row["seconds"]["products"]
        lines.append(f"| {row['texts']} | {row['budget_gib']:g} | {total:.2f} | {shares} | {rates} | {bound:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, data="xquad-en/ and cisi/", model=True, devices=("cpu",), dtype=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.0, 4.0], help="GiB of kept graphs")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    options = parser.parse_args()
    use(options)
    facts, rows = circumstances(options.device), []
    for texts_of in (partial(questions, options.data), partial(abstracts, options.data)):
        texts = texts_of(options.batch)
        rows += [measure(texts, budget, options) for budget in options.budgets]
    print(
        table(rows), write_results(f"step-profile-{options.device}-{options.dtype}", facts, rows, table(rows)), sep="\n"
    )


if __name__ == "__main__":
    main()

"""The loss alone, forward and backward: ours, dense PyTorch, and sentence-transformers' cached loss, on given vectors.

python benchmarks/loss.py [--sizes 1024 4096 8192 16384] [--hard-sizes 1024] [--dtype auto]
    [--device cpu] [--rounds 5]

Every side gets the same float tensors and gives the loss and both gradients. sentence-transformers runs its
MatryoshkaLoss over CachedMultipleNegativesRankingLoss without its encoder: once with each of several mini-batches,
32 (its default) among them, and with the fastest of these in every round. On CUDA both forms of the loss run by name,
on these vectors and as training in this dtype calls them, with float32 ones; inf-cl and Liger's fused
cross-entropy join, once for every dim, where they are installed. A speed-up is printed only where the sides agree.
Memory is what two calls of a side add at their peak, vectors aside, on CPUs in a process of its own. Rows of the
results file that are of other sizes or processors stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
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
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from drama_dist.kernels import info_nce

TEMPERATURE = 0.05
DIMS = ((768,), (768, 512, 256), (768, 512, 256, 128, 64))
MINI_BATCHES = (32, 128, 512, 2048)
HARD_NEGATIVES = 7
FEW = 64
# Of the loss, and of the gradients' norm. In bfloat16 the peers also round scores.
AGREEMENT = {torch.bfloat16: (0.02, 0.1), torch.float32: (1e-4, 1e-3)}
Step = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def ours(
    queries: torch.Tensor,
    passages: torch.Tensor,
    dims: tuple[int, ...],
    backend: str = "auto",
    rounded: bool = False,
    learns: bool = True,
) -> Step:
    """The public function; without learning the loss stands for the gradients."""
    positives = torch.arange(len(queries), device=queries.device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = {"temperature": TEMPERATURE, "dims": dims, "rounded": rounded, "backend": backend}
        result = info_nce(queries, passages, positives, **given)
        if not learns:
            return result.loss, result.loss, result.loss
        return (result.loss.detach(), *torch.autograd.grad(result.loss, (queries, passages)))

    return step


def dense(queries: torch.Tensor, passages: torch.Tensor, dims: tuple[int, ...]) -> Step:
    """What one writes without a library: a matrix of scores for every dim."""
    positives = torch.arange(len(queries), device=queries.device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), device=queries.device)
        for dim in dims:
            scores = normalize(queries[:, :dim], dim=1) @ normalize(passages[:, :dim], dim=1).T / TEMPERATURE
            loss = loss + cross_entropy(scores, positives) / len(dims)
        return (loss.detach(), *torch.autograd.grad(loss, (queries, passages)))

    return step


class _GivenVectors(torch.nn.Module):
    """Stands where the peer asks for a model that it does not call here."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __getitem__(self, index: int) -> torch.nn.Module:
        return self

    def get_embedding_dimension(self) -> int:
        return self.size


def cached(queries: torch.Tensor, passages: torch.Tensor, dims: tuple[int, ...], mini_batch: int) -> Step:
    """sentence-transformers: the loss and the gradients that it would hand to its encoder."""
    model: Any = _GivenVectors(queries.shape[1])
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=mini_batch)
    MatryoshkaLoss(model, loss, list(dims), [1 / len(dims)] * len(dims))  # puts itself around calculate_loss
    columns = [queries.detach(), *passages.detach().split(len(queries))]

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chunks = [[part.detach().requires_grad_() for part in column.split(mini_batch)] for column in columns]
        value = loss.calculate_loss(chunks, with_backward=True)
        of_columns = [torch.cat([part.grad for part in column]) for column in chunks]
        return value.detach(), of_columns[0], torch.cat(of_columns[1:])

    return step


def per_dim(queries: torch.Tensor, passages: torch.Tensor, dims: tuple[int, ...], loss_of: Callable[..., Any]) -> Step:
    """A fused loss of normalised vectors, `loss_of` (queries, passages, positives, dim), called once for every dim."""
    positives = torch.arange(len(queries), device=queries.device)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), device=queries.device)
        for dim in dims:
            units = (normalize(side[:, :dim], dim=1).contiguous() for side in (queries, passages))
            loss = loss + loss_of(*units, positives, dim) / len(dims)
        return (loss.detach(), *torch.autograd.grad(loss, (queries, passages)))

    return step


def fused_peers() -> dict[str, Callable[..., Any]]:
    """Peers that need CUDA, of those that are installed."""
    peers: dict[str, Callable[..., Any]] = {}
    if importlib.util.find_spec("inf_cl"):
        from inf_cl import cal_flash_loss

        peers["inf-cl"] = lambda query, passage, positives, dim: cal_flash_loss(
            query, passage, positives, scale=1 / TEMPERATURE, head_dim=math.gcd(dim, 256)
        ).mean()
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["liger"] = lambda query, passage, positives, dim: liger(passage, query / TEMPERATURE, positives)
    return peers


def disagreement(result: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Relative difference of the loss, and the largest of the gradients' norms."""
    loss = float((result[0] - other[0]).abs() / result[0].abs())
    pairs = [(gradient.float(), theirs.float()) for gradient, theirs in zip(result[1:], other[1:], strict=True)]
    return loss, max(float((gradient - theirs).norm() / gradient.norm()) for gradient, theirs in pairs)


def vectors(rows: int, columns: int, size: int, options: argparse.Namespace) -> list[torch.Tensor]:
    """Queries and passages, the same for the same shape."""
    generator = torch.Generator().manual_seed(rows)
    queries, passages = (torch.randn(count, size, generator=generator) for count in (rows, columns))
    passages[:rows] += queries / 3  # positives that can be told from the rest, if not with ease: losses of 1 to 5
    return [side.to(options.device, getattr(torch, options.dtype)).requires_grad_() for side in (queries, passages)]


def sides_of(leaves: list[torch.Tensor], dims: tuple[int, ...], device: str) -> dict[str, Step]:
    """Every side but the cached ones."""
    sides = {"ours": ours(*leaves, dims), "dense": dense(*leaves, dims)}
    if device == "cuda":
        wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
        for form in ("cuda", "fused"):
            sides[f"ours, {form}"] = ours(*leaves, dims, form)
            sides[f"ours, {form}, as in training"] = ours(*wide, dims, form, rounded=leaves[0].dtype == torch.bfloat16)
        sides |= {name: per_dim(*leaves, dims, loss_of) for name, loss_of in fused_peers().items()}
    return sides


def cached_sides(leaves: list[torch.Tensor], dims: tuple[int, ...]) -> dict[str, Step]:
    """sentence-transformers, by its mini-batch."""
    return {f"cached {size}": cached(*leaves, dims, size) for size in MINI_BATCHES}


def _prepared(name: str, shape: tuple[int, int], dims: tuple[int, ...], options: argparse.Namespace) -> Step:
    """One side, for its memory; imports and builds are done, on a few rows."""

    def side(rows: int, columns: int) -> Step:
        leaves = vectors(rows, columns, max(dims), options)
        return (sides_of(leaves, dims, options.device) | cached_sides(leaves, dims))[name]

    side(FEW, FEW * shape[1] // shape[0])()
    return side(*shape)


def measure(rows: int, columns: int, dims: tuple[int, ...], options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    dtype = getattr(torch, options.dtype)
    leaves = vectors(rows, columns, max(dims), options)
    sides, mini_batches = sides_of(leaves, dims, options.device), cached_sides(leaves, dims)
    cached(*(side[: max(MINI_BATCHES)] for side in leaves), dims, max(MINI_BATCHES))()  # a first call takes longer
    tried = {name: in_turns({name: side}, 1, options.device, warm_up=0)[name] for name, side in mini_batches.items()}
    best = min(tried, key=lambda name: tried[name].seconds)
    sides[best] = mini_batches[best]
    results = {name: side() for name, side in sides.items()}
    differences = {name: disagreement(results["ours"], result) for name, result in results.items()}
    del results
    measured = {
        name: replace(
            value, megabytes=alone_megabytes(partial(_prepared, name, (rows, columns), dims, options), options.device)
        )
        for name, value in in_turns(sides, options.rounds, options.device).items()
    }
    return {
        "rows": rows,
        "columns": columns,
        "dims": dims,
        "tried": {name: as_row(value) for name, value in tried.items()},
        "best_cached": best,
        "measured": {name: as_row(value) for name, value in measured.items()},
        "disagreement": differences,
        "agree": {
            name: all(error <= most for error, most in zip(pair, AGREEMENT[dtype], strict=True))
            for name, pair in differences.items()
        },
        "best_peer": min(
            (name for name in measured if not name.startswith("ours")), key=lambda name: measured[name].seconds
        ),
    }


LEGEND = f"""Seconds (median; fastest to slowest) and extra peak MB, on CPUs alone in a process. cached:
sentence-transformers at the fastest of the mini-batches {", ".join(map(str, MINI_BATCHES))}; and at {MINI_BATCHES[0]},
its default, in one round. time: ours over the best of all others; over cached: ours over cached; memory: ours over
dense. 1 dim: our time over that with one dim."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds and megabytes of each side, and the ratios."""
    first = list(dict.fromkeys(name for row in rows for name in row["measured"] if name != row["best_cached"]))
    lines = [
        f"| B × N | dims | {' | '.join(first)} | cached | mini-batch | cached {MINI_BATCHES[0]} | time | over cached "
        "| memory | 1 dim | largest difference (loss, gradients) |",
        "|---" * (10 + len(first)) + "|",
    ]
    one_dim = {
        (row["rows"], row["columns"]): row["measured"]["ours"]["seconds"] for row in rows if len(row["dims"]) == 1
    }
    for row in rows:
        measured = {name: Measured(**value) for name, value in row["measured"].items()}
        our_loss, alone = measured["ours"], one_dim.get((row["rows"], row["columns"]))
        cells = [
            f"{row['rows']} × {row['columns']}",
            "/".join(map(str, row["dims"])),
            *(
                f"{seconds_of(measured[name])}, {measured[name].megabytes:.0f}" if name in measured else "–"
                for name in [*first, row["best_cached"]]
            ),
            row["best_cached"].removeprefix("cached "),
            f"{row['tried'][f'cached {MINI_BATCHES[0]}']['seconds']:.2f}",
            *(
                f"{our_loss.seconds / measured[name].seconds:.2f}" if row["agree"][name] else "no agreement"
                for name in (row["best_peer"], row["best_cached"])
            ),
            f"{our_loss.megabytes / measured['dense'].megabytes:.2f}",
            "–" if alone is None else f"{our_loss.seconds / alone:.2f}",
            ", ".join(f"{max(errors):.1e}" for errors in zip(*row["disagreement"].values(), strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, dtype=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 4096, 8192, 16384], help="B = N")
    parser.add_argument("--hard-sizes", type=int, nargs="*", default=[1024], help="B, with N = 8 B")
    options = parser.parse_args()
    use(options)
    shapes = [(size, (1 + HARD_NEGATIVES) * size) for size in options.hard_sizes]
    shapes += [(size, size) for size in options.sizes]
    name, facts = f"loss-{options.device}-{options.dtype}", circumstances(options.device)
    rows = earlier_rows(name)
    for shape, dims in tqdm([(shape, dims) for shape in shapes for dims in DIMS], unit=" lines"):
        add_row(rows, measure(*shape, dims, options), facts, "rows", "columns", "dims")
        path = write_rows(name, rows, LEGEND, table)
    print(by_run(rows, table), path, sep="\n")


if __name__ == "__main__":
    main()

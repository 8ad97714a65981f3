"""Encoding a corpus: ours against sentence-transformers, the same checkpoint, passages of natural lengths.

python benchmarks/encode.py --data DIR [--model runs/quickstart/export] [--sets cisi npl time] [--dtype auto]

Sides: ours in `dtype` (what `drama encode` does) and float32, sentence-transformers in both, with its default batch of
32 texts, a smaller and a larger one; its default is float32 and 32. A speed-up is printed only where the vectors agree.
Beside them, the linear layers by themselves in PyTorch's products: what is left where nothing else takes any time.
Rows of the results file that are of other collections or processors stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import (
    DTYPES,
    Measured,
    add_row,
    arguments,
    as_row,
    by_run,
    circumstances,
    earlier_rows,
    in_turns,
    rate_of,
    use,
    write_rows,
)
from sentence_transformers import SentenceTransformer
from texts import corpus

from drama_dist.encoder.backbone import load
from drama_dist.encoder.threads import side_by_side

LIMIT = 512  # tokens of a passage
ROWS = {"cpu": 1024, "cuda": 8192}  # tokens of a product; on the CPU, on one thread
BATCHES = (8, 32, 128)
LINEAR = "linear layers alone,"
DEFAULT = "peer float32, batch 32"
AGREEMENT = {"float32": 1e-5, "bfloat16": 0.05}  # largest difference of a component of unit vectors


def linear_layers(model: Path, tokens: int, dtype: str) -> Callable[[], None]:
    """The products of all linear layers, of so many tokens, and nothing else."""
    encoder = load(model, dtype=dtype)
    weights = [layer.weight.detach() for layer in encoder.backbone.modules() if isinstance(layer, torch.nn.Linear)]
    most = ROWS[encoder.device.type]
    rows = {weight.shape[1]: torch.randn(most, weight.shape[1]).to(weight) for weight in weights}

    def products(start: int) -> None:
        for weight in weights:
            torch.nn.functional.linear(rows[weight.shape[1]][: tokens - start], weight)

    def call() -> None:
        list(side_by_side(products, range(0, tokens, most)))

    return call


def sides_of(model: Path, texts: list[str], dtypes: Sequence[str]) -> tuple[dict[str, Callable[[], np.ndarray]], int]:
    """Every side's call, and how many tokens the texts have."""
    sides: dict[str, Callable[[], np.ndarray]] = {}
    for dtype in dtypes:
        encoder = load(model, dtype=dtype)
        encoder.contract = replace(encoder.contract, max_passage_tokens=LIMIT)
        sides[f"ours {dtype}"] = lambda encoder=encoder: encoder.encode_passages(texts)
    tokens = sum(map(len, encoder.tokenize_passages(texts)))
    for dtype in dtypes:
        peer = SentenceTransformer(
            str(model),
            model_kwargs={"dtype": getattr(torch, dtype)},
            device=str(encoder.device),
            trust_remote_code=False,
        )
        peer.max_seq_length = LIMIT
        for size in BATCHES:
            sides[f"peer {dtype}, batch {size}"] = lambda peer=peer, size=size: peer.encode_document(
                texts, batch_size=size, show_progress_bar=False
            )
    return sides, tokens


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One collection."""
    texts = corpus(options.data, name)[: options.passages]
    dtypes = list(dict.fromkeys([options.dtype, "float32"]))
    sides, tokens = sides_of(options.model, texts, dtypes)
    vectors = {side: np.asarray(call(), dtype=np.float32) for side, call in sides.items()}
    exact = vectors["ours float32"]
    differences = {side: float(np.abs(found - exact).max()) for side, found in vectors.items()}
    alone = {f"{LINEAR} {dtype}": linear_layers(options.model, tokens, dtype) for dtype in dtypes}
    measured = in_turns(sides | alone, options.rounds, options.device)
    return {
        "texts": name,
        "passages": len(texts),
        "tokens": tokens,
        "measured": {side: as_row(value) for side, value in measured.items()},
        "largest_difference": differences,
        "agree": all(found <= AGREEMENT[_dtype(side)] for side, found in differences.items()),
    }


def _dtype(side: str) -> str:
    return next(dtype for dtype in DTYPES if dtype in side)


LEGEND = f"""Real tokens a second (median; slowest to fastest round) and extra peak memory. Gains: the side's rate over
the peer's best batch at the same precision; and over the peer's default. Those of the linear layers alone, in PyTorch's
products of {ROWS["cpu"]} tokens, a thread for each (on CUDA {ROWS["cuda"]}), are what a side could gain that needs no
time for anything else."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: real tokens a second of each side, and what is gained at each precision and over the default."""
    lines = [
        "| texts | passages | tokens | side | tokens/s | MB | difference | gain, same precision | over default |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        measured = {side: Measured(**value) for side, value in row["measured"].items()}
        for side, one in measured.items():
            gains = ["", ""]
            if not side.startswith("peer") and row["agree"]:
                peers = [its for name, its in measured.items() if name.startswith(f"peer {_dtype(side)}")]
                gains[0] = f"{min(its.seconds for its in peers) / one.seconds:.2f}"
                gains[1] = f"{measured[DEFAULT].seconds / one.seconds:.2f}"
            difference = "" if side.startswith(LINEAR) else f"{row['largest_difference'][side]:.1e}"
            lines.append(
                f"| {row['texts']} | {row['passages']} | {row['tokens']} | {side} "
                f"| {rate_of(row['tokens'], one)} | {one.megabytes:.0f} | {difference} "
                f"| {gains[0]} | {gains[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, data="the collections", model=True, dtype=True)
    parser.add_argument("--sets", nargs="*", default=["cisi", "npl", "time"])
    parser.add_argument("--passages", type=int, default=1000, help="of each collection, from its beginning")
    options = parser.parse_args()
    use(options)
    name, facts = f"encode-{options.device}-{options.dtype}", circumstances(options.device)
    rows = earlier_rows(name)
    for collection in options.sets:
        add_row(rows, measure(collection, options), facts, "texts")
        path = write_rows(name, rows, LEGEND, table)
    print(by_run(rows, table), path, sep="\n")


if __name__ == "__main__":
    main()

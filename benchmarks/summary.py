"""Put the comparisons of benchmarks/results/ into docs/benchmarks.md, between markers: python benchmarks/summary.py.

One row a claim: its newest measurement, and the gain on other processors beside it. A comparison whose sides did not
agree is left out. It measures nothing; the other claims of that page are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from measure import DTYPES, RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- comparisons -->", "<!-- /comparisons -->"
HEAD = ["claim", "ours", "best peer", "gain", "memory, ours / peer", "the peer's setting", "measured", "elsewhere"]


@dataclass(frozen=True)
class Comparison:
    """One measurement of a claim. row: of the results file NAME.json; side, peer: the two of its `measured`.

    encoded: of the peer's tokens, the share that ours encodes, where equal texts are encoded once.
    """

    claim: str
    name: str
    row: dict[str, Any]
    side: str
    peer: str
    encoded: float = 1.0

    @property
    def gain(self) -> float:
        """How many times as fast ours is."""
        return self.row["measured"][self.peer]["seconds"] / self.row["measured"][self.side]["seconds"]


def loss_comparisons(device: str, dtype: str) -> Iterator[Comparison]:
    """The loss alone, at the largest square batch that was measured."""
    name = f"loss-{device}-{dtype}"
    square = [row for row in _rows(name) if row["rows"] == row["columns"] and row["agree"][row["best_peer"]]]
    largest = max((row["rows"] for row in square), default=0)
    for row in square:
        if row["rows"] == largest:
            dims = f"{len(row['dims'])} dim{'s' if len(row['dims']) > 1 else ''}"
            yield Comparison(f"loss and gradients, {largest} × {largest}, {dims}", name, row, "ours", row["best_peer"])


def step_comparisons(device: str, dtype: str) -> Iterator[Comparison]:
    """The whole training step, against the peer's best setting at the same precision."""
    name = f"step-{device}-{dtype}"
    for row in sorted(_rows(name), key=lambda row: (row["texts"], row["batch"])):
        for side in row["measured"]:
            if row["agree"] and side.startswith("ours"):
                claim = f"training step, {row['texts']}, batch {row['batch']}, {side.removeprefix(f'ours {dtype}, ')}"
                yield Comparison(claim, name, row, side, row["best_peer"], row["distinct_tokens"] / row["tokens"])


def encode_comparisons(device: str, dtype: str) -> Iterator[Comparison]:
    """Encoding, against the peer's best batch at the same precision."""
    name = f"encode-{device}-{dtype}"
    for row in _rows(name):
        if row["agree"]:
            peers = [side for side in row["measured"] if side.startswith(f"peer {dtype}")]
            best = min(peers, key=lambda side: row["measured"][side]["seconds"])
            claim = f"encoding {row['passages']} passages of {row['texts'].upper()}"
            yield Comparison(claim, name, row, f"ours {dtype}", best)


KINDS = (loss_comparisons, step_comparisons, encode_comparisons)


def table(comparisons: list[Comparison]) -> str:
    """Markdown: a line for each claim."""
    by_claim: dict[str, list[Comparison]] = {}
    for comparison in sorted(comparisons, key=lambda comparison: comparison.row["date"], reverse=True):
        by_claim.setdefault(comparison.claim, []).append(comparison)
    claims = dict.fromkeys(comparison.claim for comparison in comparisons)  # in the order of the files
    lines = [HEAD, ["---", *["--:"] * 4, *["---"] * 3], *(_cells(*by_claim[claim]) for claim in claims)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(newest: Comparison, *older: Comparison) -> list[str]:
    ours, peer = newest.row["measured"][newest.side], newest.row["measured"][newest.peer]
    per_token = f" ({newest.encoded * newest.gain:.2f}× a token encoded)" if newest.encoded < 1 else ""
    return [
        newest.claim,
        f"{ours['seconds']:.2f} s",
        f"{peer['seconds']:.2f} s",
        f"**{newest.gain:.2f}×**{per_token}",
        f"{ours['megabytes'] / max(1.0, peer['megabytes']):.2f}",
        re.sub(f"peer ({'|'.join(DTYPES)}), ", "", newest.peer),
        f"[{_machine(newest.row)}, {newest.row['date'][:10]}](../benchmarks/results/{newest.name}.md)",
        "; ".join(f"{other.gain:.2f}×: {_machine(other.row)}" for other in older),
    ]


def _machine(row: dict[str, Any]) -> str:
    return f"{row['processor'].replace('(R)', '').replace(' Processor', '')}, {row['threads']} threads"


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def summary() -> str:
    """The block of the page: a table for each device and dtype that has results."""
    parts = []
    for device, dtype in product(("cpu", "cuda"), DTYPES):
        comparisons = [comparison for kind in KINDS for comparison in kind(device, dtype)]
        if comparisons:
            parts.append(f"In {dtype}, {'CPUs' if device == 'cpu' else 'GPUs'}:\n\n{table(comparisons)}")
    return "\n\n".join(parts)


def main() -> None:
    text = PAGE.read_text("utf-8")
    block = f"{BEGIN}\n{summary()}\n{END}"
    replaced, count = re.subn(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{PAGE}: expected one block between {BEGIN} and {END}, found {count}")
    PAGE.write_text(replaced, "utf-8")


if __name__ == "__main__":
    main()

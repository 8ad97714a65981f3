"""Put the figures of benchmarks/results/ into the README, between its two markers: python benchmarks/summary.py.

It measures nothing: every figure comes from a results file, and a comparison whose sides did not agree is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from measure import DTYPES, RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def results(name: str) -> dict[str, Any]:
    """A results file; empty where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}


def loss_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """The loss alone, at the largest square batch that was measured on each machine."""
    square = [row for row in results(f"loss-{device}-{dtype}")["rows"] if row["rows"] == row["columns"]]
    largest = {_machine(row): row["rows"] for row in sorted(square, key=lambda row: row["rows"])}
    for row in square:
        if row["rows"] == largest[_machine(row)] and row["agree"][row["best_peer"]]:
            dims = f"{len(row['dims'])} dim{'s' if len(row['dims']) > 1 else ''}"
            what = f"loss and gradients, {row['rows']} × {row['columns']}, {dims}"
            yield _line(what, row, "ours", row["best_peer"])


def step_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """The whole step, against the peer's best at the same precision."""
    for row in results(f"step-{device}-{dtype}")["rows"]:
        if row["agree"]:
            for side in row["measured"]:
                if side.startswith("ours"):
                    setting = side.removeprefix(f"ours {dtype}, ")
                    what = f"training step, {row['texts']}, batch {row['batch']}, {setting}"
                    share = row["distinct_tokens"] / row["tokens"]
                    if share < 1:
                        times = row["measured"][row["best_peer"]]["seconds"] / row["measured"][side]["seconds"]
                        what += f"; texts repeat: {share * times:.1f}× for each token encoded"
                    yield _line(what, row, side, row["best_peer"])


def encode_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """Encoding, against the peer's best at the same precision."""
    for row in results(f"encode-{device}-{dtype}")["rows"]:
        if row["agree"]:
            peers = [name for name in row["measured"] if name.startswith(f"peer {dtype}")]
            best = min(peers, key=lambda name: row["measured"][name]["seconds"])
            what = f"encoding {row['passages']} passages of {row['texts'].upper()}"
            yield _line(what, row, f"ours {dtype}", best)


def _line(what: str, row: dict[str, Any], side: str, best: str) -> list[str]:
    own, peer = row["measured"][side], row["measured"][best]
    return [
        what,
        f"{own['seconds']:.2f} s",
        f"{peer['seconds']:.2f} s",
        f"**{peer['seconds'] / own['seconds']:.2f}×**",
        f"{own['megabytes'] / max(1.0, peer['megabytes']):.2f}",
        re.sub(f"peer ({'|'.join(DTYPES)}), ", "", best),
        f"{_machine(row)}, {row['date'][:10]}",
    ]


def _machine(row: dict[str, Any]) -> str:
    return f"{row['processor']}, {row['threads']} threads"


HEAD = ["ours", "best peer", "times as fast", "memory, ours / peer", "the peer's setting", "measured on"]


def summary() -> str:
    """The README's table, a block for each device and dtype that has results."""
    parts = []
    for device, dtype in product(("cpu", "cuda"), DTYPES):
        lines = [*loss_lines(device, dtype), *step_lines(device, dtype), *encode_lines(device, dtype)]
        if not lines:
            continue
        head = [f"what, in {dtype}", *HEAD]
        parts.append(
            "Medians, both sides in one run on the same vectors, or the same checkpoint and texts. Memory: what a call "
            "adds at its peak; of losses and steps alone in a process, of steps with weights and optimiser. Ours "
            "encodes equal texts once. All figures, with versions and commands, in "
            "[benchmarks/results](benchmarks/results).\n\n"
            + "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])
        )
    return "\n\n".join(parts)


def main() -> None:
    text = README.read_text("utf-8")
    block = f"{BEGIN}\n{summary()}\n{END}"
    replaced, count = re.subn(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{README}: expected one block between {BEGIN} and {END}, found {count}")
    README.write_text(replaced, "utf-8")


if __name__ == "__main__":
    main()

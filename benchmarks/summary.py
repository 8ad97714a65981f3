"""Put the figures of benchmarks/results/ into the README, between its two markers: python benchmarks/summary.py.

It measures nothing: every figure comes from a results file, and a comparison whose sides did not agree is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def results(name: str) -> dict[str, Any]:
    """A results file; empty where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}


def loss_lines(device: str) -> Iterator[list[str]]:
    """The loss alone, at the largest square batch that was measured."""
    square = [row for row in results(f"loss-{device}-bfloat16")["rows"] if row["rows"] == row["columns"]]
    for row in square:
        if row["rows"] == square[-1]["rows"] and row["agree"][row["best_peer"]]:
            own, peer = row["measured"]["ours"], row["measured"][row["best_peer"]]
            dims = f"{len(row['dims'])} dim{'s' if len(row['dims']) > 1 else ''}"
            what = f"loss and gradients, {row['rows']} × {row['columns']}, {dims}"
            yield _line(what, own["seconds"], peer["seconds"], own["megabytes"], peer["megabytes"], row["best_peer"])


def step_lines(device: str) -> Iterator[list[str]]:
    """The whole step, against the peer's best in bfloat16."""
    for row in results(f"step-{device}-bfloat16")["rows"]:
        if row["agree"]:
            name = row["best_peer"]
            peer = row["measured"][name]
            for side, own in row["measured"].items():
                if side.startswith("ours"):
                    what = (
                        f"training step, {row['texts']}, batch {row['batch']}, {side.removeprefix('ours bfloat16, ')}"
                    )
                    share = row["distinct_tokens"] / row["tokens"]
                    if share < 1:
                        encoded = share * peer["seconds"] / own["seconds"]
                        what += f"; texts repeat: {encoded:.1f}× for each token encoded"
                    memory = (one["state_megabytes"] + one["megabytes"] for one in (own, peer))
                    yield _line(what, own["seconds"], peer["seconds"], *memory, name)


def encode_lines(device: str) -> Iterator[list[str]]:
    """Encoding, against the peer's best in bfloat16."""
    for row in results(f"encode-{device}-bfloat16")["rows"]:
        if row["agree"]:
            peers = {name: one for name, one in row["measured"].items() if name.startswith("peer bfloat16")}
            name = min(peers, key=lambda name: peers[name]["seconds"])
            own, peer = row["measured"]["ours bfloat16"], peers[name]
            what = f"encoding {row['passages']} passages of {row['texts'].upper()}"
            yield _line(what, own["seconds"], peer["seconds"], own["megabytes"], peer["megabytes"], name)


def _line(what: str, own: float, peer: float, own_mb: float, peer_mb: float, name: str) -> list[str]:
    times, memory = f"**{peer / own:.1f}×**", f"{own_mb / max(1.0, peer_mb):.2f}"
    return [what, f"{own:.2f} s", f"{peer:.2f} s", times, memory, name.removeprefix("peer ").replace("bfloat16, ", "")]


def summary() -> str:
    """The README's table, a block for each device that has results."""
    parts = []
    for device in ("cpu", "cuda"):
        lines = [*loss_lines(device), *step_lines(device), *encode_lines(device)]
        if not lines:
            continue
        files = [
            results(name)
            for name in (f"loss-{device}-bfloat16", f"step-{device}-bfloat16", f"encode-{device}-bfloat16")
        ]
        facts = next(found for found in files if found["rows"])
        versions = facts["versions"]
        head = ["what, in bfloat16", "ours", "best peer", "times as fast", "memory, ours / peer", "the peer's setting"]
        parts.append(
            f"{facts['machine']['processor']}, {facts['machine']['threads']} threads, {facts['date'][:10]}, torch "
            f"{versions['torch']}, sentence-transformers {versions['sentence-transformers']}; medians, both "
            "sides in one run on the same vectors, or the same checkpoint and texts. Memory: what a call adds at its "
            "peak, in a training step with weights and optimiser. Ours encodes equal texts once; all figures in "
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

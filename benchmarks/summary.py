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
KINDS = {"loss": "loss", "step": "training step", "encode": "encoding"}


def results(name: str) -> dict[str, Any]:
    """A results file; empty where it was not measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}


def loss_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """The loss alone, at the largest square batch that was measured."""
    square = [row for row in results(f"loss-{device}-{dtype}")["rows"] if row["rows"] == row["columns"]]
    for row in square:
        if row["rows"] == square[-1]["rows"] and row["agree"][row["best_peer"]]:
            own, peer = row["measured"]["ours"], row["measured"][row["best_peer"]]
            dims = f"{len(row['dims'])} dim{'s' if len(row['dims']) > 1 else ''}"
            what = f"loss and gradients, {row['rows']} × {row['columns']}, {dims}"
            yield _line(what, own["seconds"], peer["seconds"], own["megabytes"], peer["megabytes"], row["best_peer"])


def step_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """The whole step, against the peer's best at the same precision."""
    for row in results(f"step-{device}-{dtype}")["rows"]:
        if row["agree"]:
            name = row["best_peer"]
            peer = row["measured"][name]
            for side, own in row["measured"].items():
                if side.startswith("ours"):
                    setting = side.removeprefix(f"ours {dtype}, ")
                    what = f"training step, {row['texts']}, batch {row['batch']}, {setting}"
                    share = row["distinct_tokens"] / row["tokens"]
                    if share < 1:
                        encoded = share * peer["seconds"] / own["seconds"]
                        what += f"; texts repeat: {encoded:.1f}× for each token encoded"
                    yield _line(
                        what, own["seconds"], peer["seconds"], own["alone_megabytes"], peer["alone_megabytes"], name
                    )


def encode_lines(device: str, dtype: str) -> Iterator[list[str]]:
    """Encoding, against the peer's best at the same precision."""
    for row in results(f"encode-{device}-{dtype}")["rows"]:
        if row["agree"]:
            peers = {name: one for name, one in row["measured"].items() if name.startswith(f"peer {dtype}")}
            name = min(peers, key=lambda name: peers[name]["seconds"])
            own, peer = row["measured"][f"ours {dtype}"], peers[name]
            what = f"encoding {row['passages']} passages of {row['texts'].upper()}"
            yield _line(what, own["seconds"], peer["seconds"], own["megabytes"], peer["megabytes"], name)


def _line(what: str, own: float, peer: float, own_mb: float, peer_mb: float, name: str) -> list[str]:
    times, memory = f"**{peer / own:.1f}×**", f"{own_mb / max(1.0, peer_mb):.2f}"
    return [what, f"{own:.2f} s", f"{peer:.2f} s", times, memory, re.sub(f"peer ({'|'.join(DTYPES)}), ", "", name)]


def _where(found: dict[str, Any]) -> str:
    """Processors and dates of a results file; rows that were added on another machine say so themselves."""
    machine, date = found["machine"], found["date"]
    rows = {(row.get("processor", machine["processor"]), row.get("date", date)[:10]) for row in found["rows"]}
    return ", ".join(f"{machine['threads']} threads of {processor} ({day})" for processor, day in sorted(rows))


def summary() -> str:
    """The README's table, a block for each device and dtype that has results."""
    parts = []
    for device, dtype in product(("cpu", "cuda"), DTYPES):
        lines = [*loss_lines(device, dtype), *step_lines(device, dtype), *encode_lines(device, dtype)]
        if not lines:
            continue
        files = {kind: found for kind in KINDS if (found := results(f"{kind}-{device}-{dtype}"))["rows"]}
        versions = next(iter(files.values()))["versions"]
        head = [f"what, in {dtype}", "ours", "best peer", "times as fast", "memory, ours / peer", "the peer's setting"]
        parts.append(
            f"Measured: {'; '.join(f'{KINDS[kind]} on {_where(found)}' for kind, found in files.items())}; torch "
            f"{versions['torch']}, sentence-transformers {versions['sentence-transformers']}; medians, both "
            "sides in one run on the same vectors, or the same checkpoint and texts. Memory: what a call adds at its "
            "peak; in training steps, with weights and optimiser, alone in a process. Ours encodes equal texts once; "
            "all figures in [benchmarks/results](benchmarks/results).\n\n"
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

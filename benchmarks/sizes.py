"""Size against quality and speed: runs of one recipe at several sizes, the teacher and BM25, as a table and a plot.

python benchmarks/sizes.py --data DIR RUN ...

RUNs are finished runs with the systems drama, teacher and bm25: at each size one of every corpus. Quality is nDCG@10
of whole vectors, mean of corpora. Speed is of encoding the passages of one collection, ours and the teacher through
sentence-transformers at its best batch, in turns and in one precision. Writes results/sizes-DEVICE-DTYPE, and a plot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from measure import RESULTS, Measured, arguments, as_row, circumstances, in_turns, rate_of, use, write_results
from sentence_transformers import SentenceTransformer
from texts import corpus

from drama_dist.encoder.backbone import load
from drama_dist.encoder.sources import resolve
from drama_dist.run.graph import CORPUS
from drama_dist.settings import read_settings

BATCHES = (8, 32, 128)  # of the teacher


def quality(run: Path, system: str) -> float:
    """nDCG@10 of a system's whole vectors, mean of the corpus's queries."""
    rows = json.loads((run / "evaluate" / CORPUS / "results.json").read_text("utf-8"))
    return float(max((row for row in rows if row["system"] == system), key=lambda row: row["dim"] or 0)["ndcg@10"])


def by_size(runs: list[Path]) -> dict[str, list[Path]]:
    """LAYERS × HIDDEN → its runs, smallest first. Ends the program where sizes were not run on the same corpora."""
    sizes: dict[tuple[int, int], dict[str, Path]] = {}
    for run in runs:
        config = json.loads((run / "export" / "config.json").read_text("utf-8"))
        shape = config["hidden_size"], config["num_hidden_layers"]
        sizes.setdefault(shape, {})[read_settings(run / "settings.yaml").corpus.path] = run
    if len({tuple(sorted(corpora)) for corpora in sizes.values()}) > 1 or sum(map(len, sizes.values())) < len(runs):
        raise SystemExit("a size needs one run of every corpus")
    return {f"{layers} × {hidden}": [*sizes[hidden, layers].values()] for hidden, layers in sorted(sizes)}


def facts_of(name: str, runs: list[Path], model: Path, system: str, speed: Measured, passages: int) -> dict[str, Any]:
    """A row. model: whose files are counted."""
    return {
        "model": name,
        "megabytes": sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 1e6,
        "ndcg@10": [quality(run, system) for run in runs],
        "passages": passages,
        "measured": as_row(speed),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | weights, MB | nDCG@10 | of each corpus | passages/s |", "|---|--:|--:|---|--:|"]
    for row in rows:
        each = " / ".join(f"{value:.3f}" for value in row["ndcg@10"])
        megabytes = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        rate = rate_of(row["passages"], Measured(**row["measured"])) if row["measured"] else ""
        lines.append(f"| {row['model']} | {megabytes} | {np.mean(row['ndcg@10']):.3f} | {each} | {rate} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Quality over megabytes, and over passages a second; BM25, which has no vectors, as a line."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    of_megabytes, of_speed = figure.subplots(1, 2, sharey=True)
    of_megabytes.set(xlabel="weights, MB", ylabel="nDCG@10, mean of corpora")
    of_speed.set(xlabel="passages a second", xscale="log")
    of_speed.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    of_speed.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    of_speed.xaxis.set_minor_locator(NullLocator())
    for axes in (of_megabytes, of_speed):
        axes.margins(0.15, 0.1)
    for row in rows:
        value = float(np.mean(row["ndcg@10"]))
        if row["measured"] is None:
            for axes in (of_megabytes, of_speed):
                axes.axhline(value, color="#333a42", linestyle="--", label=row["model"])
            continue
        colour = "#d98324" if row["model"] == "teacher" else "#0b6e99"
        for axes, x in ((of_megabytes, row["megabytes"]), (of_speed, row["passages"] / row["measured"]["seconds"])):
            axes.plot(x, value, "o", color=colour)
            axes.annotate(row["model"], (x, value), textcoords="offset points", xytext=(5, 5))
    of_megabytes.legend(loc="lower right", frameon=False)
    return figure


def main() -> None:
    parser = arguments(__doc__, data="the collection", dtype=True)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--texts", default="npl", help="the collection whose passages are encoded (default npl)")
    parser.add_argument("--passages", type=int, default=2000, help="from its beginning (default 2000)")
    options = parser.parse_args()
    use(options)
    sizes, texts = by_size(options.runs), corpus(options.data, options.texts)[: options.passages]
    of_runs = next(iter(sizes.values()))
    teacher = Path(resolve(read_settings(of_runs[0] / "settings.yaml").teacher.model))
    sides: dict[str, Callable[[], Any]] = {}
    for name, runs in sizes.items():
        encoder = load(runs[0] / "export", dtype=options.dtype)
        sides[name] = lambda encoder=encoder: encoder.encode_passages(texts)
    peer = SentenceTransformer(
        str(teacher), model_kwargs={"dtype": options.dtype}, device=options.device, trust_remote_code=False
    )
    for size in BATCHES:
        sides[f"teacher {size}"] = lambda size=size: peer.encode(texts, batch_size=size, show_progress_bar=False)
    measured = in_turns(sides, options.rounds, options.device)
    fastest = min((measured[f"teacher {size}"] for size in BATCHES), key=lambda one: one.seconds)
    rows = [
        facts_of(name, runs, runs[0] / "export", "drama", measured[name], len(texts)) for name, runs in sizes.items()
    ]
    rows.append(facts_of("teacher", of_runs, teacher, "teacher", fastest, len(texts)))
    bm25 = [quality(run, "bm25") for run in of_runs]
    rows.append({"model": "BM25", "megabytes": None, "ndcg@10": bm25, "passages": len(texts), "measured": None})
    name = f"sizes-{options.device}-{options.dtype}"
    plot(rows).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    print(table(rows), write_results(name, circumstances(options.device), rows, table(rows)), sep="\n")


if __name__ == "__main__":
    main()

"""The report of a run: report.html, report.json, and the result table as text.

Reads only the run's folder. The page stands alone: its figures are inline SVG and it loads nothing.
Drawing is figures.py's affair.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from drama_dist.distributed import ranks
from drama_dist.evaluate import figures
from drama_dist.evaluate.metrics import METRICS, paired_p_value
from drama_dist.evaluate.samples import samples_by_source
from drama_dist.evaluate.scoring import label_of, ndcg_path, precision_of
from drama_dist.evaluate.tables import shown_p, table
from drama_dist.records import read_json_lines
from drama_dist.run.artefact import PROVENANCE, read_provenance, seconds_of, verify
from drama_dist.run.files import write_text
from drama_dist.run.graph import CORPUS, MASKS, TRAINING, in_order
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.search.systems import meaning_and_colour
from drama_dist.settings import Settings, as_dict, read_settings

_READ = (
    "augment",
    "windows",
    "train",
    "train-random-init",
    "evaluate",
)  # artefacts of which the report shows more than their time
_MEASURES = {"ndcg@10": "nDCG@10", "recall@100": "Recall@100", "mrr@10": "MRR@10"}


def report(run: Run) -> None:
    """Write report.html and report.json into the run's folder, and the tables to the terminal.

    The settings that they show are those that the run's artefacts were made with, whatever this start's are.
    """
    if ranks.rank() == 0:
        path = write_report(run.folder, read_settings(run.folder / "settings.yaml"))
        for name, rows in _results(run.folder, run.settings).items():
            heading = f"{name}\n" if run.settings.evaluate.collection_labels else ""
            if rows:
                print(f"{heading}{results_table(rows)}", flush=True)
        say(f"report: {path}")
    ranks.barrier()


def write_report(run: Path, settings: Settings) -> Path:
    """Write report.html and report.json into the run's folder; return the path of report.html.

    Raises FileNotFoundError where the run has not been evaluated, Damaged where an artefact of the run is not what was
    written. Parts whose files are not there (a run without training, say) are left out of the page.
    """
    for name in _finished(run):
        if name.split("/")[0] in _READ:
            verify(run, name)
    results, seconds = _results(run, settings), stage_seconds(run)
    rows = results[CORPUS]
    others = {name: rows for name, rows in results.items() if name != CORPUS}
    cut = _texts_cut(run)
    record = {"results": rows, "collections": others, "seconds": seconds, "texts_cut": cut}
    record["settings"] = as_dict(settings)
    write_text(run / "report.json", json.dumps(record, indent=2) + "\n")
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        title=f"DRAMA run {run.name}",
        corpus=settings.corpus.path,
        llm=settings.llm,
        seed=settings.seed,
        collections=[
            {
                "name": name,
                "headings": _headings(rows),
                "table": _table_cells(rows),
                "comparisons": _comparisons(run / "evaluate" / name, rows, settings.seed),
            }
            for name, rows in results.items()
        ],
        meaning={label: meaning_and_colour(label, settings)[0] for label in settings.evaluate.labels},
        cost=_training_cost(_metrics(run / "train")),
        figures=[(title, note, Markup(svg)) for title, note, svg in _figures(run, rows, seconds, _colours(settings))],
        cut=cut,
        counts=_json(run / "augment" / "counts.json") or {},
        sources=samples_by_source(run, settings.seed),
        settings=yaml.safe_dump(as_dict(settings), sort_keys=False),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def results_table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """The result rows as an aligned table for the terminal, or as a Markdown table with the best in bold."""
    cells = [[f"**{cell}**" if best and markdown else cell for cell, best in line] for line in _table_cells(rows)]
    return table([_headings(rows), *cells], markdown)


def stage_seconds(run: Path) -> dict[str, float]:
    """Wall seconds of every finished stage of a run, in the order in which stages run."""
    return {name: seconds_of(run, name) for name in _finished(run)}


def _finished(run: Path) -> list[str]:
    """The finished artefacts of a run, in the order in which stages run."""
    names = [path.parent.relative_to(run).as_posix() for path in run.rglob(PROVENANCE)]
    return in_order(name for name in names if ".partial" not in name)


def _texts_cut(run: Path) -> list[dict[str, Any]]:
    """What each finished artefact counted of the texts that it read and cut: the fields of CutTexts."""
    return [
        {"artefact": name, "what": what, **count}
        for name in _finished(run)
        for what, count in read_provenance(run / name).get("cut", {}).items()
        if count["texts"]
    ]


def _results(run: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Result rows of each collection that the run is evaluated on."""
    paths = {name: run / "evaluate" / name / "results.json" for name in (CORPUS, *settings.evaluate.collection_labels)}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; run `drama evaluate` for this run first")
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}


def _colours(settings: Settings) -> dict[str, str]:
    return {label: meaning_and_colour(label, settings)[1] for label in settings.evaluate.labels}


def _headings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of `_table_cells`."""
    return ["system", "dim", *(["precision"] if _has_precisions(rows) else []), *_MEASURES.values()]


def _has_precisions(rows: Sequence[dict[str, Any]]) -> bool:
    return any(precision_of(row) != "float32" for row in rows)


def _table_cells(rows: Sequence[dict[str, Any]]) -> list[list[tuple[str, bool]]]:
    """Each row as (text, is the best of its column); what rounds to the same is equally good."""
    shown = {name: [f"{row[name]:.3f}" for row in rows] for name in METRICS}
    best = {name: max(column, default="") for name, column in shown.items()}
    told = [
        [str(row["system"]), *(["–", "–"] if row["dim"] is None else [str(row["dim"]), precision_of(row)])]
        for row in rows
    ]
    width = 3 if _has_precisions(rows) else 2
    return [
        [(cell, False) for cell in told[index][:width]]
        + [(shown[name][index], shown[name][index] == best[name]) for name in METRICS]
        for index, row in enumerate(rows)
    ]


def _comparisons(evaluated: Path, rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """nDCG@10 of drama at its largest dim, in the first precision, against every other system so, with p."""
    of_system: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_system.setdefault(row["system"], []).append(row)
    names = {system: label_of(max(own, key=lambda row: row["dim"] or 0)) for system, own in of_system.items()}
    values = {system: _json(ndcg_path(evaluated, name)) or {} for system, name in names.items()}
    ours = values.pop("drama", {})
    comparable = [system for system, theirs in values.items() if ours and theirs.keys() == ours.keys()]
    return [_comparison(names[system], ours, values[system], seed) for system in comparable]


def _comparison(other: str, ours: dict[str, float], theirs: dict[str, float], seed: int) -> dict[str, str]:
    pairs = [(ours[query], theirs[query]) for query in ours]
    p = paired_p_value([our for our, _ in pairs], [their for _, their in pairs], seed)
    better, same = sum(our > their for our, their in pairs), sum(our == their for our, their in pairs)
    return {
        "other": other,
        "difference": f"{sum(our - their for our, their in pairs) / len(pairs):+.3f}".replace("-", "\N{MINUS SIGN}"),
        "p": shown_p(p),
        "counts": f"{better} / {same} / {len(pairs) - better - same}",
    }


def _figures(
    run: Path, rows: Sequence[dict[str, Any]], seconds: dict[str, float], colours: dict[str, str]
) -> list[tuple[str, str, str]]:
    """(title, what to know when reading it, SVG) of every figure that the run has data for."""
    drawn = []
    if any(row["dim"] is not None for row in rows):
        note = "One encoding, cut to its first components and normalised again. Systems without vectors are lines."
        drawn.append(("Quality by dim", note, figures.quality_by_dim(rows, colours)))
    curves = {name: curve for name, folder in TRAINING.items() if (curve := _loss(_metrics(run / folder)))}
    if curves:
        drawn.append(("Training loss", "Every step, and its running mean.", figures.loss_curves(curves, colours)))
    if kept := _metrics(run / MASKS):
        note = "Expected share of each group's parts that stay; heads and MLP neurons are means over layers."
        drawn.append(("Learned masks", note, figures.share_curves("kept", _shares(kept, "kept"), "kept, %")))
    for stage, title in ((MASKS, "Languages read while masks are learnt"), ("prune", "Languages read in healing")):
        if lines := [line for line in _metrics(run / stage) if "language_shares" in line]:
            note = "Of the texts that are drawn. A share grows where the loss is still far above the LLM's own."
            curves = {name or "not told": curve for name, curve in _shares(lines, "language_shares").items()}
            drawn.append((title, note, figures.share_curves(f"languages-{stage}", curves, "share, %")))
    if healed := [line for line in _metrics(run / "prune") if "perplexity" in line]:
        note = "Of the tokens that each step scores, with a language model's attention."
        drawn.append(("Perplexity in healing", note, figures.perplexity_curves(_perplexities(healed))))
    steps = [line for line in _metrics(run / "train") if "margins" in line]
    if steps:
        note = "Every Matryoshka dim has a loss of its own; the training loss is their weighted sum."
        drawn.append(("Loss by dim", note, figures.loss_curves(_loss_by_dim(steps), {})))
        note = "Score of the positive less that of the best negative, over the temperature; right of 0 it ranks first."
        shown = {f"step {line['step']}": line["margins"] for line in (steps[0], steps[len(steps) // 2], steps[-1])}
        drawn.append(("Margins in training", note, figures.margins(shown)))
    lengths = _json(run / "train" / "token_lengths.json")
    if lengths:
        note = "Tokens after truncation, prefix and special tokens included. Each histogram sums to 100%."
        drawn.append(("Token lengths", note, figures.token_lengths(lengths)))
    if seconds:
        drawn.append(
            ("Time per stage", f"{figures.duration(sum(seconds.values()))} in all.", figures.time_bars(seconds))
        )
    return drawn


def _metrics(stage: Path) -> list[dict[str, Any]]:
    path = stage / "metrics.jsonl"
    return [line for _, line in read_json_lines(path)] if path.is_file() else []


def _loss(steps: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line["loss"])) for line in steps if {"step", "loss"} <= line.keys()]


def _shares(steps: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    return {name: [(line["step"], line[key][name]) for line in steps] for name in steps[0][key]}


def _perplexities(steps: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    names = {"perplexity": "healed", "source_perplexity": "the LLM that it was cut from"}
    return {name: [(line["step"], line[key]) for line in steps] for key, name in names.items()}


def _loss_by_dim(steps: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    return {
        f"{dim} components": [(line["step"], line["per_dim"][dim]) for line in steps] for dim in steps[0]["per_dim"]
    }


def _training_cost(steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of a training run: medians over its steps, and the highest memory."""
    measured = [line for line in steps if "peak_share" in line]
    if not measured:
        return []
    middle = {
        name: statistics.median(line[name] for line in measured)
        for name in ("tokens", "tokens_per_second", "peak_share", "padding_avoided", "recomputed_share")
    }
    return [
        ("real tokens in a step", f"{middle['tokens']:,.0f}"),
        ("real tokens per second", f"{middle['tokens_per_second']:,.0f}"),
        ("share of the machine's matrix-product peak", f"{middle['peak_share']:.1%}"),
        ("padding avoided, of a batch padded to its longest text", f"{middle['padding_avoided']:.1%}"),
        ("tokens encoded twice", f"{middle['recomputed_share']:.1%}"),
        ("peak memory of a rank", f"{max(line['peak_memory_gib'] for line in measured):.2f} GiB"),
    ]


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None

"""The table of a suite: nDCG@10 of every system on each collection, and its average over them; accuracy@1 where the
suite is made, as others report it.

RUN/suites/NAME.json has the figures, NAME.md the table, which is printed too. Both are made from what the evaluations
of the collections wrote. Which collections a suite has, and the paper's figures, is in suites.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drama_dist.distributed import ranks
from drama_dist.evaluate.metrics import evenly_weighted, paired_p_value
from drama_dist.evaluate.scoring import label_of, ndcg_path
from drama_dist.evaluate.tables import shown_p, table
from drama_dist.run.files import write_text
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.suites import MADE_SUITES, SUITES, label_of_suite

_SHOWN = {"ndcg@10": "nDCG@10", "accuracy@1": "accuracy@1"}


def compare(run: Run) -> None:
    """Write the suite's figures into the run's folder, and its table to the terminal."""
    if ranks.rank() == 0:
        evaluation, seed = run.settings.evaluate, run.settings.seed
        assert evaluation.suite  # else the stage is not asked for
        evaluated = {name: run.path(f"evaluate/{name}") for name in evaluation.suite_labels}
        figures = figures_of(evaluation.suite, evaluated, seed)
        place = run.folder / "suites" / label_of_suite(evaluation.suite)
        place.parent.mkdir(exist_ok=True)
        write_text(place.with_name(f"{place.name}.json"), json.dumps(figures, indent=2) + "\n")
        write_text(place.with_name(f"{place.name}.md"), suite_table(figures, markdown=True) + "\n")
        print(suite_table(figures), flush=True)
        say(f"suite: {place}.md")
    ranks.barrier()


def figures_of(suite: str, evaluated: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """nDCG@10, or of made suites accuracy@1, and p-values on each collection, and on average over the collections.

    evaluated: the collections, and the folders of their evaluations. A result is a system at a dim in a precision; each
    is compared with the baseline: drama at its largest dim in the first precision, or the first system where drama is
    not evaluated. p of a collection is paired_p_value's; p of the average is the same test with every difference
    divided by the number of queries of its collection, so that its statistic is the difference of averages, in which
    each collection counts equally.
    """
    rows = _results(next(iter(evaluated.values())))
    first = next((row for row in rows if row["system"] == "drama"), rows[0])
    results, baseline = [label_of(row) for row in rows], label_of(first)
    measure, of_query = ("accuracy@1", _first) if suite in MADE_SUITES else ("ndcg@10", _ndcg)
    values = {name: {result: of_query(folder, result) for result in results} for name, folder in evaluated.items()}
    collections = [_row(name, measure, of, baseline, seed) for name, of in values.items()]
    weighted = {result: evenly_weighted([*of[result].values()] for of in values.values()) for result in results}
    average = {result: float(np.mean([row[measure][result] for row in collections])) for result in results}
    return {
        "suite": suite,
        "measure": measure,
        "baseline": baseline,
        "collections": collections,
        "average": {measure: average, "p": _p_values(weighted, baseline, seed)},
        "paper": SUITES[suite].paper if suite in SUITES else {},
    }


def _results(evaluated: Path) -> list[dict[str, Any]]:
    """The results of a collection; of a system the largest dim comes first."""
    rows: list[dict[str, Any]] = json.loads((evaluated / "results.json").read_text("utf-8"))
    return rows


def _ndcg(evaluated: Path, result: str) -> dict[str, float]:
    """nDCG@10 of each query."""
    values: dict[str, float] = json.loads(ndcg_path(evaluated, result).read_text("utf-8"))
    return values


def _first(evaluated: Path, result: str) -> dict[str, float]:
    """1 for each query whose one relevant passage, with grade 1, ranks first, else 0: there alone nDCG@10 is 1."""
    return {query: float(value == 1) for query, value in _ndcg(evaluated, result).items()}


def _row(
    name: str, measure: str, values: Mapping[str, Mapping[str, float]], baseline: str, seed: int
) -> dict[str, Any]:
    means = {result: float(np.mean(list(of.values()))) for result, of in values.items()}
    p_values = _p_values({result: list(of.values()) for result, of in values.items()}, baseline, seed)
    return {"collection": name, "queries": len(values[baseline]), measure: means, "p": p_values}


def _p_values(values: Mapping[str, Sequence[float]], baseline: str, seed: int) -> dict[str, float]:
    others = [result for result in values if result != baseline]
    return {other: paired_p_value(values[baseline], values[other], seed) for other in others}


def suite_table(figures: Mapping[str, Any], markdown: bool = False) -> str:
    """The figures as text: a line for each collection and their mean, with the paper's beneath where it has some."""
    average, measure = figures["average"], figures["measure"]
    results = list(average[measure])
    has_p = [result for result in results if result != figures["baseline"]]
    headings = [
        "collection",
        "queries",
        *(word for result in results for word in ([result, "p"] if result in has_p else [result])),
    ]

    def line(name: str, queries: str, row: Mapping[str, Any]) -> list[str]:
        cells = [name, queries]
        for result in results:
            cells += [f"{row[measure][result]:.3f}", *([shown_p(row["p"][result])] if result in has_p else [])]
        return cells

    lines = [line(row["collection"], str(row["queries"]), row) for row in figures["collections"]]
    lines.append(line("average", str(sum(row["queries"] for row in figures["collections"])), average))
    told = [
        f"{figures['suite']}: {_SHOWN[measure]}, average over collections; p against {figures['baseline']}, paired "
        "randomisation",
        table([headings, *lines], markdown),
    ]
    if figures["paper"]:
        told.append(
            "the paper's average: " + ", ".join(f"{model} {value:.3f}" for model, value in figures["paper"].items())
        )
    return ("\n\n" if markdown else "\n").join(told)

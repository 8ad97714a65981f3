"""int8 and binary vectors beside float32, from the settings to results, comparison, report and suite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drama_dist.cli import main
from drama_dist.evaluate.compare import compare
from drama_dist.evaluate.figures import quality_by_dim
from drama_dist.evaluate.report import results_table
from drama_dist.evaluate.stage import sections
from drama_dist.evaluate.suite import figures_of
from drama_dist.run.runner import make
from drama_dist.settings import Settings

SYSTEMS = "evaluate.systems=[llm-unpruned,bm25]"
ALL = "evaluate.precisions=[float32,int8,binary]"
LABELS = ["llm-unpruned-48", "llm-unpruned-48-int8", "llm-unpruned-48-binary", "bm25"]
FIGURES = {"ndcg@10": 0.5, "recall@100": 0.9, "mrr@10": 0.4}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text("utf-8"))
    return rows


def test_results_say_their_precision_and_float32_alone_is_as_it_was(
    small_settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings(SYSTEMS, ALL)
    folder = make(settings, "evaluate")
    rows = rows_of(folder)
    assert [row.get("precision") for row in rows] == [None, "int8", "binary", None]
    hits = []
    for label in LABELS:
        lines = [line.split() for line in (folder / f"{label}.trec").read_text("utf-8").splitlines()]
        assert {line[5] for line in lines} == {label}
        hits.append([line[:5] for line in lines])
        assert json.loads((folder / f"{label}.ndcg.json").read_text("utf-8"))
    assert hits[0] != hits[1] != hits[2]

    figures = figures_of("dir", {"corpus": folder}, 1)
    assert figures["baseline"] == LABELS[0] and list(figures["average"]["ndcg@10"]) == LABELS
    capsys.readouterr()
    words = ["compare", settings.run, settings.run, "--system", "llm-unpruned", "--with-precision", "binary"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(", llm-unpruned-48-binary")

    with pytest.raises(ValueError, match=r"evaluate\.precisions"):
        make(small_settings(SYSTEMS), "evaluate")
    alone = make(small_settings(SYSTEMS, f"run={tmp_path / 'alone'}"), "evaluate")
    assert rows_of(alone) == [rows[0], rows[3]]
    with pytest.raises(ValueError, match=r"precision int8: .*alone has llm-unpruned on corpus in float32"):
        compare(tmp_path / "alone", tmp_path / "alone", systems=("llm-unpruned", "bm25"), precisions=("int8", "int8"))
    names = {path.name for path in alone.iterdir() if path.suffix in (".trec", ".json")}
    assert names == {"results.json", "provenance.json"} | {
        f"{label}.{end}" for label in (LABELS[0], LABELS[3]) for end in ("trec", "ndcg.json")
    }
    for name in names - {"results.json", "provenance.json"}:
        assert (alone / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_compared_depends_on_precisions_only_where_they_are_asked_for(
    small_settings: Callable[..., Settings],
) -> None:
    def of(*overrides: str) -> dict[str, Any]:
        return sections(small_settings(*overrides), "corpus")

    assert of() == of("evaluate.precisions=[float32]", "evaluate.rescore_multiplier=9")
    assert set(of("evaluate.precisions=[float32,int8]")) - set(of()) == {"evaluate.precisions"}
    assert of("evaluate.precisions=[int8]") == of("evaluate.precisions=[int8]", "evaluate.rescore_multiplier=9")
    binary = "evaluate.precisions=[binary]", "encoder.dims=[8]"
    assert of(*binary) != of(*binary, "evaluate.rescore_multiplier=9")


def test_tables_have_a_column_for_precisions_where_there_are_some() -> None:
    rows = [
        {"system": "drama", "dim": 32, **FIGURES},
        {"system": "drama", "dim": 32, "precision": "int8", **FIGURES},
        {"system": "bm25", "dim": None, **FIGURES},
    ]
    assert [line.split()[:3] for line in results_table(rows).splitlines()] == [
        ["system", "dim", "precision"],
        ["------", "---", "---------"],
        ["drama", "32", "float32"],
        ["drama", "32", "int8"],
        ["bm25", "–", "–"],
    ]
    assert "precision" not in results_table([rows[0], rows[2]])
    assert [">drama int8<" in quality_by_dim(of, {}) for of in (rows, rows[:1])] == [True, False]

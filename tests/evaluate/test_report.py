"""The report: one page that stands alone, the same numbers as JSON, and the table as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.corpus.collection import write_collection
from drama_dist.evaluate.report import results_table, write_report
from drama_dist.records import Example, Passage, write_records
from drama_dist.run.folder import open_stage
from drama_dist.settings import Settings

ROWS = [
    {"system": "drama", "dim": 32, "ndcg@10": 0.5, "recall@100": 0.9, "mrr@10": 0.4},
    {"system": "drama", "dim": 16, "ndcg@10": 0.4, "recall@100": 0.8, "mrr@10": 0.3},
    {"system": "bm25", "dim": None, "ndcg@10": 0.6, "recall@100": 0.7, "mrr@10": 0.4},
]
COUNT = {"texts": 2000, "tokens": 90_000, "cut_texts": 500, "cut_tokens": 9000}
CUT = {"passages": COUNT, "queries": dict.fromkeys(COUNT, 0)}  # nothing is said of texts that there were none of
COST = {
    "per_dim": {"32": 1.0, "16": 2.0},
    "margins": {"counts": [1, 3], "edges": [-2.0, 0.0, 1.0]},
    "tokens": 1000,
    "tokens_per_second": 500.0,
    "peak_share": 0.125,
    "padding_avoided": 0.3,
    "recomputed_share": 0.25,
}


@pytest.fixture
def run(small_settings: Callable[..., Settings]) -> Settings:
    settings = small_settings()
    for name in ("train", "evaluate/corpus"):
        stage = open_stage(settings.run, name, {}, {})
        if name == "train":
            for step in range(1, 6):
                stage.log(step=step, loss=5.0 / step, **COST, peak_memory_gib=1.0 + step)
            lengths = {"edges": [0, 10, 20], "passages": [3, 4], "queries": [9, 0]}
            (stage.folder / "token_lengths.json").write_text(json.dumps(lengths), "utf-8")
        else:
            (stage.folder / "results.json").write_text(json.dumps(ROWS), "utf-8")
            for name_of, values in (("drama-32", [0.4, 0.6]), ("bm25", [0.5, 0.7])):
                values_of = {f"q{n}": value for n, value in enumerate(values)}
                (stage.folder / f"{name_of}.ndcg.json").write_text(json.dumps(values_of), "utf-8")
        stage.finish(cut=CUT if name == "train" else {})
    return settings


def test_the_json_holds_results_and_seconds(run: Settings) -> None:
    write_report(Path(run.run), run)
    report = json.loads((Path(run.run) / "report.json").read_text("utf-8"))
    assert report["texts_cut"] == [{"artefact": "train", "what": "passages", **COUNT}]
    assert report["results"] == ROWS and set(report["seconds"]) == {"train", "evaluate/corpus"}


def test_the_page_holds_table_figures_and_comparison_and_loads_nothing(run: Settings) -> None:
    page = write_report(Path(run.run), run).read_text("utf-8")
    assert page.count("<svg") == 6 and "0.600" in page and "drama" in page
    assert all(value in page for value in ("12.5%", "30.0%", "25.0%", "6.00 GiB", "32 components", "step 5"))
    assert "<td>500 (25.0%)</td><td>90,000</td><td>9,000 (10.0%)</td>" in page
    assert "\N{MINUS SIGN}0.100" in page  # drama against bm25, paired
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!\#)|<script|@import|url\((?!\#)""", page)


def test_the_page_shows_the_languages_of_masks_and_healing(run: Settings) -> None:
    for name in ("masks", "prune"):
        stage = open_stage(run.run, name, {}, {})
        for step in range(1, 4):  # names of languages are what a corpus has, and no formulas
            shares = {"$\\de$": step / 4, "en": 1 - step / 4}
            stage.log(step=step, loss=1.0, kept={"hidden": 0.9}, language_shares=shares)
        stage.finish()
    page = write_report(Path(run.run), run).read_text("utf-8")
    assert (
        page.count("<svg") == 9
        and "Languages read while masks are learnt" in page
        and "Languages read in healing" in page
    )
    assert page.count("$\\de$") == 2


def test_the_page_shows_the_perplexity_in_healing(run: Settings) -> None:
    before = write_report(Path(run.run), run).read_text("utf-8")
    stage = open_stage(run.run, "prune", {}, {})
    for step in range(1, 4):
        stage.log(step=step, loss=1.0, perplexity=600.0 / step, source_perplexity=20.0)
    stage.finish()
    page = write_report(Path(run.run), run).read_text("utf-8")
    assert "Perplexity in healing" in page and "Perplexity in healing" not in before


def test_a_run_that_was_not_evaluated_says_what_to_do(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings()
    with pytest.raises(FileNotFoundError, match="run `drama evaluate` for this run first"):
        write_report(Path(settings.run), settings)


def test_the_table_as_text_and_as_markdown() -> None:
    assert results_table(ROWS).splitlines()[2] == "drama    32    0.500       0.900   0.400"
    markdown = results_table(ROWS, markdown=True).splitlines()
    assert markdown[2].split("|")[3:6] == ["     0.500 ", "  **0.900** ", " **0.400** "] and "**0.600**" in markdown[4]


def test_the_page_shows_samples_of_each_source(run: Settings) -> None:
    texts = [Passage("a", "Bread <b>rises</b>. " * 30, "Dough"), Passage("b", "A river floods.")]
    for name in ("windows", "augment"):
        stage = open_stage(run.run, name, {}, {})
        if name == "windows":
            write_collection(stage.folder, texts, [], {})
        else:
            crops = [
                Example(
                    f"crop {n}", ("a",), ("b",), "crop", provenance={"kind": "span", "rank": [1, 7, None, 12][n % 4]}
                )
                for n in range(8)
            ]
            judged = [Example("what <i>floods</i>", ("b",), ("a",), "labelled", provenance={"query": "q1"})]
            write_records(stage.folder / "examples.jsonl", [*crops, *judged])
        stage.finish()
    page = write_report(Path(run.run), run).read_text("utf-8")
    assert "crop: 8 examples, whose own passage the teacher ranks first for 25% and among the first ten for 50%" in page
    assert "labelled: 1 example</summary>" in page and "what &lt;i&gt;floods&lt;/i&gt;" in page
    assert page.count("<dt>crop ") == 5 and "kind span, rank of its passage " in page
    assert "a: Dough Bread &lt;b&gt;rises&lt;/b&gt;." in page and " ...<br>" in page

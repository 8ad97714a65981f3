"""Comparing two runs: the paired test, the queries won and lost, and what cannot be compared."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from drama_dist.cli import main
from drama_dist.corpus.collection import Qrels, open_collection, write_collection
from drama_dist.evaluate.compare import as_text, compare, p_value, write_queries
from drama_dist.evaluate.metrics import paired_p_value
from drama_dist.evaluate.scoring import score
from drama_dist.records import Passage, Query
from drama_dist.run.artefact import Damaged
from drama_dist.run.folder import open_stage
from drama_dist.run.runner import make
from drama_dist.search.systems import Ranking
from drama_dist.settings import Settings

QUERIES = {f"q{n}": f"query {n} asks" for n in range(6)}
QRELS = {query: {"p 0": 1} for query in QUERIES}
FIRST, SECOND, THIRD = ("p 0", "p1", "p2"), ("p1", "p 0", "p2"), ("p1", "p2", "p 0")  # rank of the relevant passage
AT_2, AT_3 = 1 / np.log2(3), 1 / np.log2(4)  # nDCG@10 where it is not 1
A = dict(zip(QUERIES, (FIRST, FIRST, SECOND, THIRD, SECOND, FIRST), strict=True))
B = dict(zip(QUERIES, (SECOND, THIRD, FIRST, THIRD, SECOND, FIRST), strict=True))
Rankings = Mapping[tuple[str, int | None], Mapping[str, Sequence[str]]]


def add_collection(
    run: Path, rankings: Rankings, name: str = "corpus", queries: Mapping[str, str] = QUERIES, qrels: Qrels = QRELS
) -> Path:
    """A stored collection, and results on it as the evaluate stage writes them. rankings: (system, dim) -> query ->
    passages, best first.
    """
    stage = open_stage(run, name if name == "corpus" else f"collections/{name}", {}, {})
    passages = [Passage("p 0", "long first text " * 9), Passage("p1", "one"), Passage("p2", "two", title="the title")]
    write_collection(stage.folder, passages, [Query(id, text) for id, text in queries.items()], qrels)
    stage.finish()
    stored = open_collection(stage.folder)
    stage = open_stage(run, f"evaluate/{name}", {}, {})
    rows = []
    for (system, dim), ranked in rankings.items():
        depth = max((len(hits) for hits in ranked.values()), default=1)
        positions = np.full((len(queries), depth), -1)
        for row, query in enumerate(queries):
            hits = [stored.passages.position(id) for id in ranked.get(query, ())]
            positions[row, : len(hits)] = hits
        scores = -np.arange(positions.size, dtype=np.float32).reshape(positions.shape)
        rows.append(score(system, Ranking(dim, scores, positions), stored, stage.folder).as_row())
    (stage.folder / "results.json").write_text(json.dumps(rows), "utf-8")
    stage.finish()
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    a = add_collection(tmp_path / "a", {("drama", 8): A, ("drama", 4): B, ("bm25", None): B})
    return a, add_collection(tmp_path / "b", {("drama", 16): A, ("drama", 8): B, ("drama", 4): A})


def test_wins_losses_and_p_are_those_of_the_values(runs: tuple[Path, Path]) -> None:
    (one,) = compare(*runs)
    assert [query.id for query in one.queries] == list(QUERIES)
    np.testing.assert_allclose(one.a_Q, [1, 1, AT_2, AT_3, AT_2, 1])
    np.testing.assert_allclose(one.b_Q, [AT_2, AT_3, 1, AT_3, AT_2, 1])
    assert one.counts == (2, 1, 3) and one.notes == []
    assert p_value([one]) == pytest.approx(paired_p_value(one.a_Q.tolist(), one.b_Q.tolist(), seed=7))
    assert (
        p_value([one]) == 6 / 8
    )  # of 8 patterns of signs, the two where the outer ones oppose the middle are nearer to 0


def test_the_text_shows_the_table_and_the_first_passages_of_wins_and_losses(runs: tuple[Path, Path]) -> None:
    lines = as_text(compare(*runs), 1, 60).splitlines()
    assert lines[:2] == [f"A: {runs[0]}, drama-8", f"B: {runs[1]}, drama-8"]
    assert lines[5].split() == ["corpus", "6", "0.7936", "0.7103", "+0.0833", "0.750", "2", "1", "3"]
    assert lines[-11:] == [
        "corpus: largest wins",
        "+0.500 (A 1.000, B 0.500)  query q1",
        "    query 1 asks",
        "    A first: p 0 (relevant): long first text long first ...",
        "    B first: p1 (not judged): one",
        "",
        "corpus: largest losses",
        "-0.369 (A 0.631, B 1.000)  query q2",
        "    query 2 asks",
        "    A first: p1 (not judged): one",
        "    B first: p 0 (relevant): long first text long first ...",
    ]


def test_another_collection_with_the_same_ids_is_refused_and_left_out_of_the_average(runs: tuple[Path, Path]) -> None:
    for run, texts in zip(runs, ("once", "other"), strict=True):
        add_collection(run, {("drama", 8): {"x": ("p1",)}}, "same-ids", {"x": texts}, {"x": {"p1": 1}})
    with pytest.raises(ValueError, match="all common queries have other texts: x"):
        compare(*runs, collection="same-ids")
    (one,) = compare(*runs)
    assert one.a.collection == "corpus" and "left out: same-ids of " in as_text([one], 1, 80)


def test_a_run_is_all_ties_with_itself(runs: tuple[Path, Path]) -> None:
    (one,) = compare(runs[0], runs[0])
    assert one.counts == (0, 0, 6) and p_value([one]) == 1
    assert "largest" not in as_text([one], 5, 80)


def test_systems_of_one_run_are_compared_at_the_largest_dims(runs: tuple[Path, Path]) -> None:
    (one,) = compare(runs[0], runs[0], systems=("drama", "bm25"))
    assert (one.a.label, one.b.label) == ("drama-8", "bm25") and one.counts == (2, 1, 3)
    (one,) = compare(*runs, dim=4)
    assert (one.a.label, one.b.label) == ("drama-4", "drama-4") and one.counts == (1, 2, 3)


def test_without_a_common_dim_each_has_its_largest(tmp_path: Path) -> None:
    a = add_collection(tmp_path / "a", {("drama", 8): A, ("teacher", 32): A})
    (one,) = compare(a, a, systems=("drama", "teacher"))
    assert (one.a.label, one.b.label) == ("drama-8", "teacher-32")


def test_collections_weigh_the_same_in_the_average(runs: tuple[Path, Path]) -> None:
    few = {"x": "once", "y": "twice"}
    qrels = {"x": {"p1": 1}, "y": {"p2": 1}}
    add_collection(runs[0], {("drama", 8): {"x": ("p1",), "y": ("p2",)}}, "few", few, qrels)
    add_collection(runs[1], {("drama", 8): {"x": ("p1",)}}, "few", few, qrels)
    add_collection(runs[0], {("drama", 8): A}, "only-in-a")
    add_collection(runs[0], {}, "unjudged", {}, {})
    add_collection(runs[1], {}, "unjudged", {}, {})
    both = compare(*runs)
    assert [one.a.collection for one in both] == ["corpus", "few"]
    text = as_text(both, 5, 80)
    assert next(line for line in text.splitlines() if line.startswith("average")).split()[1:4] == [
        f"{(4 + AT_2 * 2 + AT_3 - 1) / 12 + 1 / 2:.4f}",
        f"{(2 + AT_2 * 2 + AT_3 * 2) / 12 + 1 / 4:.4f}",
        f"{(1 - AT_2 + 1 - AT_3 + AT_2 - 1) / 12 + 1 / 4:+.4f}",
    ]
    signs = np.stack(np.meshgrid(*[[-1, 1]] * 4), axis=-1).reshape(-1, 4)
    sums = np.abs(signs @ [(1 - AT_2) / 6, (1 - AT_3) / 6, (AT_2 - 1) / 6, 1 / 2])
    observed = abs((1 - AT_3) / 6 + 1 / 2)
    assert p_value(both) == np.mean(sums >= observed - 1e-9)
    assert "    B first: nothing" in text.splitlines()
    (one,) = compare(*runs, collection="few")
    assert one.counts == (1, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collection": "other"}, "collection 'other': .*a has results on corpus"),
        ({"systems": ("bm26", "bm26")}, "system 'bm26': .*a has on corpus: drama, bm25"),
        ({"systems": ("bm25", "bm25")}, "system 'bm25': .*b has on corpus: drama$"),
        ({"dim": 16}, "dim 16: .*a has drama on corpus at dim 8, 4"),
    ],
)
def test_what_a_run_does_not_have_is_named(runs: tuple[Path, Path], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(*runs, **options)


def test_runs_without_results_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such run"):
        compare(runs[0], tmp_path / "none")
    (tmp_path / "new").mkdir()
    with pytest.raises(FileNotFoundError, match=r"new: not evaluated; do it first: drama evaluate SETTINGS run=.*new"):
        compare(tmp_path / "new", runs[0])
    unjudged = add_collection(tmp_path / "unjudged", {}, "corpus", {}, {})
    with pytest.raises(ValueError, match="unjudged: no results, because corpus has no judged queries"):
        compare(runs[0], unjudged)
    elsewhere = add_collection(tmp_path / "elsewhere", {("drama", 8): A}, "other")
    with pytest.raises(ValueError, match=r"on no common collection: .*a on corpus, .*elsewhere on other"):
        compare(runs[0], elsewhere)


def test_queries_that_one_run_lacks_or_words_otherwise_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    queries = {"q1": "query 1 asks", "q2": "other words", "q9": "only here"}
    qrels = {"q1": {"p 0": 1, "p1": 0}, "q2": {"p 0": 1}, "q9": {"p1": 1}}  # a grade of 0 changes no value
    other = add_collection(tmp_path / "other", {("drama", 8): {**B, "q9": FIRST}}, "corpus", queries, qrels)
    (one,) = compare(runs[0], other)
    assert [query.id for query in one.queries] == ["q1", "q2"] and one.counts == (1, 1, 0)
    assert one.notes == [
        "corpus: queries only in A: 4 (q0, q3, q4, q5)",
        "corpus: queries only in B: 1 (q9)",
        "corpus: queries with another text in B: 1 (q2)",
    ]
    assert one.notes[0] in as_text([one], 5, 80) and "B first: p1 (not relevant)" in as_text([one], 5, 80)


def test_other_collections_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    graded = {**QRELS, "q1": {"p 0": 2}, "q2": {"p2": 1}}
    other = add_collection(tmp_path / "graded", {("drama", 8): A}, "corpus", QUERIES, graded)
    with pytest.raises(ValueError, match="the judgements of 2 of 6 common queries differ: q1, q2"):
        compare(runs[0], other)
    apart = add_collection(tmp_path / "apart", {("drama", 8): {}}, "corpus", {"z": "z"}, {"z": {"p1": 1}})
    with pytest.raises(ValueError, match="no query in common"):
        compare(runs[0], apart)


def test_settings_are_not_read_and_damage_is_named(runs: tuple[Path, Path]) -> None:
    (runs[0] / "settings.yaml").write_text("of: {another: version", "utf-8")
    assert len(compare(*runs)) == 1
    values = runs[1] / "evaluate" / "corpus" / "drama-8.ndcg.json"
    values.write_text(values.read_text("utf-8").replace("1.0", "0.9"), "utf-8")
    with pytest.raises(Damaged, match=r"drama-8\.ndcg\.json: damaged"):
        compare(*runs)


def test_a_collection_that_is_gone_or_another_one_now_is_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = add_collection(tmp_path / "other", {}, "corpus", {"z": "z"}, {"z": {"p1": 1}})
    shutil.rmtree(runs[0] / "corpus")
    with pytest.raises(FileNotFoundError, match=r"corpus: not found; make it first: drama corpus SETTINGS run=.*a$"):
        compare(*runs)
    shutil.copytree(other / "corpus", runs[0] / "corpus")
    with pytest.raises(ValueError, match=r"drama-8\.ndcg\.json: of other queries than .*corpus has"):
        compare(*runs)


@pytest.mark.parametrize("name", ["all.tsv", "all.json"])
def test_all_queries_are_written(runs: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    comparisons = compare(*runs)
    write_queries(comparisons, tmp_path / name)
    with open(tmp_path / name, encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t")) if name.endswith("tsv") else json.load(file)
    assert list(rows[2]) == ["collection", "id", "text", "a", "b", "difference"]
    assert [rows[2][key] for key in ("collection", "id", "text")] == ["corpus", "q2", "query 2 asks"]
    assert [float(row["difference"]) for row in rows] == comparisons[0].difference_Q.tolist()


def test_the_command_compares_a_real_run(
    small_settings: Callable[..., Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings("evaluate.systems=[llm-unpruned,bm25]")
    make(settings, "evaluate")
    capsys.readouterr()
    words = ["compare", settings.run, settings.run, "--system", "llm-unpruned", "--with-system", "bm25"]
    assert main([*words, "--queries", "3", "--output", str(tmp_path / "all.json")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("corpus  "))
    results = json.loads((Path(settings.run) / "evaluate" / "corpus" / "results.json").read_text("utf-8"))
    assert line.split()[1:4] == ["12", *(f"{row['ndcg@10']:.4f}" for row in results)]
    assert len(json.loads((tmp_path / "all.json").read_text("utf-8"))) == 12
    assert main(["compare", settings.run, settings.run]) == 2
    assert "drama compare: system 'drama': " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--output", "all.xlsx"])
    assert "'all.xlsx': must end in .tsv or .json" in capsys.readouterr().err

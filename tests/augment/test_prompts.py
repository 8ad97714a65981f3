"""Reading the LLM's answers: what counts as a query, and why not."""

from __future__ import annotations

import pytest

from drama_dist.augment.sources.prompts import UnusableAnswer, read_query, unfinished_answer, write_query_messages

PASSAGE = "The inverse of a square matrix."


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("Task: find it.\nQuery: how to invert a matrix", "how to invert a matrix"),
        ('query:  "quoted   and spaced"  \nmore', "quoted and spaced"),
        ("**Query**: bold marks", "bold marks"),
        ("Query: 矩阵怎么求逆", "矩阵怎么求逆"),
    ],
)
def test_the_query_line_is_found(answer: str, query: str) -> None:
    assert read_query(answer, PASSAGE) == query


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Task: find it.", "no line that begins with 'Query:'"),
        ("Query: ?!", "the query has no words"),
        ("Query: " + "word " * 80, "more than 300 characters"),
        ("Query: I cannot help with that", "refusal"),
        ("Query: How often to feed sourdough starter", "repeats a worked example"),
        (f"Query: {PASSAGE.upper()}", "repeats the whole passage"),
    ],
)
def test_an_unusable_answer_has_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(UnusableAnswer, match=reason):
        read_query(answer, PASSAGE)


def test_an_answer_that_stops_after_the_task_can_be_continued() -> None:
    assert unfinished_answer("Task: find it.\nThen more") == {"role": "assistant", "content": "Task: find it.\nQuery:"}
    assert unfinished_answer("Task: find it.\nQuery: x y") is None
    assert unfinished_answer("Something else") is None


def test_conversations_differ_only_in_their_last_message() -> None:
    first, second = write_query_messages("one"), write_query_messages("two")
    assert first[:-1] == second[:-1] and first[-1]["content"].endswith("one")
    assert [message["role"] for message in first] == ["system", *["user", "assistant"] * 3, "user"]

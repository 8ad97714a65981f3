"""Synthetic queries: an LLM reads a passage and writes what somebody would search with to find it.

Answers that hold no usable query come back beside the queries, with the reason; nothing is dropped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drama_dist.augment.sources.prompts import (
    PROMPT_VERSION,
    Message,
    UnusableAnswer,
    begun_answer,
    read_query,
    write_query_messages,
)
from drama_dist.augment.writers.local import LanguageModel
from drama_dist.augment.written import Written, in_parts
from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Passage
from drama_dist.run.shares import WHOLE, Share
from drama_dist.settings import AugmentSettings


def write_queries(
    folder: Path, table: PassageTable, llm: LanguageModel, choice: AugmentSettings, seed: int, share: Share = WHOLE
) -> tuple[list[Written], list[dict[str, Any]]]:
    """Ask for `synthetic_queries` queries, one a passage chosen by the seed, in batches kept in `folder`.

    Returns the queries, and a row {passage, reason, value} for each answer that is unusable; a share that is not the
    whole returns nothing. Raises ValueError where more than the share `bad_answer_limit` is unusable.
    """
    count = min(choice.synthetic_queries, len(table))
    chosen = random.Random(f"{seed} synthetic").sample(range(len(table)), count)
    passages = sorted((table[position] for position in chosen), key=lambda passage: len(passage.content))

    def ask(number: int, batch: Sequence[Passage]) -> list[dict[str, Any]]:
        texts = [llm.cut(passage.content, choice.prompt_passage_tokens) for passage in batch]
        answers = _answers(llm, [write_query_messages(text) for text in texts], seed + number)
        return [_row(passage, answer, llm.name, seed) for passage, answer in zip(batch, answers, strict=True)]

    rows = in_parts(folder, passages, choice.generation_batch, "queries", ask, share)
    written = [Written(**row) for row in rows if "reason" not in row]
    aside = [row for row in rows if "reason" in row]
    _refuse_beyond(choice.bad_answer_limit, aside, count, llm.name)
    return written, aside


def _answers(llm: LanguageModel, conversations: list[list[Message]], seed: int) -> list[str]:
    """Answers; where one stops after the task, the LLM is asked to go on with the query."""
    answers = llm.answer(conversations, seed)
    begun = {number: message for number, answer in enumerate(answers) if (message := begun_answer(answer))}
    if begun:
        rest = llm.answer([[*conversations[number], message] for number, message in begun.items()], seed)
        for (number, message), more in zip(begun.items(), rest, strict=True):
            answers[number] = f"{message['content']} {more.strip()}"
    return answers


def _row(passage: Passage, answer: str, model: str, seed: int) -> dict[str, Any]:
    try:
        query = read_query(answer, passage.content)
    except UnusableAnswer as reason:
        return {"passage": passage.id, "reason": str(reason), "value": answer}
    made = {"passage": passage.id, "model": model, "prompt": PROMPT_VERSION, "seed": seed, "answer": answer}
    return asdict(Written(query, passage.id, "synthetic", passage.language, made))


def _refuse_beyond(limit: float, aside: list[dict[str, Any]], count: int, model: str) -> None:
    if len(aside) > limit * count:
        first = "\n".join(f"  {row['passage']}: {row['reason']}: {row['value'][:120]!r}" for row in aside[:3])
        raise ValueError(
            f"{len(aside)} of {count} answers of {model} hold no usable query, more than "
            f"augment.bad_answer_limit={limit} allows; the first:\n{first}\n"
            "Use a stronger LLM, raise augment.max_new_tokens or the limit, or set augment.synthetic_queries=0."
        )

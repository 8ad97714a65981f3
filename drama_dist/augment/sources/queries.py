"""Synthetic queries: an LLM reads a passage and writes a query that somebody might use to find it.

Answers without a usable query are returned separately with the reason; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from drama_dist.augment.parts import in_parts
from drama_dist.augment.sources.prompts import (
    FORM,
    PROMPT_VERSION,
    Message,
    UnusableAnswer,
    read_query,
    unfinished_answer,
    write_query_messages,
)
from drama_dist.augment.unusable import refuse_beyond
from drama_dist.augment.writers.choice import sampling_of
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Passage
from drama_dist.run.shares import WHOLE, Share
from drama_dist.settings import AugmentSettings


def write_queries(
    folder: Path, table: PassageTable, llm: Writer, augment: AugmentSettings, seed: int, share: Share = WHOLE
) -> tuple[list[WrittenQuery], list[dict[str, Any]]]:
    """Ask for `synthetic_queries` queries, one per passage sampled by the seed, in batches stored in `folder`.

    Returns the queries, and a row {passage, reason, value} for each unusable answer; a share of the work returns
    nothing. Raises ValueError if more than the fraction `bad_answer_limit` of the answers is unusable.
    """
    count = min(augment.synthetic_queries, len(table))
    # All in a random order, so that those of a smaller count are among those of a larger one.
    positions = np.random.default_rng(seed).permutation(len(table))[:count]
    passages = sorted((table[position] for position in positions.tolist()), key=lambda passage: len(passage.content))

    def ask(index: int, batch: Sequence[Passage]) -> list[dict[str, Any]]:
        texts = [llm.cut(passage.content, augment.prompt_passage_tokens) for passage in batch]
        answers = _answers(llm, [write_query_messages(text) for text in texts], sampling_of(augment, seed, FORM))
        return [_row(passage, answer, llm.name, seed) for passage, answer in zip(batch, answers, strict=True)]

    rows = in_parts(folder, passages, augment.generation_batch, "queries", ask, share, writer=llm)
    written = [WrittenQuery(**row) for row in rows if "reason" not in row]
    aside = [row for row in rows if "reason" in row]
    remedy = "raise augment.max_new_tokens or set augment.synthetic_queries=0"
    refuse_beyond(augment.bad_answer_limit, aside, count, llm.name, "query", remedy)
    return written, aside


def _answers(llm: Writer, conversations: list[list[Message]], sampling: Sampling) -> list[str]:
    """The answers; if one stops after the task, the LLM is asked to continue it with the query."""
    answers = llm.answer(conversations, sampling)
    unfinished = {index: message for index, answer in enumerate(answers) if (message := unfinished_answer(answer))}
    if unfinished:
        continuations = llm.answer(
            [[*conversations[index], message] for index, message in unfinished.items()], sampling
        )
        for (index, message), text in zip(unfinished.items(), continuations, strict=True):
            answers[index] = f"{message['content']} {text.strip()}"
    return answers


def _row(passage: Passage, answer: str, model: str, seed: int) -> dict[str, Any]:
    try:
        query = read_query(answer, passage.content)
    except UnusableAnswer as reason:
        return {"passage": passage.id, "reason": str(reason), "value": answer}
    provenance = {"passage": passage.id, "model": model, "prompt": PROMPT_VERSION, "seed": seed, "answer": answer}
    return asdict(WrittenQuery(query, passage.id, "synthetic", passage.language, provenance))

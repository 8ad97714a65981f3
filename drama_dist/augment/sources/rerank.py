"""Listwise preference: an LLM puts a query's first passages in order (arXiv 2502.18460, section 3.2).

Its first passage becomes the positive, its last ones the hard negatives. An LLM in this process writes nothing: its
scores for the answer's first letter sort the passages (Reddy et al. 2024, arXiv 2406.15657, section 3). Every LLM gives
such scores, even one that cannot rank (benchmarks/results/writers.md). Where it cannot read all passages at once, a
window slides over them from the last to the first, half a window at a time (Sun et al. 2023, arXiv 2304.09542).
Shapes: Q queries, D passages of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from drama_dist.augment.parts import in_parts
from drama_dist.augment.sources.prompts import UnusableAnswer
from drama_dist.augment.sources.rank_prompts import (
    ANSWER_TOKENS,
    LETTERS,
    OPENING,
    PROMPT_VERSION,
    as_answer,
    rank_messages,
    read_order,
)
from drama_dist.augment.unusable import refuse_beyond
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.corpus.collection import PassageTable
from drama_dist.learning_settings import AugmentSettings
from drama_dist.records import Example

Rank = Callable[[Sequence[int], int], np.ndarray]  # of examples' numbers and a depth: positions Q × D, -1 for none


def rerank(
    folder: Path,
    numbers: Sequence[int],
    examples: Sequence[Example],
    rank: Rank,
    table: PassageTable,
    llm: Writer,
    augment: AugmentSettings,
) -> tuple[dict[int, Example], list[dict[str, Any]], Counter[str]]:
    """The examples of these numbers with the LLM's positives and negatives, in parts stored in `folder`.

    Returns the new examples by number, a row {query, reason, value} for each unusable answer, whose example stays as it
    is, and what was mended in how many answers. Raises ValueError if more than the fraction `bad_answer_limit` of the
    queries has an unusable answer.
    """

    def ask(index: int, part: Sequence[int]) -> list[dict[str, Any]]:
        positions_QD = rank(part, augment.rerank_depth)
        lists = [[table.ids[position] for position in row if position >= 0] for row in positions_QD]
        orders = [_Order(examples[number].query, ids) for number, ids in zip(part, lists, strict=True)]
        for begin in _begins(augment.rerank_depth, augment.rerank_window):
            _order_windows(orders, begin, table, llm, augment)
        return [
            {"number": number, **order.result(examples[number], llm.name, augment)}
            for number, order in zip(part, orders, strict=True)
        ]

    rows = in_parts(folder, numbers, augment.generation_batch, "reranked", ask, writer=llm)
    aside = [{name: row[name] for name in ("query", "reason", "value")} for row in rows if "reason" in row]
    remedy = "lower augment.rerank_window or set augment.rerank=0"
    refuse_beyond(augment.bad_answer_limit, aside, len(numbers), llm.name, "order", remedy)
    mended = Counter(f"reranked with {what} passages" for row in rows for what in row.get("mended", ()))
    return {row["number"]: Example.from_json(row["example"]) for row in rows if "example" in row}, aside, mended


class _Order:
    """A query's passages, in an order that the LLM's answers change; the answers, and what was wrong with one."""

    def __init__(self, query: str, ids: list[str]):
        self.query, self.ids = query, ids
        self.answers: list[str] = []
        self.by_scores = False
        self.mended: Counter[str] = Counter()
        self.problem: str | None = None

    def take(self, answer: str, begin: int, end: int) -> None:
        self.answers.append(answer)
        window = self.ids[begin:end]
        try:
            order, mended = read_order(answer, len(window))
        except UnusableAnswer as reason:
            self.problem = str(reason)
            return
        self.mended += mended
        self.ids[begin:end] = [window[position] for position in order]

    def result(self, example: Example, model: str, augment: AugmentSettings) -> dict[str, Any]:
        if self.problem is not None:
            return {"query": self.query, "reason": self.problem, "value": self.answers[-1]}
        own = example.provenance.get("passage")  # which the query was written from
        behind = [id for id in self.ids[1:] if id != own]
        negatives = min(augment.negatives, len(self.ids) // 2, len(behind))
        provenance = {
            **example.provenance,
            "source": example.source,
            "ranked_by": model,
            "rank_prompt": PROMPT_VERSION,
            "order": self.answers,
            "order_from": "scores of the first letter" if self.by_scores else "answers",
        }
        reranked = replace(
            example,
            positives=tuple(self.ids[:1]),
            negatives=tuple(behind[len(behind) - negatives :]),
            source="rerank",
            provenance=provenance,
        )
        return {"example": asdict(reranked), "mended": sorted(self.mended)}


def _begins(depth: int, window: int) -> list[int]:
    """Where windows begin, the last first; the last to come begins with the first passage."""
    return [*range(depth - window, 0, -(window // 2)), 0]


def _order_windows(
    orders: Sequence[_Order], begin: int, table: PassageTable, llm: Writer, augment: AugmentSettings
) -> None:
    """Ask for an order of the passages from `begin` on, of all queries that have two or more there."""
    end = begin + augment.rerank_window
    asked = [order for order in orders if order.problem is None and len(order.ids[begin:end]) > 1]
    if not asked:
        return
    conversations = []
    for order in asked:
        contents = table.contents([table.position(id) for id in order.ids[begin:end]])
        conversations.append(rank_messages(order.query, [llm.cut(text, augment.rerank_tokens) for text in contents]))
    opened = [[*messages, OPENING] for messages in conversations]
    likely = llm.next_token_scores(opened, LETTERS[: augment.rerank_window])
    if likely is None:
        greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=ANSWER_TOKENS * augment.rerank_window, seed=0)
        answers = llm.answer(conversations, greedy)
    else:
        shown = [len(order.ids[begin:end]) for order in asked]
        answers = [
            as_answer(np.argsort(-row[:n], kind="stable").tolist()) for row, n in zip(likely, shown, strict=True)
        ]
    for order, answer in zip(asked, answers, strict=True):
        order.by_scores = likely is not None
        order.take(answer, begin, end)

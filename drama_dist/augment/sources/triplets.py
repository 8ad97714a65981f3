"""Triplets: an LLM makes up tasks, and for each a query, a text that answers it and one that does not.

No corpus is needed. Covers asking for both in parts that are stored as they come; prompts are in triplet_prompts.py,
the stage that keeps the texts in ../triplet_stage.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drama_dist.augment.parts import in_parts
from drama_dist.augment.sources.prompts import UnusableAnswer
from drama_dist.augment.sources.triplet_prompts import (
    FORM,
    PROMPT_VERSION,
    read_tasks,
    read_triplet,
    task_messages,
    triplet_messages,
)
from drama_dist.augment.unusable import refuse_beyond
from drama_dist.augment.writers.choice import sampling_of
from drama_dist.augment.writers.writer import Writer
from drama_dist.learning_settings import AugmentSettings

_TASKS = 10  # asked for at a time
_TRIPLETS = 10  # for each task, where all answers are usable
_REMEDY = "raise augment.triplet_tokens or set augment.triplets=0"
_FEWEST_LISTS = 4  # of tasks, so that one bad answer is not all


def write_triplets(
    folder: Path, llm: Writer, augment: AugmentSettings, language: str, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows {query, positive, negative, task, answer} in order, and a row {reason, value} for each unusable answer to
    either question.

    Asks `augment.triplets` times. Raises ValueError where no task or no triplet is usable, or more than the fraction
    `bad_answer_limit` of the answers to either question is not.
    """
    limit = augment.triplet_tokens

    def ask_for_tasks(index: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        conversations = [task_messages(n, _TASKS, random.Random(f"{seed} tasks {n}")) for n in numbers]
        sampling = sampling_of(augment, seed + index, max_new_tokens=limit)
        return [_tasks_row(answer) for answer in llm.answer(conversations, sampling)]

    asked = range(max(_FEWEST_LISTS, -(-augment.triplets // (_TASKS * _TRIPLETS))))
    rows = in_parts(folder / "tasks", asked, augment.generation_batch, "tasks", ask_for_tasks, writer=llm)
    no_tasks = [row for row in rows if "reason" in row]
    refuse_beyond(augment.bad_answer_limit, no_tasks, len(asked), llm.name, "tasks", _REMEDY)
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks", ())))
    if not tasks:
        raise ValueError(f"{llm.name}: none of {len(asked)} answers has a usable task; use a stronger LLM")

    def ask(index: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        of_numbers = [tasks[number % len(tasks)] for number in numbers]
        conversations = [
            triplet_messages(task, language, random.Random(f"{seed} triplet {number}"))
            for number, task in zip(numbers, of_numbers, strict=True)
        ]
        answers = llm.answer(conversations, sampling_of(augment, seed + index, FORM, limit))
        return [_row(task, answer) for task, answer in zip(of_numbers, answers, strict=True)]

    wanted = range(augment.triplets)
    written = in_parts(folder / "triplets", wanted, augment.generation_batch, "triplets", ask, writer=llm)
    aside = [row for row in written if "reason" in row]
    refuse_beyond(augment.bad_answer_limit, aside, len(wanted), llm.name, "triplet", _REMEDY)
    if len(aside) == len(written):
        raise ValueError(f"{llm.name}: none of {len(written)} answers has a usable triplet; use a stronger LLM")
    return [row for row in written if "reason" not in row], no_tasks + aside


def provenance(row: dict[str, Any], model: str, seed: int) -> dict[str, Any]:
    """What an example says of where it comes from."""
    return {"task": row["task"], "model": model, "prompt": PROMPT_VERSION, "seed": seed, "answer": row["answer"]}


def _tasks_row(answer: str) -> dict[str, Any]:
    try:
        return {"tasks": read_tasks(answer)}
    except UnusableAnswer as reason:
        return {"reason": str(reason), "value": answer}


def _row(task: str, answer: str) -> dict[str, Any]:
    try:
        triplet = read_triplet(answer)
    except UnusableAnswer as reason:
        return {"task": task, "reason": str(reason), "value": answer}
    return {"task": task, "answer": answer, **vars(triplet)}

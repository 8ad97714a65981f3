"""Prompts for an LLM that makes up retrieval tasks and triplets, and reading its answers.

Covers the messages, in two steps: tasks of a domain, then a query, a text that answers it and one that only seems to
(arXiv 2502.18460, section 3.2; after Wang et al. 2024, arXiv 2401.00368). Any change of wording, or of the lists, needs
a new PROMPT_VERSION.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from drama_dist.augment.sources.prompts import Form, Message, UnusableAnswer, is_refusal
from drama_dist.corpus.split import count_words

PROMPT_VERSION = "triplet-1"
FORM = Form("triplet", ("query", "answer", "distractor"))

_DOMAINS = re.split(
    ", ",
    "medicine, law, cooking, programming, history, physics, chemistry, biology, finance, insurance, "
    "taxes, travel, sports, music, films, literature, gardening, car repair, home repair, electronics, "
    "mathematics, statistics, geography, politics, news, education, psychology, philosophy, religion, "
    "architecture, agriculture, climate, astronomy, nutrition, parenting, pets, customer support, product "
    "reviews, patents, scientific papers, job offers, public administration, safety rules, games",
)
_STYLES = ("a question", "some keywords", "a claim to be checked", "a problem that is described", "a short title")
_LENGTHS = ("about 30 words", "about 60 words", "about 100 words")
_FEWEST_WORDS = 4  # of a text
_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*(.+)$", re.MULTILINE)
_PARTS = re.compile(r"^\W*(Query|Answer|Distractor)\W*[:：]", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Triplet:
    """A query, a text that answers it, and one that does not."""

    query: str
    positive: str
    negative: str


def task_messages(number: int, count: int, chance: random.Random) -> list[Message]:
    """The conversation that asks for `count` tasks. number: of the conversation, which chooses the domain."""
    domain, style = _DOMAINS[number % len(_DOMAINS)], chance.choice(_STYLES)
    return [
        {"role": "system", "content": "You plan search engines. You answer with a numbered list and nothing else."},
        {
            "role": "user",
            "content": f"List {count} different search tasks in the domain of {domain}, where what is typed is "
            f"{style}. Say in one sentence each what is searched for, as: Given a recipe's name, find how it is "
            "cooked.",
        },
    ]


def read_tasks(answer: str) -> list[str]:
    """The tasks in an answer, each once; raises UnusableAnswer where there is none."""
    lines = (" ".join(line.split()) for line in _NUMBERED.findall(answer))
    tasks = list(dict.fromkeys(line for line in lines if count_words(line) >= _FEWEST_WORDS and not is_refusal(line)))
    if not tasks:
        raise UnusableAnswer("no list of tasks")
    return tasks


def triplet_messages(task: str, language: str, chance: random.Random) -> list[Message]:
    """The conversation that asks for a triplet. language: ISO 639 code or English name."""
    style, length = chance.choice(_STYLES), chance.choice(_LENGTHS)
    return [
        {
            "role": "system",
            "content": "You write training data for a search engine. You answer with three parts and nothing else: "
            "'Query:', 'Answer:' and 'Distractor:'.",
        },
        {
            "role": "user",
            "content": f"Search task: {task}\nWrite a query that is {style}; an answer, which is a text of {length} "
            "that is exactly what this query looks for; and a distractor, which is a text of the same length that "
            f"shares words with the query and does not answer it. Write in the language {language!r}.",
        },
    ]


def read_triplet(answer: str) -> Triplet:
    """The triplet in an answer; raises UnusableAnswer with the reason if there is none."""
    pieces = _PARTS.split(answer)
    named = zip(pieces[1::2], pieces[2::2], strict=True)
    parts = {name.lower(): " ".join(text.split()).strip("\"'“”*` ") for name, text in named}
    missing = [name for name in ("query", "answer", "distractor") if not parts.get(name)]
    if missing:
        raise UnusableAnswer("the answer is a refusal" if is_refusal(answer) else f"has no {missing[0]}")
    triplet = Triplet(parts["query"], parts["answer"], parts["distractor"])
    if min(count_words(triplet.positive), count_words(triplet.negative)) < _FEWEST_WORDS:
        raise UnusableAnswer(f"a text has fewer than {_FEWEST_WORDS} words")
    texts = {text.casefold() for text in (triplet.query, triplet.positive, triplet.negative)}
    if len(texts) < 3:
        raise UnusableAnswer("two parts are the same")
    return triplet

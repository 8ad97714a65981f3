"""Prompts for the LLM that writes queries, and parsing its answers.

Covers the messages (three worked examples in three languages; method of arXiv 2502.18460, section 3.2), the reasons to
set an answer aside, and the form of answers, for writers that can be held to one. Any change of wording needs a new
PROMPT_VERSION; where an LLM's chat template puts the messages is no part of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from drama_dist.corpus.parts import as_unicode

PROMPT_VERSION = "write-query-1"

Message = dict[str, str]


@dataclass(frozen=True)
class Form:
    """The parts of an answer, texts, which prompts ask for as "Part: text", one after the other."""

    name: str
    parts: tuple[str, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of an object that has the parts."""
        properties = {part: {"type": "string"} for part in self.parts}
        return {"type": "object", "properties": properties, "required": [*self.parts], "additionalProperties": False}

    def as_asked(self, answer: str) -> str:
        """An answer that fits the schema, as prompts ask for it; any other as it is."""
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return answer
        if not isinstance(value, dict) or not all(isinstance(value.get(part), str) for part in self.parts):
            return answer
        # A part on one line: else it could begin another one.
        return "\n".join(f"{part.capitalize()}: {' '.join(as_unicode(value[part]).split())}" for part in self.parts)


FORM = Form("query", ("task", "query"))

_INSTRUCTION = (
    "You read a passage, think of a search task that it could serve, and write one query that somebody with this "
    "task would type. Answer with two lines: 'Task:' in English, and 'Query:' in the language of the passage. "
    "The query is short and does not copy a sentence of the passage."
)
_WORKED_EXAMPLES = (
    (
        "Sourdough rises because wild yeast and bacteria in the starter ferment the flour. A starter that is kept "
        "in the refrigerator should be fed once a week; at room temperature, every day.",
        "Find advice on keeping a bread starter alive.",
        "how often to feed sourdough starter",
    ),
    (
        "El puente de Vizcaya, inaugurado en 1893, cruza la ría del Nervión con una barquilla que cuelga de cables "
        "de acero. Fue el primer puente transbordador del mundo.",
        "Find facts about the history of bridges.",
        "primer puente colgante con barquilla del mundo",
    ),
    (
        "Die Bremsflüssigkeit nimmt mit der Zeit Wasser auf, wodurch ihr Siedepunkt sinkt. Werkstätten empfehlen, "
        "sie alle zwei Jahre zu wechseln.",
        "Answer questions of car owners about maintenance.",
        "Warum muss man Bremsflüssigkeit wechseln?",
    ),
)
_QUERY_LINE = re.compile(r"^\W*Query\W*:\s*(.+)$", re.MULTILINE | re.IGNORECASE)
_REFUSAL = re.compile(r"\b(I cannot|I can't|I'm sorry|as an AI|not able to)\b", re.IGNORECASE)
_MAX_CHARACTERS = 300


class UnusableAnswer(ValueError):
    """An answer without a usable query; the message is the reason."""


def write_query_messages(passage: str) -> list[Message]:
    """The conversation that asks for a query; only its last message depends on the passage."""
    messages = [{"role": "system", "content": _INSTRUCTION}]
    for text, task, query in _WORKED_EXAMPLES:
        messages.append(_passage_message(text))
        messages.append({"role": "assistant", "content": f"Task: {task}\nQuery: {query}"})
    return [*messages, _passage_message(passage)]


def without_system(messages: list[Message]) -> list[Message]:
    """The conversation for an LLM that has no system role: the instruction opens the first message of the user."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *others]


def read_query(answer: str, passage: str) -> str:
    """The query in an answer; raises UnusableAnswer with the reason if there is none."""
    match = _QUERY_LINE.search(answer)
    if not match:
        raise UnusableAnswer("no line that begins with 'Query:'")
    query = " ".join(match[1].split()).strip("\"'“”*` ")
    if not re.search(r"\w\w", query):
        raise UnusableAnswer("the query has no words")
    if len(query) > _MAX_CHARACTERS:
        raise UnusableAnswer(f"the query has more than {_MAX_CHARACTERS} characters")
    if is_refusal(query):
        raise UnusableAnswer("the answer is a refusal")
    if query.casefold() in {example.casefold() for _, _, example in _WORKED_EXAMPLES}:
        raise UnusableAnswer("repeats a worked example of the prompt")
    if query.casefold() == " ".join(passage.split()).casefold():
        raise UnusableAnswer("repeats the whole passage")
    return query


def is_refusal(answer: str) -> bool:
    """Whether an LLM says that it will not."""
    return bool(_REFUSAL.search(answer))


def unfinished_answer(answer: str) -> Message | None:
    """The message to continue from if an answer names a task but no query; otherwise None."""
    task = re.match(r"\s*(Task\s*:.*\S)", answer)
    if _QUERY_LINE.search(answer) or not task:
        return None
    return {"role": "assistant", "content": f"{task[1]}\nQuery:"}


def _passage_message(text: str) -> Message:
    return {"role": "user", "content": f"Passage: {text}"}

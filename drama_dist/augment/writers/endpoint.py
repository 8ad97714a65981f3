"""A writer behind an OpenAI-compatible endpoint of chat completions.

Covers several requests at a time. What was answered before an endpoint failed for good is in kept_answers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from drama_dist.augment.sources.prompts import Message, write_query_messages
from drama_dist.augment.writers.kept_answers import Answer, KeptAnswers
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.distributed import ranks
from drama_dist.encoder.endpoint import Endpoint, GarbledAnswer, in_flight
from drama_dist.run.progress import say

if TYPE_CHECKING:
    from openai import OpenAI


class EndpointWriter(Writer):
    """name: URL#MODEL. requests: that are sent before the first is answered. kept: the folder of answers."""

    def __init__(self, name: str, requests: int, kept: Path):
        self.name, self._requests, self._endpoint = name, requests, Endpoint(name)
        self._kept, self._counting = KeptAnswers(kept), Lock()
        self._asked = self._known = self._read = self._written = 0

    def check(self, sampling: Sampling) -> None:
        """Ask for one token. Raises as `Endpoint.ask` does."""
        self._endpoint.check(
            *self._request(write_query_messages("Bread is baked."), replace(sampling, max_new_tokens=1))
        )

    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        # Endpoints begin a new message after an assistant's.
        if conversations[0][-1]["role"] == "assistant":
            return [""] * len(conversations)

        def ask(messages: list[Message]) -> str:
            drawn = asdict(sampling) | {"seed": sampling.seed_for(messages)}
            if sampling.form is None:
                del drawn["form"]  # so that answers that were kept before there were forms are found
            asked = {"model": self._endpoint.model, "messages": messages, **drawn}
            known = self._kept.find(asked)
            answer: Answer = known or self._endpoint.ask(*self._request(messages, sampling))
            if known is None and answer.text.strip():
                self._kept.keep(asked, answer)
            with self._counting:
                self._asked += 1
                self._known += known is not None
                self._read += answer.tokens_read if known is None else 0
                self._written += answer.tokens_written if known is None else 0
            if known is None and self.on_tokens:
                self.on_tokens(answer.tokens_written)
            return sampling.form.as_asked(answer.text) if sampling.form else answer.text

        return in_flight(ask, conversations, self._requests)

    def tell_cost(self) -> None:
        if self._asked:
            rank = "" if ranks.world_size() == 1 else "rank 0: "
            tokens = f"{self._read:,} tokens read, {self._written:,} written"
            say(f"{self.name}: {rank}{self._asked:,} answers, {self._known:,} of them kept from before; {tokens}")

    def _request(self, messages: list[Message], sampling: Sampling) -> tuple[Any, Any]:
        held: dict[str, Any] = {}
        if form := sampling.form:
            schema = {"name": form.name, "schema": form.schema, "strict": True}
            held = {"response_format": {"type": "json_schema", "json_schema": schema}}

        def call(client: OpenAI) -> object:
            return client.chat.completions.create(
                model=self._endpoint.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=sampling.seed_for(messages),
                **held,
            )

        return call, _answer


def _answer(answer: object) -> Answer:
    """The message; empty where there is none, which prompts.py finds unusable."""
    try:
        content = answer.choices[0].message.content  # type: ignore[attr-defined]
    except (AttributeError, IndexError, TypeError) as error:
        raise GarbledAnswer(f"expected a message, found {str(answer)[:100]!r}") from error
    if content is not None and not isinstance(content, str):
        raise GarbledAnswer(f"expected a message of text, found {str(content)[:100]!r}")
    usage = getattr(answer, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(content or "", *(count if isinstance(count, int) else 0 for count in counts))

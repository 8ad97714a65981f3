"""A writer behind an OpenAI-compatible endpoint of chat completions.

Covers several requests at a time. What was answered before an endpoint failed for good is in the stage's parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drama_dist.augment.sources.prompts import Message, write_query_messages
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.encoder.endpoint import Endpoint, GarbledAnswer, in_flight

if TYPE_CHECKING:
    from openai import OpenAI


class EndpointWriter(Writer):
    """name: URL#MODEL. requests: that are sent before the first is answered."""

    def __init__(self, name: str, requests: int):
        self.name, self._requests, self._endpoint = name, requests, Endpoint(name)

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
            text: str = self._endpoint.ask(*self._request(messages, sampling))
            return text

        return in_flight(ask, conversations, self._requests)

    def _request(self, messages: list[Message], sampling: Sampling) -> tuple[Any, Any]:
        def call(client: OpenAI) -> object:
            return client.chat.completions.create(
                model=self._endpoint.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=sampling.seed,
            )

        return call, _text


def _text(answer: object) -> str:
    """The message; empty where there is none, which prompts.py finds unusable."""
    try:
        content = answer.choices[0].message.content  # type: ignore[attr-defined]
    except (AttributeError, IndexError, TypeError) as error:
        raise GarbledAnswer(f"expected a message, found {str(answer)[:100]!r}") from error
    if content is not None and not isinstance(content, str):
        raise GarbledAnswer(f"expected a message of text, found {str(content)[:100]!r}")
    return content or ""

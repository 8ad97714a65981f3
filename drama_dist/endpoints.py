"""OpenAI-compatible endpoints: what they are called, how they are asked, and what is tried again.

Covers any server that answers as the package openai expects: teachers ask for embeddings, writers for chat completions.
Does not cover what is asked. The key is read from the environment's OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from openai import OpenAI

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Value = TypeVar("Value")

_KEY = "OPENAI_API_KEY"
_TIMEOUT = 300  # seconds for an answer
# The client waits .5 s before it tries again, twice as long each time up to 8 s, or as long as the server asks for: a
# server that starts again has a minute and a half.
_RETRIES = 14
_GARBLED = 3  # answers to a request that are not what was asked for
_LONGEST = 240


def is_endpoint(name: str) -> bool:
    """Whether a model's name is an endpoint's, URL#MODEL; the part after # may be missing."""
    return name.startswith(("http://", "https://"))


class GarbledAnswer(ValueError):
    """An answer of another form than asked for."""


class Endpoint:
    """name: URL#MODEL, as https://api.openai.com/v1#text-embedding-3-small. Several threads may ask."""

    def __init__(self, name: str):
        self.name = name
        self._url, _, self.model = name.partition("#")

    def check(self, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> None:
        """As `ask`, but soon: for a first request."""
        self._ask(self._client.with_options(max_retries=1, timeout=30), call, read)

    def ask(self, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> Value:
        """What `read` makes of the answer to `call`, which is tried again where the failure may pass.

        read: raises GarbledAnswer. Raises ValueError where the endpoint refuses or answers something else, or the
        package openai is not installed; ConnectionError where it does not answer.
        """
        return self._ask(self._client, call, read)

    def _ask(self, client: OpenAI, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> Value:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError

        problem = ""
        for _ in range(_GARBLED):
            try:
                return read(call(client))
            except APIConnectionError as error:
                cause = _first_line(error.__cause__ or error)
                raise ConnectionError(
                    f"{self.name}: no answer ({cause}); start the server or correct the URL, then run again: what is "
                    "finished is kept"
                ) from error
            except APIStatusError as error:
                hint = f"; set {_KEY} in the environment" if error.status_code in (401, 403) else ""
                raise ValueError(f"{self.name}: {_first_line(error)}{hint}") from error
            except (APIResponseValidationError, json.JSONDecodeError, GarbledAnswer) as error:
                problem = _first_line(error)
        raise ValueError(f"{self.name}: {_GARBLED} answers of another form than asked for ({problem})")

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{self.name}: an endpoint needs the package openai: pip install 'drama-dist[endpoint]'"
            ) from error
        # Servers of one's own want no key, the client does.
        key = os.environ.get(_KEY) or "none"
        return OpenAI(base_url=self._url, api_key=key, timeout=_TIMEOUT, max_retries=_RETRIES)


def in_flight(work: Callable[[Item], Value], items: Sequence[Item], requests: int) -> Iterator[Value]:
    """`work` of each item, in order, by as many threads; after the first failure nothing more is begun."""
    with ThreadPoolExecutor(requests) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line[:_LONGEST] if " " in line else f"{type(error).__name__} {line}".strip()

"""OpenAI-compatible endpoints: how they are asked, and what is tried again.

Covers any server that answers as the package openai expects: teachers ask for embeddings, writers for chat completions.
Does not cover what is asked. The key of a host is in the environment's DRAMA_KEY_HOST, with the host's name in capitals
and _ for what is no letter or digit (DRAMA_KEY_API_EXAMPLE_COM); without that it is OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import urlsplit

from drama_dist.encoder.failures import reason

if TYPE_CHECKING:
    from openai import OpenAI

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Value = TypeVar("Value")

_KEY = "OPENAI_API_KEY"
_TIMEOUT, _CONNECT_TIMEOUT = 120, 10  # seconds for an answer, some of which a server may take to load its model
# The client waits .5 s before it tries again, twice as long each time up to 8 s, or as long as the server asks for: a
# server that starts again has a minute and a half.
_RETRIES = 14
_GARBLED = 3  # answers to a request that are not what was asked for
_KEPT = "run again later: what is finished is kept"


class GarbledAnswer(ValueError):
    """An answer of another form than asked for."""


class Endpoint:
    """name: URL#MODEL, as https://api.openai.com/v1#text-embedding-3-small. Several threads may ask."""

    def __init__(self, name: str):
        self.name = name
        self._url, _, self.model = name.partition("#")

    def check(self, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> None:
        """As `ask`, for a first request, with a single further try."""
        self._ask(self._client.with_options(max_retries=1), call, read)

    def ask(self, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> Value:
        """What `read` makes of the answer to `call`, which is tried again where the failure may pass.

        read: raises GarbledAnswer. Raises ValueError where the endpoint refuses or answers something else, or the
        package openai is not installed; ConnectionError where it does not answer, or fails each time.
        """
        return self._ask(self._client, call, read)

    def _ask(self, client: OpenAI, call: Callable[[OpenAI], Answer], read: Callable[[Answer], Value]) -> Value:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError, APITimeoutError

        problem = ""
        for _ in range(_GARBLED):
            try:
                return read(call(client))
            except APIConnectionError as error:
                cause = reason(error.__cause__ or error)
                if isinstance(error, APITimeoutError) and not isinstance(error.__cause__, _connect_timeout()):
                    tries = client.max_retries + 1
                    raise ConnectionError(f"{self.name}: {tries} times no answer in {_TIMEOUT} s; {_KEPT}") from error
                raise ConnectionError(
                    f"{self.name}: no answer ({cause}); start the server or correct the URL, and run again: what is "
                    "finished is kept"
                ) from error
            except APIStatusError as error:
                if error.status_code == 429 or error.status_code >= 500:
                    raise ConnectionError(f"{self.name}: {reason(error)}; {_KEPT}") from error
                hint = f"; set {_KEY} or {self._key_name} in the environment" if error.status_code in (401, 403) else ""
                raise ValueError(f"{self.name}: {reason(error)}{hint}") from error
            except (APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError, GarbledAnswer) as error:
                problem = reason(error)
        raise ValueError(f"{self.name}: {_GARBLED} answers of another form than asked for ({problem})")

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI, Timeout
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{self.name}: an endpoint needs the package openai: pip install 'drama-dist[endpoint]'"
            ) from error
        timeout = Timeout(_TIMEOUT, connect=_CONNECT_TIMEOUT)
        return OpenAI(base_url=self._url, api_key=self._key, timeout=timeout, max_retries=_RETRIES)

    @property
    def _key_name(self) -> str:
        return f"DRAMA_KEY_{re.sub('[^A-Z0-9]', '_', (urlsplit(self._url).hostname or '').upper())}"

    @property
    def _key(self) -> str:
        for name in (self._key_name, _KEY):
            if key := os.environ.get(name, "").strip():
                if not key.isascii() or not key.isprintable():
                    raise ValueError(f"{self.name}: {name} in the environment is not a key: keys are printable ASCII")
                return key
        return "none"  # servers of one's own want no key, the client does


def in_flight(
    work: Callable[[Item], Value], items: Sequence[Item], requests: int, done: Callable[[Value], object] | None = None
) -> list[Value]:
    """`work` of each item, by as many threads; the first failure is raised at once, and nothing more is begun.

    done: told each result when it is there, in any order.
    """
    failed = Event()

    def unless_failed(item: Item) -> Value | None:
        if failed.is_set():
            return None  # which nobody reads
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    pool = ThreadPoolExecutor(requests)  # not as a context, which would wait for requests that are on their way
    try:
        futures = [pool.submit(unless_failed, item) for item in items]
        for future in as_completed(futures):
            value = future.result()
            if done is not None and not failed.is_set():
                done(cast(Value, value))
        return [cast(Value, future.result()) for future in futures]
    finally:
        failed.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _connect_timeout() -> tuple[type[BaseException], ...]:
    """Of the HTTP library that openai uses, whichever that is."""
    import openai

    module = sys.modules[openai.Timeout.__module__.partition(".")[0]]
    return (module.ConnectTimeout,) if hasattr(module, "ConnectTimeout") else ()

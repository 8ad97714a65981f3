"""A teacher behind an OpenAI-compatible endpoint of embeddings: POST URL/embeddings, any server that answers to that.

Covers how texts are sent, several requests at a time, and what is tried again. What was encoded before an endpoint
failed for good is in the shards of the stage. Shapes: N texts, K components.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from drama_dist.encoder.failures import reason
from drama_dist.encoder.pooling import unit_rows
from drama_dist.run.progress import Progress
from drama_dist.search.teacher import Kind, Teacher
from drama_dist.settings import TeacherSettings, endpoint_of

if TYPE_CHECKING:
    from openai import OpenAI

_KEY = "OPENAI_API_KEY"
_BATCH = 32  # texts of a request
_TIMEOUT = 120  # seconds for an answer
# The client waits .5 s before it tries again, twice as long each time up to 8 s, or as long as the server asks for: a
# server that starts again has a minute and a half.
_RETRIES = 14
_GARBLED = 3  # answers to a request that are not what was asked for


class EndpointTeacher(Teacher):
    """name: URL#MODEL. Texts are sent as they are, after the settings' prefixes: the server alone knows its limit of
    tokens, so that what it cuts is not counted.
    """

    def __init__(self, settings: TeacherSettings, name: str):
        super().__init__(settings)
        self.name = name
        self._url, self._model = endpoint_of(name)

    def check(self) -> None:
        """Ask for the vector of one word.

        Raises ModuleNotFoundError without the package openai, ValueError where the endpoint refuses, ConnectionError
        where it does not answer.
        """
        self._vectors(self._client.with_options(max_retries=1, timeout=20), ["word"])

    def encode(self, texts: list[str], kind: Kind, progress: Progress | None = None) -> np.ndarray:
        prefix = self.settings.query_prefix if kind == "query" else self.settings.passage_prefix
        # Endpoints refuse empty texts, and a batch for one of them.
        full = [prefix + text or " " for text in texts]
        batches = [full[begin : begin + _BATCH] for begin in range(0, len(full), _BATCH)]
        parts = []
        with ThreadPoolExecutor(self.settings.requests) as pool:
            try:
                for part_nK in pool.map(lambda batch: self._vectors(self._client, batch), batches):
                    parts.append(part_nK)
                    if progress is not None:
                        progress(len(part_nK))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.name}: an endpoint needs the package openai: pip install 'drama-dist[endpoint]'"
            ) from error
        # Servers of one's own want no key, the client does.
        key = os.environ.get(_KEY) or "none"
        return OpenAI(base_url=self._url, api_key=key, timeout=_TIMEOUT, max_retries=_RETRIES)

    def _vectors(self, client: OpenAI, texts: Sequence[str]) -> np.ndarray:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError

        garbled = ""
        for _ in range(_GARBLED):
            try:
                answer = client.embeddings.create(input=list(texts), model=self._model, encoding_format="float")
                return _rows(answer, len(texts))
            except APIConnectionError as error:
                raise ConnectionError(
                    f"{self.name}: no answer ({reason(error.__cause__ or error)}); start the server or correct the "
                    "URL, then run again: what is encoded is kept"
                ) from error
            except APIStatusError as error:
                hint = f"; set {_KEY} in the environment" if error.status_code in (401, 403) else ""
                raise ValueError(f"{self.name}: {reason(error)}{hint}") from error
            except (APIResponseValidationError, json.JSONDecodeError, _GarbledAnswer) as error:
                garbled = reason(error)
        raise ValueError(f"{self.name}: {_GARBLED} answers that are no vectors of {len(texts)} texts ({garbled})")


class _GarbledAnswer(ValueError):
    """An answer of another form than asked for."""


def _rows(answer: object, count: int) -> np.ndarray:
    """Unit vectors in the order of the texts."""
    data = getattr(answer, "data", None)
    if not isinstance(data, list) or len(data) != count:
        raise _GarbledAnswer(f"expected {count} vectors, found {str(answer)[:100]!r}")
    try:
        rows_nK = np.array([item.embedding for item in sorted(data, key=lambda item: item.index)], dtype=np.float32)
    except (AttributeError, TypeError, ValueError) as error:
        raise _GarbledAnswer(f"expected rows of numbers ({reason(error)})") from error
    if rows_nK.ndim != 2 or not np.isfinite(rows_nK).all() or not rows_nK.any(1).all():
        raise _GarbledAnswer("expected finite vectors of equal size, none of them zero")
    return unit_rows(rows_nK)

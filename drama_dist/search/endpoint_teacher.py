"""A teacher behind an OpenAI-compatible endpoint of embeddings.

Covers how texts are sent, several requests at a time. What was encoded before an endpoint failed for good is in the
shards of the stage. Shapes: N texts, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from drama_dist.encoder.pooling import unit_rows
from drama_dist.endpoints import Endpoint, GarbledAnswer, in_flight
from drama_dist.run.progress import Progress
from drama_dist.search.teacher import Kind, Teacher
from drama_dist.settings import TeacherSettings

if TYPE_CHECKING:
    from openai import OpenAI

_BATCH = 32  # texts of a request


class EndpointTeacher(Teacher):
    """name: URL#MODEL. Texts are sent whole, after the settings' prefixes: the server alone knows its limit of tokens,
    so that what it cuts is not counted.
    """

    def __init__(self, settings: TeacherSettings, name: str):
        super().__init__(settings)
        self._endpoint = Endpoint(name)

    def check(self) -> None:
        """Ask for the vector of one word. Raises as `Endpoint.ask` does."""
        self._endpoint.check(*self._request(["word"]))

    def encode(self, texts: list[str], kind: Kind, progress: Progress | None = None) -> np.ndarray:
        prefix = self.settings.query_prefix if kind == "query" else self.settings.passage_prefix
        # Endpoints refuse empty texts, and a whole batch for one of them.
        full = [prefix + text or " " for text in texts]
        batches = [full[begin : begin + _BATCH] for begin in range(0, len(full), _BATCH)]
        parts = []
        for part_nK in in_flight(
            lambda batch: self._endpoint.ask(*self._request(batch)), batches, self.settings.requests
        ):
            parts.append(part_nK)
            if progress is not None:
                progress(len(part_nK))
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def _request(self, texts: Sequence[str]) -> tuple[Any, Any]:
        def call(client: OpenAI) -> object:
            # Not every server has base64, which the client asks for by default.
            return client.embeddings.create(input=list(texts), model=self._endpoint.model, encoding_format="float")

        return call, lambda answer: _rows(answer, len(texts))


def _rows(answer: object, count: int) -> np.ndarray:
    """Unit vectors in the order of the texts."""
    data = getattr(answer, "data", None)
    if not isinstance(data, list) or len(data) != count:
        raise GarbledAnswer(f"expected {count} vectors, found {str(answer)[:100]!r}")
    try:
        rows_nK = np.array([item.embedding for item in sorted(data, key=lambda item: item.index)], dtype=np.float32)
    except (AttributeError, TypeError, ValueError) as error:
        raise GarbledAnswer(f"expected rows of numbers: {error}") from error
    if rows_nK.ndim != 2 or not np.isfinite(rows_nK).all() or not rows_nK.any(1).all():
        raise GarbledAnswer("expected finite vectors of equal size, none of them zero")
    return unit_rows(rows_nK)

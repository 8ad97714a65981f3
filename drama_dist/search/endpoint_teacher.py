"""A teacher behind an OpenAI-compatible endpoint of embeddings.

Covers how texts are sent, several requests at a time. What was encoded before an endpoint failed for good is in the
shards of the stage. Shapes: N texts, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from drama_dist.corpus.split import about_tokens
from drama_dist.encoder.endpoint import Endpoint, GarbledAnswer, in_flight
from drama_dist.encoder.pooling import unit_rows
from drama_dist.run.progress import Progress
from drama_dist.search.teacher import Kind, Teacher
from drama_dist.settings import TeacherSettings

if TYPE_CHECKING:
    from openai import OpenAI

_BATCH = 32  # texts of a request


class EndpointTeacher(Teacher):
    """name: URL#MODEL. Texts get the settings' prefixes. They are cut at about `max_tokens`, which is not counted: the
    server alone knows its tokens.
    """

    def __init__(self, settings: TeacherSettings, name: str):
        super().__init__(settings)
        self._endpoint = Endpoint(name)

    def check(self) -> None:
        """Ask for the vectors of two words, as queries and as passages where that differs. Raises as `Endpoint.ask`."""
        kinds: list[Kind] = ["query", "passage"]
        differ = self.settings.query_input_type != self.settings.passage_input_type
        for kind in kinds if differ else kinds[:1]:
            self._endpoint.check(*self._request(["bread", "river"], kind))

    def encode(self, texts: list[str], kind: Kind, progress: Progress | None = None) -> np.ndarray:
        prefix = self.settings.query_prefix if kind == "query" else self.settings.passage_prefix
        # Endpoints refuse empty texts, and a whole batch for one of them.
        sent = [prefix + about_tokens(text, self.settings.max_tokens) or " " for text in texts]
        batches = [sent[begin : begin + _BATCH] for begin in range(0, len(sent), _BATCH)]
        told = None if progress is None else lambda part_nK: progress(len(part_nK))

        def ask(batch: list[str]) -> np.ndarray:
            return self._endpoint.ask(*self._request(batch, kind))

        parts = in_flight(ask, batches, self.settings.requests, told)
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def _request(self, texts: Sequence[str], kind: Kind) -> tuple[Any, Any]:
        settings, model = self.settings, self._endpoint.model
        input_type = settings.query_input_type if kind == "query" else settings.passage_input_type
        more = {"input_type": input_type} if input_type else None

        def call(client: OpenAI) -> object:
            # Not every server has base64, which the client asks for by default.
            return client.embeddings.create(input=list(texts), model=model, encoding_format="float", extra_body=more)

        return call, lambda answer: _rows(answer, len(texts))


def _rows(answer: object, count: int) -> np.ndarray:
    """Unit vectors in the order of the texts."""
    data = getattr(answer, "data", None)
    if not isinstance(data, list) or len(data) != count:
        raise GarbledAnswer(f"expected {count} vectors, found {str(answer)[:100]!r}")
    try:
        indices = [item.index for item in data]
        numbered = sorted(indices) == list(range(count)) if None not in indices else False
        if not numbered and len(set(indices)) > 1:
            raise GarbledAnswer(f"expected vectors 0 to {count - 1}, found {str(indices)[:60]}")
        # Some servers number nothing, or all alike, and answer in order.
        embeddings = [item.embedding for item in (sorted(data, key=lambda item: item.index) if numbered else data)]
        rows_nK = np.array(embeddings, dtype=np.float32)
    except GarbledAnswer:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise GarbledAnswer(f"expected rows of numbers: {error}") from error
    if rows_nK.ndim != 2 or not np.isfinite(rows_nK).all() or not rows_nK.any(1).all():
        raise GarbledAnswer("expected finite vectors of equal size, none of them zero")
    return unit_rows(rows_nK)

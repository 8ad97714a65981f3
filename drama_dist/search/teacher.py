"""The teacher: a strong retriever from sentence-transformers, as a text encoder.

Covers loading it, its prompts, and batches of a token budget. Does not cover fusing its ranking with BM25: fusion.py
does. Shapes: N texts, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from drama_dist.distributed import ranks
from drama_dist.distributed.precision import dtype_of
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.encoder.sources import resolve
from drama_dist.run.progress import Progress
from drama_dist.settings import TeacherSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_PASSAGE_PROMPTS = ("document", "passage", "corpus")


class Teacher:
    """A sentence-transformers model that encodes texts to unit vectors; loaded on first use.

    Texts get the model's query and document prompts, if it has them, and are truncated to `max_tokens` or the model's
    limit, whichever is smaller.
    """

    def __init__(self, settings: TeacherSettings, trust_remote_code: bool = False):
        self.settings = settings
        self.trust_remote_code = trust_remote_code

    @cached_property
    def model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(
            resolve(self.settings.model),
            device=str(ranks.device()),
            trust_remote_code=self.trust_remote_code,
            model_kwargs={"dtype": dtype_of(self.settings.dtype), "use_safetensors": True},
        )
        model.max_seq_length = min(self.settings.max_tokens, model.max_seq_length or self.settings.max_tokens)
        return model.eval()

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 (N, dim); dim None is the model's size.

        Raises ValueError if dim is larger than that.
        """
        return self._encode(texts, dim, self.model.encode_query, ("query",))

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Unit vectors of passages, float32 (N, dim); dim None is the model's size.

        progress: called with the number of texts of each encoded batch.
        Raises ValueError if dim is larger than that.
        """
        return self._encode(texts, dim, self.model.encode_document, _PASSAGE_PROMPTS, progress)

    def _encode(
        self,
        texts: Sequence[str],
        dim: int | None,
        encode: Callable[..., Any],
        prompts: Sequence[str],
        progress: Progress | None = None,
    ) -> np.ndarray:
        size = self.model.get_embedding_dimension() or 0
        if not texts:
            return np.zeros((0, dim or size), dtype=np.float32)
        prompt = next((self.model.prompts[name] for name in prompts if self.model.prompts.get(name)), "")
        vectors_NK: np.ndarray | None = None
        for batch in padded_batches(self._lengths([prompt + text for text in texts]), self.settings.batch_tokens):
            vectors = encode([texts[position] for position in batch], batch_size=len(batch), show_progress_bar=False)
            if vectors_NK is None:
                vectors_NK = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
            vectors_NK[batch] = vectors
            if progress is not None:
                progress(len(batch))
        assert vectors_NK is not None
        return matryoshka_cut_array(vectors_NK, dim or vectors_NK.shape[1])

    def _lengths(self, texts: list[str]) -> list[int]:
        """Token counts after truncation."""
        encoded = self.model.tokenizer(
            texts, truncation=True, max_length=self.model.max_seq_length, padding=False, return_attention_mask=False
        )
        return [len(ids) for ids in encoded["input_ids"]]


def padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide texts into batches of at most `budget` tokens, padding included, longest texts first.

    Returns positions in `lengths`; a text longer than the budget gets its own batch.
    """
    batches: list[list[int]] = []
    room = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room == 0:
            batches.append([])
            room = max(1, budget // max(1, lengths[position]))
        batches[-1].append(position)
        room -= 1
    return batches

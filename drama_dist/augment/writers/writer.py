"""Writers: LLMs that answer conversations, wherever they run.

Covers what they have in common. local.py has those of transformers in this process, endpoint.py those behind an
OpenAI-compatible server. Prompts, and how answers are parsed, are in sources/prompts.py.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drama_dist.augment.sources.prompts import Form, Message
from drama_dist.corpus.split import about_tokens


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature: 0 is the likeliest token each time. form: that no answer may lack a part of, where the writer can see
    to that.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    form: Form | None = None

    def seed_for(self, asked: Any) -> int:
        """A seed of 31 bits of what is asked, any JSON: with one for all, answers to similar prompts would be alike."""
        return int.from_bytes(hashlib.sha256(json.dumps([self.seed, asked]).encode()).digest()[:4]) >> 1


class Writer(ABC):
    """An instruction-tuned LLM, loaded on first use.

    name: as in the settings, and in every example's provenance. on_tokens: told how many tokens were written, as they
    come.
    """

    name: str
    on_tokens: Callable[[int], object] | None = None

    @abstractmethod
    def check(self, sampling: Sampling) -> None:
        """Check everything but the values of the weights; raises ValueError or OSError where it cannot write."""

    @abstractmethod
    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        """One answer per conversation.

        If a conversation ends with an assistant message, the answer continues it; only the new text is returned, which
        is empty where the LLM cannot leave a message open. Raises ValueError or OSError where it cannot be asked.
        """

    def next_token_scores(self, conversations: Sequence[list[Message]], tokens: Sequence[str]) -> np.ndarray | None:
        """Scores by which the LLM would draw each of these tokens next, float32 (conversations, tokens).

        Conversations end with an assistant message, which is continued. None where the LLM does not tell.
        """
        return None

    def tell_cost(self) -> None:
        """Say what this process has used so far, where somebody may pay for it."""
        return None

    def cut(self, text: str, tokens: int) -> str:
        """About the first `tokens` tokens of a text."""
        return about_tokens(text, tokens)

"""The writer: an LLM in this process that answers batches of conversations.

Covers batched, seeded sampling. Prompts, and how answers are parsed, are in prompts.py.
Shapes: B conversations, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from drama_dist.augment.sources.prompts import Message
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_of
from drama_dist.encoder.sources import resolve
from drama_dist.settings import AugmentSettings


class LanguageModel:
    """An instruction-tuned LLM, loaded on first use, in the precision that suits the device.

    Answers are a function of the batch of conversations, the seed and the settings.
    """

    def __init__(self, name: str, settings: AugmentSettings, trust_remote_code: bool = False):
        self.name, self.settings, self.trust_remote_code = name, settings, trust_remote_code

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(resolve(self.name), trust_remote_code=self.trust_remote_code)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name}: has no chat template, so it cannot write queries; name an instruction-tuned LLM in "
                "augment.writer, or set augment.synthetic_queries=0"
            )
        return tokenizer

    @cached_property
    def model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(self.name),
            dtype=dtype_of(AUTO),
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
        )
        return model.to(ranks.device()).eval()

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text."""
        ids = self.tokenizer(text, truncation=True, max_length=tokens, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(ids))

    @torch.no_grad()
    def answer(self, conversations: Sequence[list[Message]], seed: int) -> list[str]:
        """One sampled answer per conversation; their common prefix is computed once.

        If a conversation ends with an assistant message, the answer continues it; only the new text is returned.
        Raises ValueError if the LLM has no chat template.
        """
        ids = [self._token_ids(messages) for messages in conversations]
        shared = _common_prefix(ids)
        tokens_BT, mask_BT = self._pad_between(ids, shared)
        cache = self.model(tokens_BT[:1, :shared], use_cache=True).past_key_values if shared else None
        if cache is not None:
            cache.batch_repeat_interleave(len(ids))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            answers = self.model.generate(
                tokens_BT,
                attention_mask=mask_BT,
                past_key_values=cache,
                do_sample=True,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_new_tokens=self.settings.max_new_tokens,
                pad_token_id=self._pad,
            )
        return self.tokenizer.batch_decode(answers[:, tokens_BT.shape[1] :], skip_special_tokens=True)

    def _token_ids(self, messages: list[Message]) -> list[int]:
        unfinished = messages[-1]["role"] == "assistant"
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=not unfinished, continue_final_message=unfinished, return_dict=True
        )["input_ids"]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _pad_between(self, ids: list[list[int]], shared: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, B × T, padded after the shared prefix so that all rows end together."""
        longest = max(map(len, ids))
        tokens_BT = torch.full((len(ids), longest), self._pad)
        mask_BT = torch.ones_like(tokens_BT)
        for row, tokens in enumerate(ids):
            begin = longest - len(tokens) + shared
            tokens_BT[row, :shared] = torch.tensor(tokens[:shared])
            tokens_BT[row, begin:] = torch.tensor(tokens[shared:])
            mask_BT[row, shared:begin] = 0
        return tokens_BT.to(self.model.device), mask_BT.to(self.model.device)


def _common_prefix(ids: list[list[int]]) -> int:
    """Length of the lists' common prefix, leaving at least one token of each."""
    shortest = min(map(len, ids)) - 1
    differing = (index for index in range(shortest) if len({tokens[index] for tokens in ids}) > 1)
    return next(differing, shortest)

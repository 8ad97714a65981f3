"""A writer that transformers runs in this process, on a GPU where there is one.

Covers batched, seeded sampling.
Shapes: B conversations, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.generation import BaseStreamer

from drama_dist.augment.sources.prompts import Message, without_system, write_query_messages
from drama_dist.augment.writers.decoding import can_decode, decode
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_of
from drama_dist.encoder.failures import told_as
from drama_dist.encoder.pretrained import (
    check_weights,
    is_own_code,
    load_weights,
    read_config,
    read_tokenizer,
    vocabulary_size,
)
from drama_dist.encoder.sources import reachable, resolve


class LocalWriter(Writer):
    """name: a folder or a hub name; its precision is what suits the device.

    Answers are a function of the batch of conversations and the sampling. One thread at a time may ask.
    """

    def __init__(self, name: str, trust_remote_code: bool = False):
        self.name, self.trust_remote_code = name, trust_remote_code

    def check(self, sampling: Sampling) -> None:
        # The chat template is tried on conversations like those to come.
        messages = write_query_messages("Bread is baked.")
        ids = self._token_ids(messages)
        for position, message in reversed(list(enumerate(messages))):
            changed = [*messages[:position], message | {"content": "Rivers flow."}, *messages[position + 1 :]]
            if self._token_ids(changed) == ids:
                raise ValueError(
                    f"{self.name}: its chat template leaves out what the {message['role']} says; use another LLM"
                )
        self._pad  # noqa: B018
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self._config), None)
        if Path(self._source).is_dir() and isinstance(kind, type) and not self._is_own_code(self._config):
            check_weights(kind, Path(self._source), self._config)

    @cached_property
    def _source(self) -> str:
        return reachable(resolve(self.name), also=("generation_config.json",))

    @cached_property
    def _config(self) -> PreTrainedConfig:
        config = read_config(self._source, self.trust_remote_code)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not self._is_own_code(config):
            raise ValueError(f"{self.name}: model type {config.model_type!r}, which writes no text")
        return config

    def _is_own_code(self, config: PreTrainedConfig) -> bool:
        return is_own_code("AutoModelForCausalLM", config, self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = read_tokenizer(self._source, self._config, self.trust_remote_code, every_token=False)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name}: has no chat template, so it cannot write queries; set augment.writer to an "
                "instruction-tuned LLM, or augment.synthetic_queries, rerank and triplets to 0"
            )
        return tokenizer

    @cached_property
    def model(self) -> Any:
        model = load_weights(
            AutoModelForCausalLM, self._source, trust_remote_code=self.trust_remote_code, dtype=dtype_of(AUTO)
        )
        return model.to(ranks.device()).eval()

    def cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text, without those that the model has no embedding for."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # truncation would be state
        rows = vocabulary_size(self._config)
        return str(self.tokenizer.decode([id for id in ids[:tokens] if rows is None or id < rows]))

    @torch.no_grad()
    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        """See Writer; what all conversations begin with is computed once."""
        if conversations[0][-1]["role"] == "assistant" and not self._continues:
            return [""] * len(conversations)
        ids = [self._token_ids(messages) for messages in conversations]
        shared = _common_prefix(ids)
        tokens_BT, mask_BT = self._pad_between(ids, shared)
        cache = self.model(tokens_BT[:1, :shared], use_cache=True).past_key_values if shared else None
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed_for(ids))
            if can_decode(self.model):
                answers = decode(self.model, tokens_BT, mask_BT, cache, sampling, self.on_tokens)
            else:
                answers = self._generated(tokens_BT, mask_BT, cache, sampling)
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _generated(
        self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Any, sampling: Sampling
    ) -> list[list[int]]:
        """As `decode` has it, by transformers."""
        if cache is not None:
            cache.batch_repeat_interleave(len(tokens_BT))
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        answers: torch.Tensor = self.model.generate(
            tokens_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            **(drawn if sampling.temperature else {"do_sample": False}),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=self._pad,
            streamer=_Counter(self.on_tokens, self._pad) if self.on_tokens else None,
        )
        found: list[list[int]] = answers[:, tokens_BT.shape[1] :].tolist()
        return found

    @torch.no_grad()
    def next_token_scores(self, conversations: Sequence[list[Message]], tokens: Sequence[str]) -> np.ndarray | None:
        """See Writer. One conversation at a time: these are long, and fill the machine by themselves."""
        columns = self.tokenizer.convert_tokens_to_ids(list(tokens))
        if not self._continues or {None, self.tokenizer.unk_token_id} & {*columns}:
            return None
        rows = []
        for messages in conversations:
            ids = torch.tensor([self._token_ids(messages)], device=self.model.device)
            answer = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=1,
                pad_token_id=self._pad,
                output_logits=True,
                return_dict_in_generate=True,
            )
            rows.append(answer.logits[0][0, columns].float().cpu().numpy())
        return np.stack(rows)

    def _token_ids(self, messages: list[Message]) -> list[int]:
        conversation = messages if self._has_system_role else without_system(messages)
        with told_as(f"{self.name}: its chat template cannot be used"):
            return list(_rendered(self.tokenizer, conversation))

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the chat template takes a system message, and does not leave it out."""
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
        tokenizer = self.tokenizer
        try:
            return "Be brief." in _rendered(tokenizer, messages, tokenize=False)
        except Exception:  # templates are programs, and may raise anything
            return False

    @cached_property
    def _continues(self) -> bool:
        """Whether the chat template can leave the last message open."""
        messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Task: x\nQuery:"}]
        tokenizer = self.tokenizer
        try:
            return bool(_rendered(tokenizer, messages))
        except Exception:
            return False

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        if pad is None:
            raise ValueError(f"{self.name}: its tokenizer has neither a pad nor an EOS token, which batches need")
        return int(pad)

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


class _Counter(BaseStreamer):
    """Tells how many tokens each step of `generate` has written, without those that follow an answer's end."""

    def __init__(self, told: Callable[[int], object], pad: int):
        self._told, self._pad, self._has_prompt = told, pad, False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._told(int((value != self._pad).sum()))
        self._has_prompt = True

    def end(self) -> None:
        return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tokenize: bool = True) -> Any:
    """A conversation as the chat template writes it: its token ids, or its text."""
    unfinished = messages[-1]["role"] == "assistant"
    written = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not unfinished,
        continue_final_message=unfinished,
        tokenize=tokenize,
        return_dict=True,
    )
    return written["input_ids"] if tokenize else written


def _common_prefix(ids: list[list[int]]) -> int:
    """Length of the lists' common prefix, leaving at least one token of each."""
    shortest = min(map(len, ids)) - 1
    differing = (index for index in range(shortest) if len({tokens[index] for tokens in ids}) > 1)
    return next(differing, shortest)

"""The language model that is pruned, its tokenizer, and the texts that it is watched on and trained on."""

from __future__ import annotations

import random

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_of
from drama_dist.encoder import attention
from drama_dist.encoder.contract import wire_tokenizer
from drama_dist.encoder.families import TYPES, LanguageModel, language_model_class
from drama_dist.encoder.pretrained import HEAD, absent_from, load_weights, read_llama_config, read_tokenizer
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.encoder.texts import TextTokenizer
from drama_dist.prune.rotation import principal_basis, rotated
from drama_dist.settings import Settings


def needs_head(settings: Settings) -> bool:
    """Whether the LLM's scores of tokens are used: healing and masks learn from them."""
    return settings.prune.heal_steps > 0 or settings.prune.mask_steps > 0


def load_source(settings: Settings) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    source, trust = reachable(resolve(settings.llm)), settings.trust_remote_code
    config = read_llama_config(source, trust)
    tokenizer = wire_tokenizer(read_tokenizer(source, config, trust), settings.encoder.lower_case)
    optional = absent_from(source) | (set() if needs_head(settings) else {HEAD})
    options = {"config": config, "dtype": dtype_of(AUTO)}
    model = load_weights(AutoModelForCausalLM, source, trust_remote_code=trust, optional=optional, **options)
    if not isinstance(model, language_model_class(config)):
        raise ValueError(f"{settings.llm}: {type(model).__name__}, its own code, cannot be pruned; only {TYPES} can")
    model.config._attn_implementation = attention.NAME
    return model.to(ranks.device()).eval(), tokenizer


def calibration(tokenizer: PreTrainedTokenizerBase, table: PassageTable, settings: Settings) -> list[list[int]]:
    """Token ids of passages sampled by the seed."""
    count = min(settings.prune.calibration_passages, len(table))
    positions = sorted(random.Random(f"{settings.seed} calibration").sample(range(len(table)), count))
    return TextTokenizer(tokenizer)(table.contents(positions), settings.prune.calibration_tokens)


def as_chosen(source: LanguageModel, sequences: list[list[int]], settings: Settings) -> LanguageModel:
    """The model, rotated where prune.hidden_choice asks for it."""
    if settings.prune.hidden_choice == "importance":
        return source
    return rotated(source, principal_basis(source, sequences)).to(ranks.device())

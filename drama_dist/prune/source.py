"""The language model that is pruned: its check, loading, its tokenizer, and the texts that it reads meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_of
from drama_dist.encoder import attention
from drama_dist.encoder.contract import check_dims, wire_tokenizer
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.families import TYPES, LanguageModel, language_model_class
from drama_dist.encoder.model_check import check_llama
from drama_dist.encoder.pretrained import (
    HEAD,
    absent_from,
    is_own_code,
    load_weights,
    read_config,
    read_llama_config,
    read_tokenizer,
)
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.encoder.texts import TextTokenizer
from drama_dist.prune.residual import MOST_TEXTS, check_texts
from drama_dist.prune.rotation import principal_basis, rotated
from drama_dist.prune.shape import requested_shape, shape_of
from drama_dist.search.shards import EmbeddingShards
from drama_dist.settings import Settings, SettingsError


def check(settings: Settings) -> None:
    """Raise SettingsError if the LLM cannot be pruned, or not to the requested shape."""
    with named_by("llm", settings.llm):
        with_superwords = settings.train.superwords > 0 and settings.train.start is None
        fewer_tokens = settings.prune.vocabulary == "used"
        config = check_llama(
            settings.llm, settings.trust_remote_code, needs_head(settings), with_superwords, fewer_tokens
        )
    whole, shape = shape_of(config), requested_shape(settings.prune, config)
    if settings.prune.mask_steps and replace(shape, kv_heads=whole.kv_heads) == whole:
        raise SettingsError(
            f"prune.mask_steps={settings.prune.mask_steps}: {settings.llm} has the wanted shape already, so there "
            "is no mask to learn; set prune.layers, hidden, heads or mlp, or the steps to 0"
        )
    if settings.prune.layer_choice == "residual":
        check_texts(settings.prune.calibration_passages)
    if not settings.train.regression_weight:
        check_dims(settings.encoder, shape.hidden, "settings")


def needs_head(settings: Settings) -> bool:
    """Whether the LLM's scores of tokens are used: healing and masks learn from them."""
    return settings.prune.heal_steps > 0 or settings.prune.mask_steps > 0


def load_source(settings: Settings) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """The model in the dtype that suits this rank's device, and on it; the tokenizer as the encoder has it.

    Raises ValueError or FileNotFoundError where they cannot be read, or are of a type that cannot be pruned.
    """
    source, trust = reachable(resolve(settings.llm)), settings.trust_remote_code
    config, stored = read_llama_config(source, trust), read_config(source, trust)
    if is_own_code("AutoModelForCausalLM", stored, trust) and type(stored) is not type(config):
        raise ValueError(f"{settings.llm}: its own code makes a {stored.model_type} of it, which cannot be pruned")
    tokenizer = wire_tokenizer(read_tokenizer(source, config, trust), settings.encoder.lower_case)
    optional = absent_from(source, trust) | (set() if needs_head(settings) else {HEAD})
    options = {"config": config, "dtype": dtype_of(AUTO)}
    model = load_weights(AutoModelForCausalLM, source, trust_remote_code=trust, optional=optional, **options)
    if not isinstance(model, language_model_class(config)):
        raise ValueError(f"{settings.llm}: {type(model).__name__}, its own code, cannot be pruned; only {TYPES} can")
    model.config._attn_implementation = attention.NAME
    return model.to(ranks.device()).eval(), tokenizer


def calibration(
    tokenizer: PreTrainedTokenizerBase, table: PassageTable, settings: Settings
) -> tuple[list[list[int]], list[str]]:
    """Token ids of passages sampled by the seed, and their languages."""
    positions = sorted(_sampled(len(table), settings.prune.calibration_passages, settings))
    sequences = TextTokenizer(tokenizer)(table.contents(positions), settings.prune.calibration_tokens)
    return sequences, table.languages_of(positions)


def taught_calibration(
    tokenizer: PreTrainedTokenizerBase, table: PassageTable, vectors: EmbeddingShards, settings: Settings
) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids of passages sampled by the seed, at most MOST_TEXTS, in random order, and the teacher's vectors of
    them, float32 (n, K).

    vectors: the teacher's of the whole table.
    """
    positions = _sampled(len(table), min(settings.prune.calibration_passages, MOST_TEXTS), settings)
    sequences = TextTokenizer(tokenizer)(table.contents(positions), settings.prune.calibration_tokens)
    return sequences, torch.from_numpy(vectors.rows(positions))


def _sampled(size: int, most: int, settings: Settings) -> list[int]:
    return random.Random(f"{settings.seed} calibration").sample(range(size), min(most, size))


def rotated_if_asked(source: LanguageModel, sequences: list[list[int]], settings: Settings) -> LanguageModel:
    """The model, or where prune.hidden_choice asks for it a rotated copy, which is float32."""
    if settings.prune.hidden_choice == "importance":
        return source
    return rotated(source, principal_basis(source, sequences)).to(ranks.device())

"""Model types that are made of Llama's layers: which of transformers' classes they are loaded with.

Mistral's and Qwen2's models are Llamas by other names, and become Llamas when they are loaded: Qwen2's have biases of
queries, keys and values and none of what attention puts out, which is then zero. Qwen3's have an RMSNorm of each head's
queries and keys, which Llama does not have, and keep their type. All of them name their parts alike, so that pruning,
training and encoding need not ask which of them a model is. Does not cover types with other layers, as Gemma's, which
scales embeddings and norms otherwise.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

Config: TypeAlias = LlamaConfig | Qwen3Config
Backbone: TypeAlias = LlamaModel | Qwen3Model
LanguageModel: TypeAlias = LlamaForCausalLM | Qwen3ForCausalLM
TYPES = "Llama, Mistral, Qwen2 and Qwen3"

_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "dtype",
    "quantization_config",
)


def with_llamas_layers(config: PreTrainedConfig) -> Config | None:
    """A model's configuration as it is to be loaded; None where it is not made of Llama's layers.

    Where layers attend to a window of tokens, the model gets no more positions than that: up to there, they attend to
    all.
    """
    if isinstance(config, LlamaConfig):
        return config
    if not isinstance(config, MistralConfig | Qwen2Config | Qwen3Config):
        return None
    positions = min(config.max_position_embeddings, _window(config) or config.max_position_embeddings)
    if isinstance(config, Qwen3Config):
        config = copy.deepcopy(config)
        config.max_position_embeddings, config.use_sliding_window, config.sliding_window = positions, False, None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        return config
    kept: dict[str, Any] = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    return LlamaConfig(
        **kept,
        head_dim=getattr(config, "head_dim", None),
        attention_bias=isinstance(config, Qwen2Config),
        max_position_embeddings=positions,
    )


def absent_weights(config: PreTrainedConfig) -> set[str]:
    """Names of weights, zeros, that a model of this type has not and `with_llamas_layers` gives it."""
    if not isinstance(config, Qwen2Config):
        return set()
    layers = range(config.num_hidden_layers)
    return {f"{prefix}layers.{layer}.self_attn.o_proj.bias" for prefix in ("", "model.") for layer in layers}


def backbone_class(config: Config) -> type[Backbone]:
    """Transformers' class of the model without a head."""
    return Qwen3Model if isinstance(config, Qwen3Config) else LlamaModel


def language_model_class(config: Config) -> type[LanguageModel]:
    """Transformers' class of the language model."""
    return Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM


def _window(config: MistralConfig | Qwen2Config | Qwen3Config) -> int | None:
    """Tokens that some layers attend to, where they do not attend to all."""
    sees_a_part = isinstance(config, MistralConfig) or "sliding_attention" in (config.layer_types or ())
    return config.sliding_window if sees_a_part else None

"""Loading what transformers saved: a configuration, a tokenizer, weights.

Refuses what transformers lets pass: code in the model's folder, unless it is trusted; weights that are missing, which
would be random, or have no place in the model; tokens without an embedding. Every error is one sentence that names the
source. Where a source comes from is in sources.py; what makes an encoder of it, in backbone.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drama_dist.encoder.failures import told_as
from drama_dist.encoder.families import TYPES, Config, absent_weights, with_llamas_layers
from drama_dist.encoder.model_files import check_model_files, read_json_file, read_json_object, refuse_pointers

HEAD = "lm_head.weight"  # of a language model
_OF_LLAMA = re.compile(r"(^|\.)(layers|embed_tokens|norm)\.")  # without them vectors differ; other heads do not matter
_POOLER = re.compile(r"(^|\.)pooler\.")  # BERT's, of the first token: no mean takes it, and many models have none


def read_config(source: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a local folder or hub model; raises ValueError or FileNotFoundError."""
    folder = Path(source)
    if folder.is_dir():
        refuse_pointers(folder)
        read_json_object(folder / "config.json")
    with told_as(f"{source}: its config.json cannot be read"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    kernel = str(config._attn_implementation)
    if "/" in kernel and not trust_remote_code:
        raise ValueError(f"{source}: its config.json asks for code of the hub, {kernel}, for attention; take that out")
    return config


def read_llama_config(source: str, trust_remote_code: bool = False) -> Config:
    """The same of a Llama-type model, as it is loaded; raises ValueError, too, where it is of another type or
    quantized.
    """
    return llama_config(source, read_config(source, trust_remote_code))


def llama_config(source: str, stored: PreTrainedConfig) -> Config:
    """A Llama-type model's configuration, as `with_llamas_layers` has it; raises ValueError as `read_llama_config`."""
    with told_as(f"{source}: its config.json makes no Llama"):
        config = with_llamas_layers(stored)
    if config is None:
        raise ValueError(f"{source}: model type {stored.model_type!r}; only {TYPES} models are supported")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source}: its weights are quantized; take the model's folder in bfloat16 or float32")
    rope = str((config.rope_parameters or {}).get("rope_type", "default"))
    for what, value, known in (
        ("rope_type", rope, ["default", *ROPE_INIT_FUNCTIONS]),
        ("hidden_act", config.hidden_act, list(ACT2FN)),
    ):
        if value not in known:
            raise ValueError(f"{source}: its config.json has {what} {value!r}; known are {', '.join(known)}")
    return config


def absent_from(source: str, trust_remote_code: bool = False) -> set[str]:
    """Weights that a Llama-type model's files need not have: see `absent_weights`."""
    return absent_weights(read_config(source, trust_remote_code))


def read_tokenizer(
    source: str, config: PreTrainedConfig, trust_remote_code: bool = False, every_token: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer; raises ValueError where it cannot be read, or has tokens that the model has no embedding for.

    every_token: False asks only about those that are put around texts. Some models have others, for images, that no
    ordinary text contains.
    """
    try:
        with told_as(f"{source}: its tokenizer cannot be read"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            vocabulary = tokenizer.get_vocab()
    except ValueError:
        for file in sorted(Path(source).glob("*.json")):
            read_json_file(file)  # names the one that is damaged
        raise
    if not every_token:
        around = {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token}
        around |= {tokenizer.cls_token, tokenizer.sep_token}
        vocabulary = {token: id for token, id in vocabulary.items() if token in around}
    rows = vocabulary_size(config)
    beyond = sorted((id, token) for token, id in vocabulary.items() if rows is not None and id >= rows)
    if beyond:
        raise ValueError(
            f"{source}: its tokenizer has {len(beyond)} tokens that the model has no embedding for, first "
            f"{beyond[0][1]!r} with id {beyond[0][0]} where vocab_size is {rows}; take them out of the tokenizer, or "
            "give the model larger embeddings"
        )
    return tokenizer


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """How many tokens have an embedding; None where the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def is_own_code(auto_class: str, config: PreTrainedConfig, trust_remote_code: bool) -> bool:
    """Whether what transformers' `auto_class` loads is a class of the model's folder."""
    return trust_remote_code and auto_class in (getattr(config, "auto_map", None) or {})


def load_weights(
    kind: Any, source: str, *, trust_remote_code: bool, optional: Iterable[str] = (), **options: Any
) -> Any:
    """The model of class `kind`, as its `from_pretrained` gives it, from safetensors.

    optional: names of weights that may be missing, because nothing reads them. Raises ValueError where others are
    missing, of another shape than the configuration says, or, of a Llama, without a place in it.
    """
    if Path(source).is_dir():
        check_model_files(Path(source))
    with told_as(f"{source}: its weights cannot be loaded"):
        model, found = kind.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with names
            **options,
        )
    refuse_unfit(source, found, optional, isinstance(model.config, Config))
    return model


def check_weights(kind: Any, folder: Path, config: PreTrainedConfig, optional: Iterable[str] = ()) -> None:
    """Raise what `load_weights` would, from the headers of a local folder's files alone."""
    stored = {name: torch.empty(shape, device="meta") for name, shape in check_model_files(folder).items()}
    with told_as(f"{folder}: its config.json makes no {kind.__name__}"):
        _, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=stored,
            device_map="meta",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_unfit(str(folder), found, optional, isinstance(config, Config))


def refuse_unfit(source: str, found: dict[str, Any], optional: Iterable[str], is_llama: bool = False) -> None:
    """Raise ValueError where weights do not fit the model.

    found: what `from_pretrained` says of missing, mismatched and unexpected weights.
    """
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        shapes = " and ".join(" × ".join(map(str, shape)) for shape in (stored, wanted))
        raise ValueError(
            f"{source}: {name} is {shapes} in the weights and by config.json; one of them is another model's"
        )
    missing = {name for name in found["missing_keys"] if not _POOLER.search(name)} - set(optional)
    if missing:
        raise ValueError(f"{source}: the weights lack {_first(missing)}, which would be random; fetch the model again")
    unknown = {name for name in found["unexpected_keys"] if is_llama and _OF_LLAMA.search(name)}
    if unknown:
        raise ValueError(
            f"{source}: config.json says nothing of {_first(unknown)} in the weights, which would be left out; "
            "one of them is another model's"
        )


def _first(names: set[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"

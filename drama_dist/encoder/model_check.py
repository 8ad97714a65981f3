"""Checks of a model before a long stage needs it: everything but the values of its weights.

Covers Llama-type models. The teacher and the writer check theirs, with the same parts, which are in pretrained.py and
model_files.py.
"""

from __future__ import annotations

from pathlib import Path

from drama_dist.encoder.contract import read_contract, wire_tokenizer
from drama_dist.encoder.families import Config, backbone_class, language_model_class
from drama_dist.encoder.head import head_size
from drama_dist.encoder.pretrained import absent_from, check_weights, read_llama_config, read_tokenizer
from drama_dist.encoder.sources import fetched, reachable, resolve
from drama_dist.encoder.superwords import check_byte_level
from drama_dist.encoder.vocabulary import check_prunable
from drama_dist.settings import EncoderSettings


def check_llama(
    name: str,
    trust_remote_code: bool = False,
    with_head: bool = False,
    with_superwords: bool = False,
    fewer_tokens: bool = False,
) -> Config:
    """Check a Llama-type model and return its configuration.

    with_head: its language-model head is needed, too. with_superwords: its tokenizer is to get some. fewer_tokens: it
    is to lose some. Raises ValueError or FileNotFoundError where it cannot be used.
    """
    source = reachable(resolve(name))
    config = read_llama_config(source, trust_remote_code)
    tokenizer = wire_tokenizer(read_tokenizer(source, config, trust_remote_code), lower_case=False)
    if with_superwords:
        check_byte_level(tokenizer)
    if fewer_tokens:
        check_prunable(tokenizer)
    if Path(source).is_dir():
        kind = language_model_class(config) if with_head else backbone_class(config)
        check_weights(kind, Path(source), config, absent_from(source, trust_remote_code))
    return config


def check_encoder(name: str, contract: EncoderSettings | None = None, with_superwords: bool = False) -> int:
    """Check a Llama-type encoder, its linear head and its folder's contract; return how many components vectors have.

    contract: replaces the folder's, as in `load`. with_superwords: as in `check_llama`. Raises ValueError or
    FileNotFoundError.
    """
    config = check_llama(name, with_superwords=with_superwords)
    folder = fetched(resolve(name))
    size = head_size(folder, config.hidden_size)
    if contract is None:
        read_contract(folder, size)
    return size

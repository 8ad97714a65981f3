"""The encoder contract on disk: drama.json beside the weights, or a sentence-transformers folder's configuration.

Covers the prefixes, lengths and dims that a model was trained with, and the tokenisation (small letters; BOS, if
there is one, prefix, text, EOS; truncation keeps EOS), which is configured in the tokenizer so that every program that
loads it agrees.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tokenizers.normalizers import Lowercase, Normalizer, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from drama_dist.encoder.model_files import read_json_file, read_json_object
from drama_dist.run.files import write_text
from drama_dist.settings import EncoderSettings, EncodeSettings, FreeText, SettingsError, TextTokens
from drama_dist.settings_file import read_json

FILE = "drama.json"


def read_contract(folder: Path, size: int) -> EncoderSettings:
    """The contract that a model folder declares; defaults where it declares none, but for `lower_case`: false.

    size: components of the model's vectors. Raises ValueError where a sentence-transformers folder pools otherwise than
    by the mean, SettingsError where a file has an unknown key, a value of another type or a dim beyond the size.
    """
    if (folder / FILE).exists():
        declared = {"lower_case": False, **read_json_object(folder / FILE)}  # older than this key: as it was trained
        contract = read_json(EncoderSettings, json.dumps(declared), str(folder / FILE))
        return check_dims(contract, size, str(folder / FILE))
    if (folder / "modules.json").exists():
        return _from_sentence_transformers(folder, size)
    return EncoderSettings(lower_case=False, dims=[size])


def write_contract(folder: Path, contract: EncoderSettings) -> None:
    """Write drama.json."""
    write_text(folder / FILE, json.dumps(asdict(contract), indent=2) + "\n")


def check_dims(contract: EncoderSettings, size: int, source: str) -> EncoderSettings:
    """Return the contract; raise SettingsError, naming its source, if a dim is larger than the vectors' size."""
    if max(contract.dims) > size:
        raise SettingsError(
            f"{source}: encoder.dims={contract.dims} asks for {max(contract.dims)} components, "
            f"but the model's vectors have {size}; lower the dim or keep more in prune.hidden"
        )
    return contract


def with_dims_within(contract: EncoderSettings, size: int) -> EncoderSettings:
    """The contract with those of its dims that vectors of this size have; with the size itself where it has none."""
    return replace(contract, dims=[dim for dim in contract.dims if dim <= size] or [size])


def as_encoded(contract: EncoderSettings, encode: EncodeSettings, positions: int) -> EncoderSettings:
    """The contract by which passages are encoded, and the export reads them: the limit may differ from training's.

    positions: that the model has, which sentence-transformers does not go beyond either.
    """
    limit = encode.max_passage_tokens or contract.max_passage_tokens
    return replace(contract, max_passage_tokens=min(limit, positions))


def wire_tokenizer(tokenizer: PreTrainedTokenizerBase, lower_case: bool) -> PreTrainedTokenizerBase:
    """Make the tokenizer put BOS, if it has one, first and EOS last, pad on the right, and truncate before EOS.

    Removes the chat template: sentence-transformers would wrap every text in it.

    lower_case: fold letters before whatever else the tokenizer's normaliser does, in prefixes as in texts. Special
    tokens stay, since tokenizers find them in the text before it is normalised. Each character becomes its own small
    letter in Unicode, whatever the language and the letters beside it: É becomes é and keeps its accent, İ becomes i
    and a combining dot, I becomes i in Turkish too (there ı is another letter), Σ becomes σ at the end of a word too,
    and ß stays, so that STRASSE and straße differ. False leaves the normaliser as it is.

    Raises ValueError if the tokenizer has no fast backend or no EOS.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos) if token is not None]
    if not tokenizer.is_fast or eos is None or None in dict(around).values():
        raise ValueError(f"{tokenizer.name_or_path}: needs a fast tokenizer with EOS, has bos={bos!r} eos={eos!r}")
    begin = "" if bos is None else f"{bos} "
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin}$A {eos}", special_tokens=around)
    if lower_case:
        backend = tokenizer.backend_tokenizer
        backend.normalizer = _lower_case_first(backend.normalizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = eos
    return tokenizer


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a text's tokens by a wired tokenizer, those that come before the text: BOS, which Qwen does not have."""
    return 0 if tokenizer.bos_token is None else 1


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer so that transformers takes all of it from tokenizer.json.

    Tokenizers of some classes (GPT2Tokenizer, Qwen2Tokenizer, GemmaTokenizer) are put together anew when they are
    loaded, without the normaliser that was saved.
    """
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    values = {**read_json_object(config), "tokenizer_class": "PreTrainedTokenizerFast"}
    write_text(config, json.dumps(values, indent=2) + "\n")


def _lower_case_first(normalizer: Normalizer | None) -> Normalizer:
    first = normalizer[0] if isinstance(normalizer, Sequence) and len(normalizer) else normalizer
    folding = [] if isinstance(first, Lowercase) else [Lowercase()]
    return Sequence([*folding, *([] if normalizer is None else [normalizer])])


def _from_sentence_transformers(folder: Path, size: int) -> EncoderSettings:
    for module in read_modules(folder):
        config_file = folder / module["path"] / "config.json"
        if module["type"].endswith("Pooling") and config_file.exists():
            pooling = read_json_object(config_file)
            if not _is_mean(pooling):
                raise ValueError(
                    f"{config_file}: pools otherwise than by the mean ({pooling}); only mean pooling is supported"
                )
    described, longest = folder / "config_sentence_transformers.json", folder / "sentence_bert_config.json"
    prompts = (read_json_object(described).get("prompts") if described.exists() else None) or {}
    if not isinstance(prompts, dict):
        raise ValueError(f"{described}: expected an object of prompts, found {type(prompts).__name__}")
    named = read_json(_Prompts, _json_of(_Prompts, prompts), f"{described}: prompts")
    length = read_json_object(longest) if longest.exists() else {}
    limit = read_json(_Length, _json_of(_Length, length), str(longest))
    passage = named.passage if named.document is None else named.document
    limits = {"max_query_tokens": limit.of_queries, "max_passage_tokens": limit.of_passages}
    return EncoderSettings(
        query_prefix=named.query or "",
        passage_prefix=passage or "",
        lower_case=False,
        dims=[size],
        **{name: value for name, value in limits.items() if value is not None},
    )


@dataclass(kw_only=True)
class _Prompts:
    """Those of config_sentence_transformers.json that are used."""

    query: FreeText | None = None
    document: FreeText | None = None
    passage: FreeText | None = None


@dataclass(kw_only=True)
class _Length:
    """Of sentence_bert_config.json: what the tokenizer cuts at, and less where queries or passages have their own."""

    max_seq_length: TextTokens | None = None
    query_length: TextTokens | None = None
    document_length: TextTokens | None = None

    @property
    def of_queries(self) -> int | None:
        return self.max_seq_length if self.query_length is None else self.query_length

    @property
    def of_passages(self) -> int | None:
        return self.max_seq_length if self.document_length is None else self.document_length


def _json_of(kind: type, values: dict[str, object]) -> str:
    """The values that are fields; the files hold others, too."""
    return json.dumps({field.name: values[field.name] for field in fields(kind) if field.name in values})


def read_modules(folder: Path) -> list[dict[str, str]]:
    """The modules that a sentence-transformers folder lists, each with `type` and `path`; raises ValueError."""
    file = folder / "modules.json"
    modules = read_json_file(file)
    whole = isinstance(modules, list) and all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in ("type", "path"))
        for module in modules
    )
    if not whole:
        raise ValueError(f"{file}: expected a list of modules, each with its type and path")
    return list(modules)


def has_files(module: dict[str, str]) -> bool:
    """Whether anything is read from a module's folder; of those that have no files Git keeps no folder."""
    return not module["type"].endswith(".Normalize")


def _is_mean(pooling: dict[str, object]) -> bool:
    if "pooling_mode" in pooling:
        return pooling["pooling_mode"] == "mean"
    chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    return chosen == ["pooling_mode_mean_tokens"]

"""A teacher from sentence-transformers, in this process.

Covers checking and loading it, its prompts, and batches of a token budget, which CPU threads encode side by side.
Shapes: N texts, K components.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    PreTrainedTokenizerBase,
)

from drama_dist.distributed import ranks
from drama_dist.distributed.precision import dtype_of
from drama_dist.encoder import cut_texts
from drama_dist.encoder.contract import has_files, read_modules
from drama_dist.encoder.failures import told_as
from drama_dist.encoder.model_files import check_model_files, read_json_object, refuse_pointers
from drama_dist.encoder.pooling import unit_rows
from drama_dist.encoder.pretrained import check_weights, is_own_code, read_config, read_tokenizer
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.encoder.threads import side_by_side
from drama_dist.run.progress import Progress
from drama_dist.search.teacher import Kind, Teacher
from drama_dist.settings import TeacherSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OWN_MODULES = "sentence_transformers."
_WITH_WEIGHTS = ("Dense", "LayerNorm", "WeightedLayerPooling")
_WITH_SETTINGS = ("Pooling", "Dropout", *_WITH_WEIGHTS)
_DESCRIPTIONS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_QUERY_PROMPTS = ("query",)
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}  # a CPU thread's: larger ones have more padding, and leave its cache
_WITH_STATE = ("dynamic", "longrope")  # rotary embeddings that change with the texts


class LocalTeacher(Teacher):
    """A sentence-transformers model, loaded on first use.

    Texts get the model's query and document prompts, if it has them, and are truncated to `max_tokens` or the model's
    limit, whichever is smaller. Threads that share it take turns, because truncation and padding are state of its
    tokenizer.
    """

    def __init__(self, settings: TeacherSettings, trust_remote_code: bool = False):
        super().__init__(settings)
        self.trust_remote_code = trust_remote_code
        self._turn = threading.RLock()

    def check(self) -> None:
        """Check everything but the values of the weights.

        Raises ValueError or FileNotFoundError where the model cannot be used.
        """
        self._checked_source()

    def _checked_source(self) -> str:
        """What sentence-transformers can load."""
        source = reachable(resolve(self.settings.model), also=_DESCRIPTIONS)
        folder = Path(source)
        if folder.is_dir():
            refuse_pointers(folder)
            if (folder / "modules.json").exists():
                self._check_modules(folder)
            else:
                self._check_transformer(folder)
        return source

    def _check_modules(self, folder: Path) -> None:
        file = folder / "modules.json"
        modules = read_modules(folder)
        if not modules:
            raise ValueError(f"{file}: lists no modules; fetch the model again")
        for module in modules:
            kind, path = module["type"], folder / module["path"]
            if kind.startswith(_OWN_MODULES):
                from sentence_transformers.util import import_from_string

                with told_as(f"{file}: sentence-transformers has no module {kind}"):
                    import_from_string(kind)
            elif not self.trust_remote_code:
                raise ValueError(f"{file}: {kind} is code of the model; set trust_remote_code=true if you trust it")
            if has_files(module):
                _check_module(kind, path)
            if kind.startswith(_OWN_MODULES) and kind.endswith(".Transformer"):
                self._check_transformer(path)

    def _check_transformer(self, folder: Path) -> None:
        config = read_config(str(folder), self.trust_remote_code)
        tokenizer = read_tokenizer(str(folder), config, self.trust_remote_code, every_token=False)
        _needs_padding(tokenizer, str(folder))
        # Of a model with a decoder sentence-transformers loads the encoder alone, if transformers has a class for it.
        with_decoder = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        kind = (MODEL_FOR_TEXT_ENCODING_MAPPING if with_decoder else MODEL_MAPPING).get(type(config), None)
        if isinstance(kind, type) and not is_own_code("AutoModel", config, self.trust_remote_code):
            check_weights(kind, folder, config)
        else:
            check_model_files(folder)

    @cached_property
    def model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        source = self._checked_source()
        with told_as(f"{source}: cannot be loaded as a sentence-transformers model"):
            model = SentenceTransformer(
                source,
                device=str(ranks.device()),
                trust_remote_code=self.trust_remote_code,
                model_kwargs={"dtype": dtype_of(self.settings.dtype), "use_safetensors": True},
            )
        if not isinstance(model.tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"{source}: not a model of texts with a tokenizer of transformers, as a teacher has to be")
        _needs_padding(model.tokenizer, source)
        model.max_seq_length = min(self.settings.max_tokens, model.max_seq_length or self.settings.max_tokens)
        return model.eval()

    def encode(self, texts: list[str], kind: Kind, progress: Progress | None = None) -> np.ndarray:
        with self._turn:
            model = self.model
            if not texts:
                return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
            encode, names = {
                "query": (model.encode_query, _QUERY_PROMPTS),
                "passage": (model.encode_document, _PASSAGE_PROMPTS),
            }[kind]
            prompt = next((model.prompts[name] for name in names if model.prompts.get(name)), "")
            budget = self.settings.batch_tokens or _TOKENS_PER_BATCH[model.device.type]
            batches = padded_batches(self._lengths([prompt + text for text in texts]), budget)

            def of(batch: list[int]) -> np.ndarray:
                rows: np.ndarray = encode([texts[row] for row in batch], batch_size=len(batch), show_progress_bar=False)
                return rows

            parts = []
            # The first sets the tokenizer's truncation and padding, which would fail while another thread reads them.
            first, others = map(of, batches[:1]), batches[1:]
            threaded = len(others) >= 2 * torch.get_num_threads() and self._thread_safe()
            for part in chain(first, side_by_side(of, others) if threaded else map(of, others)):
                parts.append(part)
                if progress is not None:
                    progress(len(part))
        return unit_rows(np.concatenate(parts)[np.argsort(list(chain.from_iterable(batches)))])

    def _thread_safe(self) -> bool:
        """Whether several threads may encode at a time: on a CPU, and where neither the texts nor the model's own code
        can change the model.
        """
        ropes = [str(getattr(module, "rope_type", "")) for module in self.model.modules()]  # some have one a layer
        return (
            self.model.device.type == "cpu"
            and not self.trust_remote_code
            and not torch.is_autocast_enabled("cpu")  # autocast is per thread
            and not any(state in rope for rope in ropes for state in _WITH_STATE)
        )

    def _lengths(self, texts: list[str]) -> list[int]:
        """Token counts after truncation."""
        encoded = self.model.tokenizer(
            texts, truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        lengths, limit = [len(ids) for ids in encoded["input_ids"]], self.model.max_seq_length
        cut_texts.note(lengths, limit)
        return [min(length, limit) for length in lengths]


def _check_module(kind: str, folder: Path) -> None:
    """Raise where files of a module are missing or damaged."""
    name = kind.rpartition(".")[2]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: missing; modules.json names this folder")
    refuse_pointers(folder)
    if name in _WITH_SETTINGS:
        read_json_object(folder / "config.json")
    if name in _WITH_WEIGHTS:
        pickled = folder / "pytorch_model.bin"  # sentence-transformers reads the values alone, so no code can run
        if pickled.is_file() and not (folder / "model.safetensors").is_file():
            refuse_pointers(pickled)
        else:
            check_model_files(folder)


def _needs_padding(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{source}: its tokenizer has no pad token, which batches of texts need; name one of its tokens as "
            "pad_token in tokenizer_config.json"
        )


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

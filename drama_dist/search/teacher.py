"""The teacher: a strong retriever from sentence-transformers, as a text encoder.

Covers checking and loading it, its prompts, and batches of a token budget. Does not cover fusing its ranking with
BM25: fusion.py does. Shapes: N texts, K components.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    PreTrainedTokenizerBase,
)

from drama_dist.corpus.windows import cut
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import dtype_of
from drama_dist.encoder import cut_texts
from drama_dist.encoder.contract import has_files, read_modules
from drama_dist.encoder.failures import told_as
from drama_dist.encoder.model_files import check_model_files, read_json_object, refuse_pointers
from drama_dist.encoder.pooling import checked_dim, matryoshka_cut_array
from drama_dist.encoder.pretrained import check_weights, is_own_code, read_config, read_tokenizer
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.encoder.texts import as_texts
from drama_dist.run.progress import Progress
from drama_dist.settings import TeacherSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OWN_MODULES = "sentence_transformers."
_WITH_WEIGHTS = ("Dense", "LayerNorm", "WeightedLayerPooling")
_WITH_SETTINGS = ("Pooling", "Dropout", *_WITH_WEIGHTS)
_DESCRIPTIONS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_PASSAGE_PROMPTS = ("document", "passage", "corpus")


class Teacher:
    """A sentence-transformers model that encodes texts to unit vectors; loaded on first use.

    Texts get the model's query and document prompts, if it has them, and are truncated to `max_tokens` or the model's
    limit, whichever is smaller. Several threads may use one teacher; it encodes for one at a time, because truncation
    and padding are state of its tokenizer.
    """

    def __init__(self, settings: TeacherSettings, trust_remote_code: bool = False):
        self.settings = settings
        self.trust_remote_code = trust_remote_code
        self._turn = threading.RLock()

    def check(self) -> str:
        """Check everything but the values of the weights, and return what sentence-transformers can load.

        Raises ValueError or FileNotFoundError where the model cannot be used.
        """
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

        source = self.check()
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

    def encode_queries(self, texts: Iterable[str], dim: int | None = None) -> np.ndarray:
        """Unit vectors of queries, float32 (N, dim); dim None is the model's size.

        Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        with self._turn:
            return self._encode(as_texts(texts), dim, self.model.encode_query, ("query",))

    def encode_passages(
        self, texts: Iterable[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Unit vectors of passages, float32 (N, dim); dim None is the model's size.

        A text of more than `window_words` words has the mean of its windows' vectors. progress: told how many texts are
        encoded. Raises TypeError or ValueError for texts as `as_texts` does, for the dim as `checked_dim` does.
        """
        windows = [self._windows(text) for text in as_texts(texts)]
        flat, counts_N = list(chain(*windows)), np.array([len(parts) for parts in windows], dtype=np.int64)
        told = None if progress is None else _in_texts(progress, len(windows), len(flat))
        with self._turn:
            vectors_nK = self._encode(flat, None, self.model.encode_document, _PASSAGE_PROMPTS, told)
        if len(flat) > len(windows):
            vectors_nK = np.add.reduceat(vectors_nK, counts_N.cumsum() - counts_N)
        return matryoshka_cut_array(vectors_nK, checked_dim(dim, vectors_nK.shape[1]))

    def _windows(self, text: str) -> list[str]:
        words = self.settings.window_words
        return [text] if words is None else cut(text, words, self.settings.window_step)

    def _encode(
        self,
        texts: list[str],
        dim: int | None,
        encode: Callable[..., Any],
        prompts: Sequence[str],
        progress: Progress | None = None,
    ) -> np.ndarray:
        size = self.model.get_embedding_dimension()
        if size is not None:
            dim = checked_dim(dim, size)
        if not texts:
            return np.zeros((0, dim or 0), dtype=np.float32)
        prompt = next((self.model.prompts[name] for name in prompts if self.model.prompts.get(name)), "")
        vectors_NK: np.ndarray | None = None
        for batch in padded_batches(self._lengths([prompt + text for text in texts]), self.settings.batch_tokens):
            vectors = encode([texts[position] for position in batch], batch_size=len(batch), show_progress_bar=False)
            if vectors_NK is None:
                vectors_NK = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
            vectors_NK[batch] = vectors
            if progress is not None:
                progress(len(batch))
        assert vectors_NK is not None
        return matryoshka_cut_array(vectors_NK, checked_dim(dim, vectors_NK.shape[1]))

    def _lengths(self, texts: list[str]) -> list[int]:
        """Token counts after truncation."""
        encoded = self.model.tokenizer(
            texts, truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        lengths, limit = [len(ids) for ids in encoded["input_ids"]], self.model.max_seq_length
        cut_texts.note(lengths, limit)
        return [min(length, limit) for length in lengths]


def _in_texts(progress: Progress, texts: int, windows: int) -> Progress:
    """Tells `progress` of texts, in proportion to the windows that it is told of."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        progress(done * texts // windows - before * texts // windows)

    return told


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

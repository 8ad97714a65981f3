"""The prune stage: from a language model to a small bidirectional encoder.

Measures importance, selects and extracts the small model, or takes that of learned masks; heals it, and leaves out
tokens that it does not need. The artefact is an encoder folder with selection.json: the indices that were kept, and
with prune.layer_choice=residual the residuals by which layers were chosen.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.general import open_general
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.backbone import Encoder, probe
from drama_dist.encoder.contract import wire_tokenizer, with_dims_within
from drama_dist.encoder.cut_texts import counting
from drama_dist.encoder.families import Backbone, LanguageModel
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.encoder.vocabulary import is_prunable, keep_embeddings, reachable_tokens, used_tokens, with_tokens
from drama_dist.prune.extractor import SELECTION, select, shrink
from drama_dist.prune.healing import heal
from drama_dist.prune.importance import measure_importance
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.mask_stage import masked_model
from drama_dist.prune.residual import residuals
from drama_dist.prune.source import calibration, load_source, rotated_if_asked, taught_calibration
from drama_dist.run import interrupts
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import CORPUS, MASKS, TRAINING_TEXTS
from drama_dist.run.progress import progress_bar, say
from drama_dist.run.runner import Run
from drama_dist.search.shards import EmbeddingShards
from drama_dist.settings import EncoderSettings


def inputs(run: Run) -> dict[str, str]:
    """The LLM's fingerprint."""
    return {"llm": run.once(model_fingerprint, run.settings.llm)}


def prune(run: Run, folder: StageFolder) -> None:
    """Prune the LLM: RUN/prune.

    Raises ValueError if the LLM is of another type, SettingsError if the requested shape does not fit it,
    interrupts.Stopped after the step of healing in which a signal asked for it, with a checkpoint saved.
    """
    settings = run.settings
    source, tokenizer = load_source(settings)
    with counting() as cut:
        sequences, languages = calibration(tokenizer, open_collection(run.path(CORPUS)).passages, settings)
    if settings.prune.mask_steps:
        small, kept_parts = masked_model(run.path(MASKS))
    else:
        turned = rotated_if_asked(source, sequences, settings)
        importance, unexplained = measure_importance(turned, sequences), _unexplained(run, source, tokenizer)
        selection = select(importance, settings.prune, unexplained)
        small, kept_parts = shrink(turned, selection), selection.as_record()
        if unexplained is not None:
            kept_parts["residuals"] = unexplained.tolist()
    batches = LanguageBatches(sequences, languages)
    if settings.prune.heal_steps:
        batches.measure(source)
    wanted: set[int] = set()  # chosen here, since reading a large corpus would hold up a signal below
    ranks.by_rank_0(lambda: wanted.update(_wanted_tokens(run, tokenizer)))
    with interrupts.deferred():
        if settings.prune.heal_steps:
            small = heal(folder, small.to(ranks.device()), source, batches, settings.prune, settings.seed)
        backbone = small.model.to("cpu")
        if ranks.rank() == 0:
            if wanted:
                tokenizer, kept = with_tokens(tokenizer, wanted)
                wire_tokenizer(tokenizer, settings.encoder.lower_case)
                say(f"prune: {len(kept):,} of {backbone.config.vocab_size:,} tokens are kept (prune.vocabulary)")
                keep_embeddings(backbone, kept)
            _save(folder.folder, backbone, tokenizer, settings.encoder, kept_parts)
        facts = {"parameters": sum(weight.numel() for weight in backbone.parameters()), "tokens": len(tokenizer)}
        folder.finish(**facts, dtype=dtype_name(AUTO), cut={"passages": asdict(cut)})


def _unexplained(run: Run, source: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Of the teacher's vectors of training texts, at every depth; None where layers are chosen otherwise."""
    if run.settings.prune.layer_choice != "residual":
        return None
    table = open_collection(run.path(TRAINING_TEXTS)).passages
    vectors = EmbeddingShards(run.path(f"encode/{TRAINING_TEXTS}/teacher"))
    return residuals(source, *taught_calibration(tokenizer, table, vectors, run.settings))


def _wanted_tokens(run: Run, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of prune.vocabulary's tokens; none where all are to stay."""
    encoder, choice = run.settings.encoder, run.settings.prune.vocabulary
    if choice == "whole" or (choice == "reachable" and not encoder.lower_case):
        return set()
    if choice == "reachable" and not is_prunable(tokenizer):
        say("prune: all tokens are kept, since the tokenizer is not one of byte-pair encoding (prune.vocabulary)")
        return set()
    if choice == "reachable":
        return reachable_tokens(tokenizer)
    own, general = open_collection(run.path(CORPUS)).passages, open_general(run.path(CORPUS))
    tables = [own] if general is None else [own, general]
    bar = progress_bar(sum(map(len, tables)), "prune: tokens that are used", "texts")
    texts = chain.from_iterable(table.texts() for table in tables)
    used = used_tokens(tokenizer, chain([encoder.query_prefix, encoder.passage_prefix], texts), bar.update)
    bar.close()
    return used


def _save(
    folder: Path,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    contract: EncoderSettings,
    kept_parts: dict[str, Any],
) -> None:
    backbone.config.is_causal = False
    backbone.config.architectures = [type(backbone).__name__]
    # The run's dims may exceed the hidden size: they are those of a linear head's vectors.
    encoder = Encoder(backbone, tokenizer, with_dims_within(contract, backbone.config.hidden_size)).eval()
    probe(encoder)
    encoder.save(folder)
    write_text(folder / SELECTION, json.dumps(kept_parts) + "\n")

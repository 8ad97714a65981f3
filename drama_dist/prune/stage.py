"""The prune stage: from a language model to a small bidirectional encoder.

Measures importance, selects and extracts the small model, and heals it. The artefact is an encoder folder with
selection.json, the indices that were kept.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_name, dtype_of
from drama_dist.encoder import attention
from drama_dist.encoder.backbone import Encoder, probe
from drama_dist.encoder.contract import check_dims, wire_tokenizer
from drama_dist.encoder.sources import model_fingerprint, resolve
from drama_dist.prune.extractor import Selection, select, shrink
from drama_dist.prune.healing import heal
from drama_dist.prune.importance import measure_importance
from drama_dist.run import interrupts
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.runner import Run
from drama_dist.settings import EncoderSettings, Settings


def inputs(run: Run) -> dict[str, str]:
    """The LLM's fingerprint."""
    return {"llm": run.once(model_fingerprint, run.settings.llm)}


def prune(run: Run, folder: StageFolder) -> None:
    """Prune the LLM: RUN/prune.

    Raises ValueError if the LLM is not of Llama type, SettingsError if the requested shape or dims do not fit it,
    interrupts.Stopped after the step of healing in which a signal asked for it, with a checkpoint saved.
    """
    settings = run.settings
    check_dims(settings.encoder, settings.prune.hidden, "settings")
    source, tokenizer = _load(settings.llm, settings.trust_remote_code)
    sequences = _calibration(tokenizer, open_collection(run.path("corpus")).passages, settings)
    selection = select(measure_importance(source, sequences), settings.prune)
    small = shrink(source, selection)
    with interrupts.deferred():
        if settings.prune.heal_steps:
            small = heal(folder, small.to(ranks.device()), source, sequences, settings.prune, settings.seed)
        if ranks.rank() == 0:
            _save(folder.folder, small, tokenizer, settings.encoder, selection)
        folder.finish(parameters=sum(weight.numel() for weight in small.parameters()), dtype=dtype_name(AUTO))


def _load(name: str, trust_remote_code: bool) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    folder = resolve(name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype_of(AUTO), use_safetensors=True, trust_remote_code=trust_remote_code
    )
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"{name}: model type {model.config.model_type!r}; only Llama-type models can be pruned")
    model.config._attn_implementation = attention.NAME
    return model.to(ranks.device()).eval(), wire_tokenizer(
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )


def _calibration(tokenizer: PreTrainedTokenizerBase, table: PassageTable, settings: Settings) -> list[list[int]]:
    """Token ids of passages sampled by the seed."""
    count = min(settings.prune.calibration_passages, len(table))
    positions = sorted(random.Random(f"{settings.seed} calibration").sample(range(len(table)), count))
    ids: list[list[int]] = tokenizer(
        table.contents(positions),
        truncation=True,
        max_length=settings.prune.calibration_tokens,
        return_attention_mask=False,
    )["input_ids"]
    return ids


def _save(
    folder: Path,
    small: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    contract: EncoderSettings,
    selection: Selection,
) -> None:
    backbone = small.model.to("cpu")
    backbone.config.is_causal = False
    backbone.config.architectures = ["LlamaModel"]
    encoder = Encoder(backbone, tokenizer, contract).eval()
    probe(encoder)
    encoder.save(folder)
    record = {
        "layers": selection.layers,
        "hidden": selection.hidden.tolist(),
        "heads": [heads.tolist() for heads in selection.heads],
        "mlp": [neurons.tolist() for neurons in selection.mlp],
        "norm_gains": selection.norm_gains.tolist(),
    }
    write_text(folder / "selection.json", json.dumps(record) + "\n")

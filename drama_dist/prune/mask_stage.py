"""The masks stage: a language model and its masks are trained together, and a smaller model is made of both.

Covers the loss (next tokens, and the masks' penalty), the loop, and RUN/masks: the small model, and selection.json with
what was kept. Healing and making an encoder of it are the prune stage's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from drama_dist.corpus.collection import open_collection
from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.loop import ResumableLoop, Schedule, StepReport
from drama_dist.distributed.precision import AUTO, agreed_dtype_name
from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import pack
from drama_dist.prune.extractor import SELECTION, requested_shape, shape_of, shrink
from drama_dist.prune.language_loss import Chunk, share_of_this_rank, step_chunks, token_scores
from drama_dist.prune.masks import LearnedMasks, Masks, folded, masked
from drama_dist.prune.source import as_chosen, calibration, load_source
from drama_dist.run import interrupts
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import CORPUS
from drama_dist.run.runner import Run

_MODEL = "model"
_RAMP_SHARE = 0.2  # of the steps, after which the whole sparsity is asked for (Xia et al., appendix A: 640 of 3,200)
_WARMUP_SHARE = 0.1
_CHECKPOINT_EVERY = 25
_KEEP_CHECKPOINTS = 1


def learn_masks(run: Run, folder: StageFolder) -> None:
    """Do the stage. Raises as `prune` does."""
    settings, prune = run.settings, run.settings.prune
    source, tokenizer = load_source(settings)
    sequences = calibration(tokenizer, open_collection(run.path(CORPUS)).passages, settings)
    source = as_chosen(source, sequences, settings)
    whole = shape_of(source.config)
    rate = prune.mask_learning_rate / prune.heal_learning_rate
    masks = LearnedMasks(whole, requested_shape(prune, whole), settings.seed, rate)
    module = nn.ModuleDict({"model": source, "masks": masks}).to(ranks.device()).train()
    engine = Engine(module, OptimiserSettings(agreed_dtype_name(AUTO), 1, weight_decay=0.0, gradient_clipping=1.0))
    drawn: Masks = {}

    def do_step(step: int, learning_rate: float) -> StepReport:
        nonlocal drawn
        began, seed = time.monotonic(), f"{settings.seed} masks {step}"
        chunks = step_chunks(sequences, prune.heal_tokens, prune.heal_scored_share, seed)
        progress = min(1.0, (step + 1) / (_RAMP_SHARE * prune.mask_steps))
        scored, share = sum(len(chunk.scored) for chunk in chunks), list(share_of_this_rank(chunks))
        total = torch.zeros((), device=ranks.device())
        for index, (chunk, weight) in enumerate(share):
            drawn = masks.sampled(seed)
            loss = _language_loss(source, chunk) * (weight / scored)
            total += loss.detach()
            if index == 0:  # gradients of all ranks are added
                loss = loss + masks.penalty(progress) / ranks.world_size()
            engine.backward(loss, last=index == len(share) - 1)
        penalty = float(masks.penalty(progress).detach())
        kept = {name: round(float(shares.detach().mean()), 4) for name, shares in masks.kept_shares().items()}
        norm = engine.step(learning_rate)
        tokens = sum(chunk.tokens for chunk in chunks)
        figures = {
            "loss": float(ranks.sum_over_ranks(total)),
            "penalty": penalty,
            "kept": kept,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "tokens_per_second": round(tokens / (time.monotonic() - began), 1),
        }
        told = ", ".join(f"{name} {share:.0%}" for name, share in kept.items())
        return StepReport(figures, f"loss {figures['loss']:.3f}, kept: {told}")

    schedule = Schedule(
        prune.mask_steps,
        None,
        prune.heal_learning_rate,
        _WARMUP_SHARE,
        _CHECKPOINT_EVERY,
        _KEEP_CHECKPOINTS,
        keep_best=False,
    )
    with interrupts.deferred():
        with masked(source, lambda: drawn):
            ResumableLoop(folder, engine, schedule).run("masks", do_step)
        weights = engine.full_weights()
        if ranks.rank() == 0:
            module.float().load_state_dict(weights, strict=False)  # a tied head has no entry of its own
            model, selection = folded(source, masks.final())
            shrink(model, selection).save_pretrained(folder.folder / _MODEL)
            write_text(folder.folder / SELECTION, json.dumps(selection.as_record()) + "\n")
        folder.finish(wanted=masks.wanted)


def masked_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The small language model of a finished stage, float32, and what was kept of the large one."""
    model = AutoModelForCausalLM.from_pretrained(folder / _MODEL, dtype=torch.float32, trust_remote_code=False)
    model.config._attn_implementation = attention.NAME
    return model, json.loads((folder / SELECTION).read_text("utf-8"))


def _language_loss(model: LanguageModel, chunk: Chunk) -> torch.Tensor:
    """Sum of cross-entropies over the scored tokens."""
    packed = pack(chunk.sequences, model.device)
    positions_S = torch.tensor(chunk.scored, device=model.device)
    scores_SV = token_scores(model, packed, positions_S)
    return cross_entropy(scores_SV, packed.token_ids_T[positions_S + 1], reduction="sum")

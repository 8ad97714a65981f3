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
from transformers import AutoModelForCausalLM

from drama_dist.corpus.collection import open_collection
from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.loop import ResumableLoop, StepReport
from drama_dist.distributed.precision import AUTO, agreed_dtype_name, dtype_of
from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.extractor import SELECTION, shrink
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.language_loss import schedule, share_of_this_rank, token_losses
from drama_dist.prune.masks import LearnedMasks, Masks, folded, masked
from drama_dist.prune.shape import requested_shape, shape_of
from drama_dist.prune.source import calibration, load_source, rotated_if_asked
from drama_dist.prune.source import check as check_prune
from drama_dist.run import interrupts
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import CORPUS
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.settings import Settings, SettingsError

_MODEL = "model"
_RAMP_SHARE = 0.2  # of the steps, after which all is asked for (their scripts/pruning.sh: 640 of 3,200)
_FAR = 0.05


def check(settings: Settings) -> None:
    """Raise SettingsError where there is nothing to learn, or the prune stage could not use it."""
    if not settings.prune.mask_steps:
        raise SettingsError("prune.mask_steps=0: there is nothing to learn; set it to more")
    check_prune(settings)


def learn_masks(run: Run, folder: StageFolder) -> None:
    """Do the stage. Raises as `prune` does."""
    settings, prune, dtype = run.settings, run.settings.prune, agreed_dtype_name(AUTO)
    source, tokenizer = load_source(settings)
    sequences, languages = calibration(tokenizer, open_collection(run.path(CORPUS)).passages, settings)
    source = rotated_if_asked(source, sequences, settings).to(dtype_of(dtype))
    batches = LanguageBatches(sequences, languages)
    batches.measure(source)
    whole = shape_of(source.config)
    rate = prune.mask_learning_rate / prune.heal_learning_rate
    masks = LearnedMasks(whole, requested_shape(prune, source.config), settings.seed, rate)
    module = nn.ModuleDict({"model": source, "masks": masks}).to(ranks.device()).train()
    engine = Engine(module, OptimiserSettings(dtype, 1, weight_decay=0.0, gradient_clipping=1.0))
    drawn: Masks = {}

    def do_step(step: int, learning_rate: float) -> StepReport:
        nonlocal drawn
        began, seed = time.monotonic(), f"{settings.seed} masks {step}"
        chunks = batches.chunks(prune.heal_tokens, prune.heal_scored_share, seed)
        progress = min(1.0, (step + 1) / (_RAMP_SHARE * prune.mask_steps))
        scored = sum(len(chunk.scored) for chunk in chunks)
        share = list(share_of_this_rank(chunks))
        total = torch.zeros((), device=ranks.device())
        for index, (chunk, weight) in enumerate(share):
            drawn = masks.sampled(seed)
            losses_S = token_losses(source, chunk)
            batches.count(chunk, losses_S, weight)
            loss = losses_S.sum() * (weight / scored)
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
            **batches.finish_step(step),
        }
        told = ", ".join(f"{name} {share:.0%}" for name, share in kept.items())
        return StepReport(figures, f"loss {figures['loss']:.3f}, kept: {told}")

    with interrupts.deferred():
        with masked(source, lambda: drawn):
            planned = schedule(prune.mask_steps, prune.heal_learning_rate)
            ResumableLoop(folder, engine, planned, batches).run("masks", do_step)
        weights = engine.full_weights()
        if ranks.rank() == 0:
            module.cpu().float().load_state_dict(weights, strict=False)  # a tied head has no entry of its own
            model, selection = folded(source, masks.final())
            shrink(model, selection).save_pretrained(folder.folder / _MODEL)
            write_text(folder.folder / SELECTION, json.dumps(selection.as_record()) + "\n")
            _tell_unfinished(masks)
        folder.finish(wanted=masks.wanted)


def _tell_unfinished(masks: LearnedMasks) -> None:
    """Say where masks are far from what is wanted: the rest was then cut by what little they had learnt."""
    for name, kept_R in masks.kept_shares().items():
        wanted = masks.wanted[name] / masks.locations[name].shape[1]
        kept = float(max(kept_R.detach(), key=lambda share: abs(share - wanted)))  # in the layer where it is farthest
        if abs(kept - wanted) > _FAR:
            say(f"masks: {kept:.0%} of {name} are open, and {wanted:.0%} stay; more prune.mask_steps bring them nearer")


def masked_model(folder: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The small language model of a finished stage, float32, and what was kept of the large one."""
    model = AutoModelForCausalLM.from_pretrained(folder / _MODEL, dtype=torch.float32, trust_remote_code=False)
    model.config._attn_implementation = attention.NAME
    return model, json.loads((folder / SELECTION).read_text("utf-8"))

"""Healing: continued training of the pruned model as a language model, taught by its source.

Loss = w · KL(source ‖ student) + (1 − w) · cross-entropy, per scored token (Hinton et al. 2015 at
temperature 1). Attention is causal here; it is made bidirectional afterwards.
Shapes: S scored tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy, kl_div

from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.loop import ResumableLoop, StepReport
from drama_dist.distributed.precision import AUTO, agreed_dtype_name
from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import pack
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.language_loss import Chunk, schedule, share_of_this_rank, token_scores
from drama_dist.run.folder import StageFolder
from drama_dist.settings import PruneSettings


def heal(
    folder: StageFolder,
    student: LanguageModel,
    source: LanguageModel,
    batches: LanguageBatches,
    shape: PruneSettings,
    seed: int,
) -> LanguageModel:
    """Train the student in place; returns it in float32.

    Resumes from the folder's checkpoints. Called inside `interrupts.deferred`: see ResumableLoop.run for what a signal
    does.
    """
    dtype = agreed_dtype_name(AUTO)
    engine = Engine(student, OptimiserSettings(dtype, 1, weight_decay=0.0, gradient_clipping=1.0))

    def do_step(step: int, learning_rate: float) -> StepReport:
        began = time.monotonic()
        chunks = batches.chunks(shape.heal_tokens, shape.heal_scored_share, f"{seed} heal {step}")
        loss = _backward(engine, student, source, chunks, batches, shape.heal_kl_weight)
        norm = engine.step(learning_rate)
        tokens = sum(chunk.tokens for chunk in chunks)
        rate = round(tokens / (time.monotonic() - began), 1)
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "tokens_per_second": rate,
            **batches.finish_step(step),
        }
        return StepReport(figures, f"loss {loss:.3f}, {rate:,.0f} tokens/s")

    loop = ResumableLoop(folder, engine, schedule(shape.heal_steps, shape.heal_learning_rate), batches)
    loop.run(f"{folder.name}: heal", do_step)
    student.float().load_state_dict(engine.full_weights(), strict=False)  # a tied head has no entry of its own
    return student


def _backward(
    engine: Engine,
    student: LanguageModel,
    source: LanguageModel,
    chunks: list[Chunk],
    batches: LanguageBatches,
    kl_weight: float,
) -> float:
    """Backpropagate one global step and return its loss; each rank makes equally many calls."""
    scored = sum(len(chunk.scored) for chunk in chunks)
    total = torch.zeros((), device=student.device)
    share = list(share_of_this_rank(chunks))
    for index, (chunk, weight) in enumerate(share):
        loss, losses_S = _chunk_loss(student, source, chunk, kl_weight)
        batches.count(chunk, losses_S, weight)
        loss = loss * (weight / scored)
        total += loss.detach()
        engine.backward(loss, last=index == len(share) - 1)
    return float(ranks.sum_over_ranks(total))


def _chunk_loss(
    student: LanguageModel, source: LanguageModel, chunk: Chunk, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, summed over the scored tokens, and the cross-entropy of each of them (S)."""
    packed = pack(chunk.sequences, student.device)
    positions_S = torch.tensor(chunk.scored, device=student.device)
    scores_SV = token_scores(student, packed, positions_S)
    with torch.no_grad():
        taught_SV = token_scores(source, packed, positions_S).log_softmax(1)
    losses_S = cross_entropy(scores_SV, packed.token_ids_T[positions_S + 1], reduction="none")
    divergence = kl_div(scores_SV.log_softmax(1), taught_SV, reduction="sum", log_target=True)
    return kl_weight * divergence + (1 - kl_weight) * losses_S.sum(), losses_S

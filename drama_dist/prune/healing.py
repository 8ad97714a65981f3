"""Healing: continued training of the pruned model as a language model, taught by its source.

Loss = w · KL(source ‖ student) + (1 − w) · cross-entropy, per scored token (Hinton et al. 2015 at
temperature 1). Attention is causal here; it is made bidirectional afterwards.
Shapes: S scored tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import kl_div, nll_loss

from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.loop import ResumableLoop, StepReport
from drama_dist.distributed.precision import AUTO, agreed_dtype_name
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.language_loss import Chunk, schedule, share_of_this_rank, token_log_probabilities
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
        learnt = _backward(engine, student, source, chunks, batches, shape.heal_kl_weight)
        norm = engine.step(learning_rate)
        tokens = sum(chunk.tokens for chunk in chunks)
        rate = round(tokens / (time.monotonic() - began), 1)
        figures = {
            **learnt,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "tokens_per_second": rate,
            **batches.finish_step(step),
        }
        return StepReport(
            figures, f"loss {learnt['loss']:.3f}, perplexity {learnt['perplexity']:,.1f}, {rate:,.0f} tokens/s"
        )

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
) -> dict[str, float]:
    """Backpropagate one global step; each rank makes equally many calls.

    Returns the loss, and the perplexity of the student and of its source: exp of the mean cross-entropy of the scored
    tokens.
    """
    scored = sum(len(chunk.scored) for chunk in chunks)
    means_3 = torch.zeros(3, device=student.device)
    share = list(share_of_this_rank(chunks))
    for index, (chunk, weight) in enumerate(share):
        loss, losses_S, of_source_S = _chunk_loss(student, source, chunk, kl_weight)
        batches.count(chunk, losses_S, weight)
        loss = loss * (weight / scored)
        means_3 += torch.stack(
            [loss.detach(), *(each.detach().sum() * weight / scored for each in (losses_S, of_source_S))]
        )
        engine.backward(loss, last=index == len(share) - 1)
    loss, of_student, of_source = ranks.sum_over_ranks(means_3)
    return {
        "loss": float(loss),
        "perplexity": float(of_student.double().exp()),
        "source_perplexity": float(of_source.double().exp()),
    }


def _chunk_loss(
    student: LanguageModel, source: LanguageModel, chunk: Chunk, kl_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, summed over the scored tokens, and the cross-entropy of each of them (S), student's and source's."""
    student_SV, targets_S = token_log_probabilities(student, chunk)
    with torch.no_grad():
        source_SV, _ = token_log_probabilities(source, chunk)
    losses_S, of_source_S = (nll_loss(each_SV, targets_S, reduction="none") for each_SV in (student_SV, source_SV))
    divergence = kl_div(student_SV, source_SV, reduction="sum", log_target=True)
    return kl_weight * divergence + (1 - kl_weight) * losses_S.sum(), losses_S, of_source_S

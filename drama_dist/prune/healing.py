"""Healing: continued training of the pruned model as a language model, taught by its source.

Loss = w · KL(source ‖ student) + (1 − w) · cross-entropy, per scored token (Hinton et al. 2015 at
temperature 1). Attention is causal here; it is made bidirectional afterwards.
Shapes: S scored tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, kl_div

from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.loop import ResumableLoop, StepReport
from drama_dist.distributed.precision import AUTO, agreed_dtype_name
from drama_dist.encoder.families import LanguageModel
from drama_dist.encoder.packing import pack
from drama_dist.prune.language_loss import Chunk, schedule, share_of_this_rank, step_chunks, token_scores
from drama_dist.run.folder import StageFolder
from drama_dist.settings import PruneSettings


def heal(
    folder: StageFolder,
    student: LanguageModel,
    source: LanguageModel,
    sequences: Sequence[list[int]],
    shape: PruneSettings,
    seed: int,
) -> LanguageModel:
    """Train the student in place on token id sequences; returns it in float32.

    Resumes from the folder's checkpoints. Called inside `interrupts.deferred`: see ResumableLoop.run for what a signal
    does.
    """
    dtype = agreed_dtype_name(AUTO)
    engine = Engine(student, OptimiserSettings(dtype, 1, weight_decay=0.0, gradient_clipping=1.0))

    def do_step(step: int, learning_rate: float) -> StepReport:
        began = time.monotonic()
        chunks = step_chunks(sequences, shape.heal_tokens, shape.heal_scored_share, f"{seed} heal {step}")
        loss = _backward(engine, student, source, chunks, shape.heal_kl_weight)
        norm = engine.step(learning_rate)
        tokens = sum(chunk.tokens for chunk in chunks)
        rate = round(tokens / (time.monotonic() - began), 1)
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": tokens,
            "tokens_per_second": rate,
        }
        return StepReport(figures, f"loss {loss:.3f}, {rate:,.0f} tokens/s")

    loop = ResumableLoop(folder, engine, schedule(shape.heal_steps, shape.heal_learning_rate))
    loop.run(f"{folder.name}: heal", do_step)
    student.float().load_state_dict(engine.full_weights(), strict=False)  # a tied head has no entry of its own
    return student


def _backward(
    engine: Engine, student: LanguageModel, source: LanguageModel, chunks: list[Chunk], kl_weight: float
) -> float:
    """Backpropagate one global step and return its loss; each rank makes equally many calls."""
    scored = sum(len(chunk.scored) for chunk in chunks)
    total = torch.zeros((), device=student.device)
    share = list(share_of_this_rank(chunks))
    for index, (chunk, weight) in enumerate(share):
        loss = _chunk_loss(student, source, chunk, kl_weight) * (weight / scored)
        total += loss.detach()
        engine.backward(loss, last=index == len(share) - 1)
    return float(ranks.sum_over_ranks(total))


def _chunk_loss(student: LanguageModel, source: LanguageModel, chunk: Chunk, kl_weight: float) -> torch.Tensor:
    """Sum over the scored tokens."""
    packed = pack(chunk.sequences, student.device)
    positions_S = torch.tensor(chunk.scored, device=student.device)
    scores_SV = token_scores(student, packed, positions_S)
    with torch.no_grad():
        taught_SV = token_scores(source, packed, positions_S).log_softmax(1)
    language_model = cross_entropy(scores_SV, packed.token_ids_T[positions_S + 1], reduction="sum")
    divergence = kl_div(scores_SV.log_softmax(1), taught_SV, reduction="sum", log_target=True)
    return kl_weight * divergence + (1 - kl_weight) * language_model

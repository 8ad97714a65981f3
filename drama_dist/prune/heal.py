"""Healing: continued training of the pruned model as a language model, taught by its source.

Loss = w · KL(source ‖ student) + (1 − w) · cross-entropy, per predicted token (Hinton et al. 2015 at
temperature 1). Attention is causal here; it is made bidirectional afterwards.
Shapes: T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaForCausalLM

from drama_dist import ranks
from drama_dist.encoder.packing import Packed, pack
from drama_dist.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.progress import progress_bar
from drama_dist.settings import PruneSettings
from drama_dist.stages import Stage

_CHUNK_TOKENS = 1024  # T × V scores in float32: 200 MB for 49k words
_CHECKPOINT_EVERY = 25


def heal(
    stage: Stage,
    student: LlamaForCausalLM,
    source: LlamaForCausalLM,
    sequences: Sequence[list[int]],
    shape: PruneSettings,
    seed: int,
) -> LlamaForCausalLM:
    """Train the student in place on token id sequences; resumes from the stage's checkpoints; returns it in float32."""
    engine = Engine(student, OptimiserSettings("bfloat16", 1, weight_decay=0.0, gradient_clipping=1.0))
    saved = stage.folder / "checkpoints"
    first = engine.resume(saved)
    stage.forget_metrics_after(first)
    bar = progress_bar(shape.heal_steps, "prune: heal", "steps", done=first)
    for step in range(first, shape.heal_steps):
        began = time.monotonic()
        chunks = _step_chunks(sequences, shape.heal_tokens, seed, step)
        loss = _heal_step(engine, student, source, chunks, shape.heal_kl_weight)
        rate = learning_rate_at(step, shape.heal_steps, shape.heal_learning_rate, warmup_share=0.1)
        norm = engine.step(rate)
        tokens = sum(len(ids) for chunk in chunks for ids in chunk)
        rhythm = round(tokens / (time.monotonic() - began), 1)
        stage.log(
            step=step + 1, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=tokens, tokens_per_second=rhythm
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {rhythm:,.0f} tokens/s", refresh=False)
        bar.update(1)
        if (step + 1) % _CHECKPOINT_EVERY == 0 and step + 1 < shape.heal_steps:
            engine.save(saved, step + 1, keep=1)
    bar.close()
    weights = engine.full_weights()
    student.float().load_state_dict(weights, strict=False)  # a tied head has no entry of its own
    return student


def _step_chunks(sequences: Sequence[list[int]], tokens: int, seed: int, step: int) -> list[list[list[int]]]:
    """This step's sequences in chunks, the same on every rank."""
    order = random.Random(f"{seed} heal {step}").sample(range(len(sequences)), len(sequences))
    chunks: list[list[list[int]]] = [[]]
    for number in order:
        if sum(len(ids) for chunk in chunks for ids in chunk) >= tokens:
            break
        if sum(len(ids) for ids in chunks[-1]) >= _CHUNK_TOKENS:
            chunks.append([])
        chunks[-1].append(sequences[number])
    return chunks


def _heal_step(
    engine: Engine, student: LlamaForCausalLM, source: LlamaForCausalLM, chunks: list[list[list[int]]], kl_weight: float
) -> float:
    """Backpropagate one global step; chunks go round the ranks, each rank making equally many calls."""
    predicted = sum(len(ids) - 1 for chunk in chunks for ids in chunk)
    total = torch.zeros((), device=student.device)
    rounds = list(_rounds(chunks))
    for number, chunk in enumerate(rounds):
        loss = _chunk_loss(student, source, pack(chunk.sequences, student.device), kl_weight)
        loss = loss * (chunk.weight / predicted)
        total += loss.detach()
        engine.backward(loss, last=number == len(rounds) - 1)
    return float(ranks.sum_over_ranks(total))


class _Round:
    """One rank's chunk of a round; weight 0 where a rank repeats one because there are none left."""

    def __init__(self, sequences: list[list[int]], weight: float):
        self.sequences, self.weight = sequences, weight


def _rounds(chunks: list[list[list[int]]]) -> Iterator[_Round]:
    for begin in range(0, len(chunks), ranks.world_size()):
        own = begin + ranks.rank()
        yield _Round(chunks[own], 1.0) if own < len(chunks) else _Round(chunks[0], 0.0)


def _chunk_loss(student: LlamaForCausalLM, source: LlamaForCausalLM, packed: Packed, kl_weight: float) -> torch.Tensor:
    """Sum over predicted tokens."""
    ends = packed.boundaries_B1[1:].long() - 1
    predicts = torch.ones(len(packed.token_ids_T), dtype=torch.bool, device=packed.token_ids_T.device)
    predicts[ends] = False
    targets = packed.token_ids_T.roll(-1)[predicts]
    scores_TV = _scores(student, packed, predicts)
    with torch.no_grad():
        taught_TV = _scores(source, packed, predicts).log_softmax(1)
    language_model = cross_entropy(scores_TV, targets, reduction="sum")
    divergence = kl_div(scores_TV.log_softmax(1), taught_TV, reduction="sum", log_target=True)
    return kl_weight * divergence + (1 - kl_weight) * language_model


def _scores(model: LlamaForCausalLM, packed: Packed, predicts: torch.Tensor) -> torch.Tensor:
    output = model.model(
        input_ids=packed.token_ids_T.unsqueeze(0),
        position_ids=packed.position_ids_T.unsqueeze(0),
        use_cache=False,
        packed=packed,
    )
    scores: torch.Tensor = model.lm_head(output.last_hidden_state[0][predicts]).float()
    return scores

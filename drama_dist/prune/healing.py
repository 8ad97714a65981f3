"""Healing: continued training of the pruned model as a language model, taught by its source.

Loss = w · KL(source ‖ student) + (1 − w) · cross-entropy, per scored token (Hinton et al. 2015 at
temperature 1). Attention is causal here; it is made bidirectional afterwards.
Shapes: T tokens of a chunk, S scored ones, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaForCausalLM

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.distributed.precision import AUTO, agreed_dtype_name
from drama_dist.encoder.packing import Packed, pack
from drama_dist.run import interrupts
from drama_dist.run.folder import CHECKPOINTS, StageFolder
from drama_dist.run.progress import progress_bar
from drama_dist.settings import PruneSettings

_CHUNK_TOKENS = 1024  # T × V scores in float32: 200 MB for 49k words
_CHECKPOINT_EVERY = 25


@interrupts.deferred()
def heal(
    stage: StageFolder,
    student: LlamaForCausalLM,
    source: LlamaForCausalLM,
    sequences: Sequence[list[int]],
    shape: PruneSettings,
    seed: int,
) -> LlamaForCausalLM:
    """Train the student in place on token id sequences; resumes from the stage's checkpoints; returns it in float32.

    Raises interrupts.Stopped after the step in which a signal asked for it, with a checkpoint saved.
    """
    dtype = agreed_dtype_name(AUTO)
    engine = Engine(student, OptimiserSettings(dtype, 1, weight_decay=0.0, gradient_clipping=1.0))
    saved = Checkpoints(stage.folder / CHECKPOINTS, keep=1)
    first = engine.resume(saved)
    stage.forget_metrics_after(first)
    bar = progress_bar(shape.heal_steps, "prune: heal", "steps", done=first)
    for step in range(first, shape.heal_steps):
        began = time.monotonic()
        chunks = _step_chunks(sequences, shape, seed, step)
        loss = _heal_step(engine, student, source, chunks, shape.heal_kl_weight)
        rate = learning_rate_at(step, shape.heal_steps, shape.heal_learning_rate, warmup_share=0.1)
        norm = engine.step(rate)
        tokens = sum(len(ids) for chunk in chunks for ids in chunk.sequences)
        rhythm = round(tokens / (time.monotonic() - began), 1)
        stage.log(
            step=step + 1, loss=loss, learning_rate=rate, gradient_norm=norm, tokens=tokens, tokens_per_second=rhythm
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {rhythm:,.0f} tokens/s", refresh=False)
        bar.update(1)
        stopping = interrupts.wanted()
        if stopping or ((step + 1) % _CHECKPOINT_EVERY == 0 and step + 1 < shape.heal_steps):
            engine.save(saved, step + 1)
        if stopping:
            saved.wait()
            raise interrupts.Stopped(f"{stage.name}: saved after step {step + 1} of healing")
    bar.close()
    saved.wait()
    weights = engine.full_weights()
    student.float().load_state_dict(weights, strict=False)  # a tied head has no entry of its own
    return student


@dataclass(frozen=True)
class _Chunk:
    """Sequences to pack, and the places in the packing, ascending, whose next token is predicted."""

    sequences: list[list[int]]
    scored: list[int]


def _step_chunks(sequences: Sequence[list[int]], shape: PruneSettings, seed: int, step: int) -> list[_Chunk]:
    """This step's chunks, the same on every rank."""
    rng = random.Random(f"{seed} heal {step}")
    chunks: list[list[list[int]]] = [[]]
    for number in rng.sample(range(len(sequences)), len(sequences)):
        if sum(len(ids) for chunk in chunks for ids in chunk) >= shape.heal_tokens:
            break
        if sum(len(ids) for ids in chunks[-1]) >= _CHUNK_TOKENS:
            chunks.append([])
        chunks[-1].append(sequences[number])
    return [_Chunk(chunk, _scored(chunk, shape.heal_scored_share, rng)) for chunk in chunks]


def _scored(sequences: list[list[int]], share: float, rng: random.Random) -> list[int]:
    ends = set(itertools.accumulate(len(ids) for ids in sequences))
    places = [place for place in range(max(ends)) if place + 1 not in ends]
    return sorted(rng.sample(places, max(1, round(share * len(places)))))


def _heal_step(
    engine: Engine, student: LlamaForCausalLM, source: LlamaForCausalLM, chunks: list[_Chunk], kl_weight: float
) -> float:
    """Backpropagate one global step; chunks go round the ranks, each rank making equally many calls."""
    scored = sum(len(chunk.scored) for chunk in chunks)
    total = torch.zeros((), device=student.device)
    own = list(_own_share(chunks))
    for number, (chunk, weight) in enumerate(own):
        loss = _chunk_loss(student, source, chunk, kl_weight) * (weight / scored)
        total += loss.detach()
        engine.backward(loss, last=number == len(own) - 1)
    return float(ranks.sum_over_ranks(total))


def _own_share(chunks: list[_Chunk]) -> Iterator[tuple[_Chunk, float]]:
    """This rank's chunks with weight 1; one with weight 0 where others have one more."""
    for begin in range(0, len(chunks), ranks.world_size()):
        own = begin + ranks.rank()
        yield (chunks[own], 1.0) if own < len(chunks) else (chunks[0], 0.0)


def _chunk_loss(student: LlamaForCausalLM, source: LlamaForCausalLM, chunk: _Chunk, kl_weight: float) -> torch.Tensor:
    """Sum over the scored tokens."""
    packed = pack(chunk.sequences, student.device)
    places = torch.tensor(chunk.scored, device=student.device)
    scores_SV = _scores(student, packed, places)
    with torch.no_grad():
        taught_SV = _scores(source, packed, places).log_softmax(1)
    language_model = cross_entropy(scores_SV, packed.token_ids_T[places + 1], reduction="sum")
    divergence = kl_div(scores_SV.log_softmax(1), taught_SV, reduction="sum", log_target=True)
    return kl_weight * divergence + (1 - kl_weight) * language_model


def _scores(model: LlamaForCausalLM, packed: Packed, places: torch.Tensor) -> torch.Tensor:
    output = model.model(
        input_ids=packed.token_ids_T.unsqueeze(0),
        position_ids=packed.position_ids_T.unsqueeze(0),
        use_cache=False,
        packed=packed,
    )
    scores: torch.Tensor = model.lm_head(output.last_hidden_state[0][places]).float()
    return scores

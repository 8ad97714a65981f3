"""A program for several ranks: ten training steps in every combination asked for; rank 0 writes what came of each.

torchrun tests/train/rank_steps.py MODEL OUT NAME ...; NAME is zero-travels-kept|twice-checkpointed|plain, for
example 3-queries-twice-plain; with +save it ends with a checkpoint after SAVED steps, with +resume it goes on from
that. The name "traffic" is the objective alone. Started by test_ranks.py, which says what must come out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import contrastive_objective

STEPS, SAVED, QUERIES, CHUNK, BUDGET = 10, 4, 7, 40, 200_000
TRAFFIC = {"queries": 24, "negatives": 7, "dims": [768, 512, 256]}
DECAY, CLIPPING, RATE, TEMPERATURE = 0.1, 0.5, 1e-3, 0.1
WORDS = ["the", "river", "has", "water", "flow", "oil", "and", "a", "valve", "spark", "basis", "pivot", "rain", "lake"]


def contract(hidden: int) -> EncoderSettings:
    return EncoderSettings(max_query_tokens=16, max_passage_tokens=48, dims=[hidden, hidden // 3])


def texts(step: int) -> tuple[list[str], list[str], list[int], list[int]]:
    """Queries, passages (hard negatives among them), the positives' places, and ids, equal for equal texts.

    Seven queries and an odd number of passages: ranks have different numbers of both. Some queries share a positive,
    and a passage comes twice under two places.
    """
    generator = torch.Generator().manual_seed(step)

    def some(most: int) -> str:
        count = int(torch.randint(1, most, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))

    passages = [some(30) for _ in range(3 * QUERIES - 2)]
    passages[4] = passages[1]
    positives = torch.randperm(2 * QUERIES, generator=generator)[:QUERIES].tolist()
    positives[3] = positives[0]
    first: dict[str, int] = {}
    ids = [first.setdefault(passage, place) for place, passage in enumerate(passages)]
    return [some(8) for _ in range(QUERIES)], passages, positives, ids


def rate(step: int) -> float:
    return learning_rate_at(step, STEPS, RATE, 0.2)


def step_losses(
    encoder: Encoder, engine: Engine, cache: GradCache, settings: TrainSettings, steps: range
) -> dict[str, list[float]]:
    losses, norms = [], []
    for step in steps:
        queries, passages, positives, ids = texts(step)
        mine, also = ranks.rank_slice(len(queries)), ranks.rank_slice(len(passages))
        sequences = encoder.tokenize_queries([queries[i] for i in mine])
        sequences += encoder.tokenize_passages([passages[i] for i in also])
        embeddings = cache.encode(sequences).embeddings_NK
        objective = contrastive_objective(
            embeddings[: len(mine)],
            embeddings[len(mine) :],
            torch.tensor(positives, device=encoder.device),
            torch.tensor(ids, device=encoder.device),
            encoder.contract,
            settings,
        )
        cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
        norms.append(engine.step(rate(step)))
        losses.append(objective.loss)
    return {"losses": losses, "norms": norms}


def run(model: str, out: Path, full_name: str) -> dict[str, object]:
    name, _, what = full_name.partition("+")
    zero, travels, kept, layers = name.split("-")
    encoder = load(model)
    encoder.contract = contract(encoder.hidden_size)
    encoder.train()
    if layers == "checkpointed":
        encoder.checkpoint_layers()
    engine = Engine(encoder, OptimiserSettings("float32", int(zero), DECAY, CLIPPING))
    if os.environ.get("DRAMA_TEST_UNSCALED"):
        unscaled = engine.backward
        engine.backward = lambda loss, last: unscaled(loss / ranks.world_size(), last)  # type: ignore[method-assign]
    cache = GradCache(encoder, engine, CHUNK, BUDGET if kept == "kept" else 0.0)
    saved = Checkpoints(out / "checkpoints", keep=1)
    steps = range(engine.resume(saved) if what == "resume" else 0, SAVED if what == "save" else STEPS)
    figures = step_losses(encoder, engine, cache, TrainSettings(temperature=TEMPERATURE, travels=travels), steps)
    if what == "save":
        engine.save(saved, SAVED)
        saved.wait()
    return {**figures, "weights": engine.full_weights()}


def traffic() -> dict[str, dict[str, int]]:
    """Bytes that rank 0 sends for one loss, by partition and kind."""
    dims, queries = TRAFFIC["dims"], TRAFFIC["queries"]
    passages = queries * (1 + TRAFFIC["negatives"])
    found = {}
    for travels in ("passages", "queries"):
        rows, columns = len(ranks.rank_slice(queries)), len(ranks.rank_slice(passages))
        ranks.take_traffic()
        contrastive_objective(
            torch.randn(rows, dims[0]),
            torch.randn(columns, dims[0]),
            torch.arange(queries),
            torch.arange(passages),
            EncoderSettings(dims=dims),
            TrainSettings(travels=travels),
        )
        found[travels] = ranks.take_traffic()
    return found


def main() -> None:
    model, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks.start()
    for name in names:
        found = traffic() if name == "traffic" else run(model, Path(out), name)
        if ranks.rank() == 0:
            torch.save(found, Path(out) / f"{name}.pt")
    ranks.stop()
    ranks.end(0)


if __name__ == "__main__":
    main()

"""A program for several ranks: ten training steps in every combination asked for; rank 0 writes what came of each.

torchrun tests/train/rank_steps.py MODEL OUT NAME ...; NAME is zero-partition-kept|twice-plain|checkpointed, for
example 3-queries-twice-plain, and what else of +bfloat16, +positives (examples with three positives each), +regression
(the same examples and a linear head, with targets), +one-passage (of each batch, for regression alone, with a learning
rate of the token embeddings' own), +unscaled (a fault: gradients are averaged over ranks), +save (ends
with a checkpoint after SAVED steps) and +resume (goes on from that). The name "traffic" is the objective alone. Started
by test_ranks.py, which says what must come out.
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import normalize

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import learning_rate_at
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.head import LinearHead
from drama_dist.records import Example, Passage
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.batches import TextBatch, batches, texts_of, with_share_of_passages
from drama_dist.train.objective import Objective, objective_terms
from drama_dist.train.step import TrainingStep
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.term import EmbeddedBatch, Relevance

STEPS, SAVED, QUERIES, CHUNK, BUDGET = 10, 4, 7, 40, 200_000
TRAFFIC = {"queries": 24, "negatives": 7, "dims": [768, 512, 256]}
DECAY, CLIPPING, RATE, TEMPERATURE = 0.1, 0.5, 1e-3, 0.1
HEAD, REGRESSION = 20, 3.0
WORDS = ["the", "river", "has", "water", "flow", "oil", "and", "a", "valve", "spark", "basis", "pivot", "rain", "lake"]


def contract(hidden: int) -> EncoderSettings:
    return EncoderSettings(max_query_tokens=16, max_passage_tokens=48, dims=[hidden, hidden // 3])


def sentence(most: int, generator: torch.Generator) -> str:
    count = int(torch.randint(1, most, (), generator=generator))
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (count,), generator=generator))


def batch_of(step: int) -> TextBatch:
    """Seven queries and an odd number of passages, hard negatives among them: ranks have different numbers of both.

    Some queries share a positive, and a passage comes twice, in two columns.
    """
    generator = torch.Generator().manual_seed(step)
    passages = [sentence(30, generator) for _ in range(3 * QUERIES - 2)]
    passages[4] = passages[1]
    positives = torch.randperm(2 * QUERIES, generator=generator)[:QUERIES].tolist()
    positives[3] = positives[0]
    first: dict[str, int] = {}
    ids = [first.setdefault(passage, column) for column, passage in enumerate(passages)]
    relevance = Relevance(torch.tensor(positives), torch.tensor(ids))
    queries = [sentence(8, generator) for _ in range(QUERIES)]
    return TextBatch(queries, passages, relevance, list(range(QUERIES)), list(range(len(passages))))


def passages_of_examples() -> list[Passage]:
    """Every fourth has the text of the one before under an id of its own."""
    generator = torch.Generator().manual_seed(0)
    texts = [sentence(30, generator) for _ in range(20)]
    texts[3::4] = texts[2::4]
    return [Passage(f"p{index}", text) for index, text in enumerate(texts)]


def examples() -> list[Example]:
    """Three positives each, which other queries have too; hard negatives are positives of others."""
    generator, count = torch.Generator().manual_seed(1), len(passages_of_examples())
    return [
        Example(
            f"{index} {sentence(8, generator)}",
            tuple(f"p{(index + offset) % count}" for offset in (0, 1, 2)),
            tuple(f"p{(index + offset) % count}" for offset in (5, 6, 9)),
            "labelled",
        )
        for index in range(count)
    ]


def batches_of_examples(steps: int) -> list[TextBatch]:
    table = PassageTable(Dataset.from_list([vars(passage) for passage in passages_of_examples()]))
    return [texts_of(batch, table) for batch in islice(batches(examples(), QUERIES, 1, seed=1), steps)]


class Rows:
    """Vectors in memory, read as EmbeddingShards are."""

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    def rows(self, positions: list[int]) -> np.ndarray:
        return self.vectors[positions]

    def __len__(self) -> int:
        return len(self.vectors)


def targets() -> VectorTargets:
    """Of the examples' queries and passages."""
    generator, sizes = torch.Generator().manual_seed(5), (len(examples()), len(passages_of_examples()))
    drawn = [normalize(torch.randn(size, HEAD, generator=generator)).numpy() for size in sizes]
    return VectorTargets(*map(Rows, drawn))  # type: ignore[arg-type]


def add_head(encoder: Encoder) -> None:
    """A linear head, the same at every call, and dims that fit it."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        encoder.head = LinearHead(encoder.hidden_size, HEAD)
    encoder.contract = contract(HEAD)


def rate(step: int) -> float:
    return learning_rate_at(step, STEPS, RATE, 0.2)


def settings_of(name: str, dtype: str, regression: float = 0.0, one_passage: bool = False) -> TrainSettings:
    zero, partition, kept, layers = name.split("-")
    return TrainSettings(
        dtype=dtype,
        info_nce_weight=0 if one_passage else 1,
        regression_weight=regression,
        embedding_rate=8 if one_passage else 1,
        zero_stage=int(zero),
        weight_decay=DECAY,
        gradient_clipping=CLIPPING,
        temperature=TEMPERATURE,
        loss_partition=partition,
        chunk_tokens=CHUNK,
        activation_budget=BUDGET / 2**30 if kept == "kept" else 0,
        checkpoint_layers=layers == "checkpointed",
    )


def run(model: Path, out: Path, full_name: str) -> dict[str, object]:
    """Losses and gradient norms of the steps, and the weights at their end."""
    name, *extras = full_name.split("+")
    encoder = load(model)
    encoder.contract = contract(encoder.hidden_size)
    regression, one_passage = "regression" in extras, "one-passage" in extras
    if regression:
        add_head(encoder)
    settings = settings_of(
        name, "bfloat16" if "bfloat16" in extras else "float32", REGRESSION * regression, one_passage
    )
    training_step = TrainingStep(encoder, settings, vectors=targets() if regression else None)
    if "unscaled" in extras:
        scaled = training_step.engine.backward
        training_step.engine.backward = lambda loss, last: scaled(loss / ranks.world_size(), last)  # type: ignore[method-assign]
    saved = Checkpoints(out / "checkpoints", keep=1)
    first = training_step.engine.resume(saved)["step"] if "resume" in extras else 0
    steps = range(first, SAVED if "save" in extras else STEPS)
    of_examples = regression or "positives" in extras
    texts = batches_of_examples(STEPS) if of_examples else [batch_of(step) for step in range(STEPS)]
    if one_passage:
        texts = [with_share_of_passages(batch, 0.01) for batch in texts]
    results = [training_step(texts[step], rate(step)) for step in steps]
    if "save" in extras:
        training_step.engine.save(saved, SAVED)
        saved.wait()
    return {
        "losses": [result.objective.loss for result in results],
        "figures": [result.objective.figures for result in results],
        "norms": [result.gradient_norm for result in results],
        "weights": training_step.engine.full_weights(),
    }


def traffic() -> dict[str, dict[str, int]]:
    """Bytes that rank 0 sends for one loss, by partition and kind."""
    dims, queries = TRAFFIC["dims"], TRAFFIC["queries"]
    passages = queries * (1 + TRAFFIC["negatives"])
    sent = {}
    for partition in ("passages", "queries"):
        rows, columns = len(ranks.rank_slice(queries)), len(ranks.rank_slice(passages))
        objective = Objective(objective_terms(EncoderSettings(dims=dims), TrainSettings(loss_partition=partition)))
        ranks.take_traffic()
        relevance = Relevance(torch.arange(queries), torch.arange(passages))
        objective(EmbeddedBatch(torch.randn(rows, dims[0]), torch.randn(columns, dims[0]), relevance))
        sent[partition] = ranks.take_traffic()
    return sent


def main() -> None:
    model, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    ranks.start()
    for name in names:
        result = traffic() if name == "traffic" else run(Path(model), Path(out), name)
        if ranks.rank() == 0:
            torch.save(result, Path(out) / f"{name}.pt")
    ranks.stop()
    ranks.end(0)


if __name__ == "__main__":
    main()

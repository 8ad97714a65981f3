"""Training teaches pairs that were not among the examples, and more from a pretrained start than from a random one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drama_dist.corpus.collection import PassageTable
from drama_dist.encoder.backbone import Encoder, load, random_twin
from drama_dist.records import Example, Passage
from drama_dist.run.folder import open_stage
from drama_dist.settings import Settings
from drama_dist.train.loop import train_encoder

# Queries and passages share no word, and the tested pairs of words are not among the examples.
COLOURS = {"red": "ruby", "blue": "sky", "green": "moss", "white": "chalk", "black": "coal", "pink": "rose"}
ANIMALS = {"dog": "hound", "cat": "puss", "horse": "mare", "pig": "swine", "cow": "heifer", "sheep": "lamb"}
PAIRS = list(itertools.product(COLOURS, ANIMALS))
TESTED = PAIRS[::5]
EXAMPLES = [Example(f"{c} {a}", (f"{c} {a}",), (), "labelled") for c, a in PAIRS if (c, a) not in TESTED]


def mean_reciprocal_rank(encoder: Encoder) -> float:
    """Of the tested queries' passages among all."""
    passages = encoder.encode_passages([f"{COLOURS[colour]} and {ANIMALS[animal]}" for colour, animal in PAIRS])
    queries = encoder.encode_queries([f"{colour} {animal}" for colour, animal in TESTED])
    scores = queries @ passages.T
    answer = scores[np.arange(len(TESTED)), [PAIRS.index(pair) for pair in TESTED]]
    return float(np.mean(1 / (scores >= answer[:, None]).sum(1)))


Train = Callable[[Encoder, list[Example], int], Encoder]


@pytest.fixture
def train(small_settings: Callable[..., Settings], tmp_path: Path) -> Train:
    """Train an encoder on examples for so many steps."""
    passages = [Passage(f"{c} {a}", f"{COLOURS[c]} and {ANIMALS[a]}") for c, a in PAIRS]
    PassageTable.write(tmp_path / "passages", passages)
    runs = itertools.count()

    def trained(start: Encoder, examples: list[Example], steps: int) -> Encoder:
        changes = (f"train.steps={steps}", "train.learning_rate=3e-3", "train.hard_negatives=0")
        settings = small_settings(*changes, "train.tensorboard=false")
        folder = open_stage(tmp_path / f"run{next(runs)}", "train", {}, {})
        train_encoder(settings, folder, start, examples, PassageTable.open(tmp_path / "passages"))
        return load(folder.folder, contract=settings.encoder)

    return trained


@pytest.fixture
def start(llm: Path, small_settings: Callable[..., Settings]) -> Encoder:
    return random_twin(load(llm, contract=small_settings().encoder), seed=1)


def test_training_a_random_encoder_teaches_pairs_it_has_not_seen(start: Encoder, train: Train) -> None:
    before, after = mean_reciprocal_rank(start), mean_reciprocal_rank(train(start, EXAMPLES, 60))
    assert before <= 0.3 and after >= 0.5, (before, after)


def test_a_pretrained_model_beats_its_random_twins_trained_alike(start: Encoder, train: Train) -> None:
    """Of which there are several: one draw of weights may have luck with seven queries."""
    pretrained = train(start, EXAMPLES, 60)
    twins = [random_twin(pretrained, seed) for seed in (11, 12, 13, 14)]
    rank, *of_twins = (mean_reciprocal_rank(train(encoder, EXAMPLES, 5)) for encoder in (pretrained, *twins))
    assert rank >= np.mean(of_twins) + 0.2, (rank, of_twins)

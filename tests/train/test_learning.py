"""Training teaches: a trained encoder finds what its random twin does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

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


def share_found_first(encoder: Encoder) -> float:
    """Of the tested queries, those whose passage is the first of all."""
    passages = encoder.encode_passages([f"{COLOURS[colour]} and {ANIMALS[animal]}" for colour, animal in PAIRS])
    queries = encoder.encode_queries([f"{colour} {animal}" for colour, animal in TESTED])
    return float(np.mean((queries @ passages.T).argmax(1) == [PAIRS.index(pair) for pair in TESTED]))


def test_a_trained_model_beats_its_random_twin(
    llm: Path, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = small_settings(
        "train.steps=60", "train.learning_rate=3e-3", "train.hard_negatives=0", "train.tensorboard=false"
    )
    passages = [Passage(f"{c} {a}", f"{COLOURS[c]} and {ANIMALS[a]}") for c, a in PAIRS]
    PassageTable.write(tmp_path / "passages", passages)
    examples = [Example(f"{c} {a}", (f"{c} {a}",), (), "labelled") for c, a in PAIRS if (c, a) not in TESTED]
    twin = random_twin(load(llm, contract=settings.encoder), seed=1)
    before = share_found_first(twin)
    folder = open_stage(settings.run, "train", {}, {})
    train_encoder(settings, folder, twin, examples, PassageTable.open(tmp_path / "passages"))
    after = share_found_first(load(folder.folder))
    assert before <= 0.15 and after >= 0.35, (before, after)

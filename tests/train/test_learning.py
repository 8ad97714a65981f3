"""Training teaches: the trained encoder finds what its random twin does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from drama_dist.encoder.backbone import load, random_twin
from drama_dist.run.runner import make
from drama_dist.settings import Settings


def test_a_trained_model_beats_its_random_twin(small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    quick = ["augment.synthetic_queries=0", "prune.heal_steps=0", "train.learning_rate=2e-3", "train.steps=40"]
    settings = small_settings(*quick, "augment.crops_per_passage=3", f"evaluate.systems=[drama,model:{tmp_path}/twin]")
    random_twin(load(make(settings, "prune")), seed=2).save(tmp_path / "twin")
    rows = json.loads((make(settings, "evaluate") / "results.json").read_text("utf-8"))
    ndcg = {row["system"]: row["ndcg@10"] for row in rows if row["dim"] == 32}
    assert ndcg["drama"] > ndcg["twin"] + 0.1, ndcg

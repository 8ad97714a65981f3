"""Cropped sentences as queries (arXiv 2502.18460, section 3.2): no LLM is needed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from drama_dist.augment.written import Written
from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.split import random_crop
from drama_dist.settings import AugmentSettings


def crops(table: PassageTable, choice: AugmentSettings, seed: int) -> Iterator[Written]:
    """Up to `crops_per_passage` different crops of every passage, in order of the corpus."""
    for position in range(len(table)):
        passage = table[position]
        rng = random.Random(f"{seed} crop {passage.id}")
        drawn = [
            random_crop(passage.text, passage.language, rng, choice.min_crop_words, choice.max_crop_words)
            for _ in range(choice.crops_per_passage)
        ]
        for crop in dict.fromkeys(text for text in drawn if text):
            yield Written(crop, passage.id, "crop", passage.language, {"passage": passage.id, "seed": seed})

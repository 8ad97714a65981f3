"""Cropped sentences as queries (arXiv 2502.18460, section 3.2); needs no LLM."""

from __future__ import annotations

import random
from collections.abc import Iterator

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.split import random_crop
from drama_dist.settings import AugmentSettings


def crops(table: PassageTable, augment: AugmentSettings, seed: int) -> Iterator[WrittenQuery]:
    """Up to `crops_per_passage` distinct crops of every passage, in order of the corpus."""
    for position in range(len(table)):
        passage = table[position]
        rng = random.Random(f"{seed} crop {passage.id}")
        drawn = [
            random_crop(passage.text, passage.language, rng, augment.min_crop_words, augment.max_crop_words)
            for _ in range(augment.crops_per_passage)
        ]
        for crop in dict.fromkeys(text for text in drawn if text):
            yield WrittenQuery(crop, passage.id, "crop", passage.language, {"passage": passage.id, "seed": seed})

"""How the target space is fitted: the teacher's share is one of scores, and what all its vectors share is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array

from drama_dist.encoder.pooling import unit_rows
from drama_dist.search.shards import EmbeddingShards, write_shard
from drama_dist.search.target_space import TargetSpace
from drama_dist.settings import Settings
from drama_dist.train.target_fit import Words, common_means, deviation, fit_target_space, share_of_products

QUERIES, PASSAGES, T, V = 90, 70, 12, 50


def vectors(count: int, seed: int, common: float = 0.0) -> np.ndarray:
    """common: the length of what is added to each vector, of length 1 before; the other kind has another direction."""
    rows = np.random.default_rng(seed).standard_normal((count, T)).astype(np.float32)
    rows[:, :2] = 0
    direction = np.zeros(T, dtype=np.float32)
    direction[:2] = (0.8, 0.6) if seed % 2 else (1, 0)
    return unit_rows(unit_rows(rows) + np.float32(common) * direction)


def words(count: int, seed: int) -> csr_matrix:
    return csr_matrix(random_array((count, V), density=0.2, rng=np.random.default_rng(seed), dtype=np.float32))


def fitted(folder: Path, common: float, settings: Settings) -> tuple[TargetSpace, np.ndarray]:
    """The space, and the scores of all queries and passages by their targets."""
    teachers, counts = (
        [vectors(QUERIES, 1, common), vectors(PASSAGES, 2, common)],
        [words(QUERIES, 3), words(PASSAGES, 4)],
    )
    kinds: list[tuple[EmbeddingShards, Words | None]] = []
    for name, teacher, of_texts in zip(("queries", "passages"), teachers, counts, strict=True):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name, 0, teacher)
        kinds.append((EmbeddingShards(folder / name), of_texts.__getitem__))
    space = fit_target_space(settings, counts[1], kinds)
    queries = space.targets("query", teachers[0], counts[0])
    return space, queries @ space.targets("passage", teachers[1], counts[1]).T


@pytest.fixture
def settings(small_settings: Callable[..., Settings]) -> Settings:
    return small_settings(f"encoder.dims=[{T + 20}]", "targets.lexical_components=20")


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_share_is_one_of_scores_deviations(share: float, tmp_path: Path, settings: Settings) -> None:
    settings.targets.teacher_share = share
    space, scores = fitted(tmp_path, 0.0, settings)
    assert space.words_VL is not None
    of_words = unit_rows(words(QUERIES, 3) @ space.words_VL) @ unit_rows(words(PASSAGES, 4) @ space.words_VL).T
    of_teacher = vectors(QUERIES, 1) @ vectors(PASSAGES, 2).T
    np.testing.assert_allclose(
        scores, space.teacher_share * of_teacher + (1 - space.teacher_share) * of_words, atol=1e-5
    )
    teacher, lexical = (np.sqrt((each.astype(np.float64).std(1) ** 2).mean()) for each in (of_teacher, of_words))
    teacher, lexical = teacher * space.teacher_share, lexical * (1 - space.teacher_share)
    assert teacher / (teacher + lexical) == pytest.approx(share, abs=1e-4)
    assert abs(space.teacher_share - share) > 0.02


def test_a_teacher_whose_vectors_are_alike_gives_nearly_the_targets_of_one_whose_are_not(
    tmp_path: Path, settings: Settings
) -> None:
    free, expected = fitted(tmp_path / "free", 0.0, settings)
    narrow, found = fitted(tmp_path / "narrow", 3.0, settings)
    assert not free.means_2T.any() and np.linalg.norm(narrow.means_2T, axis=1) == pytest.approx(0.95, abs=0.02)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98  # not 1: a few texts have a mean by chance
    assert found.std() == pytest.approx(expected.std(), rel=0.05)
    raw = vectors(QUERIES, 1, 3.0) @ vectors(PASSAGES, 2, 3.0).T
    assert raw.std() < 0.2 * (vectors(QUERIES, 1) @ vectors(PASSAGES, 2).T).std()


def test_means_are_left_out_where_cosines_are_above_a_half() -> None:
    for common in (0.0, 0.9, 1.5, 3.0):
        queries, passages = vectors(QUERIES, 1, common), vectors(PASSAGES, 2, common)
        above = float((queries @ passages.T).mean()) > 0.5
        assert above == (common > 1)
        expected = np.stack([queries.mean(0), passages.mean(0)]) * above
        np.testing.assert_allclose(common_means(queries, passages), expected, atol=1e-6)


def test_a_part_that_says_nothing_leaves_the_share() -> None:
    alike = np.tile(vectors(1, 1), (PASSAGES, 1))
    assert deviation(vectors(QUERIES, 1), alike) == 0
    assert share_of_products(0.8, 0.0, 0.1) == share_of_products(0.8, 0.1, 0.0) == 0.8
    assert share_of_products(0.8, 0.1, 0.1) == pytest.approx(0.8)
    assert share_of_products(1.0, 0.2, 0.1) == 1.0 and share_of_products(0.0, 0.2, 0.1) == 0.0

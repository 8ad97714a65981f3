"""How the target space is fitted: the teacher's share is one of scores, and means that are long are taken off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array

from drama_dist.encoder.pooling import unit_rows
from drama_dist.search.shards import EmbeddingShards, write_shard
from drama_dist.search.target_space import TargetSpace
from drama_dist.settings import Settings
from drama_dist.train.target_fit import Texts, common_means, deviation, fit_target_space, weight_of_teacher

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


def fitted(
    settings: Settings, teachers: Sequence[np.ndarray], counts: Sequence[csr_matrix], folder: Path
) -> tuple[TargetSpace, np.ndarray]:
    """The space, and the scores of all queries and passages by their targets."""
    texts = []
    for name, teacher, of_texts in zip(("queries", "passages"), teachers, counts, strict=True):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name, 0, teacher)
        texts.append(Texts(EmbeddingShards(folder / name), of_texts.__getitem__))
    space = fit_target_space(settings, counts[1], *texts)
    queries = space.targets("query", teachers[0], counts[0])
    return space, queries @ space.targets("passage", teachers[1], counts[1]).T


@pytest.fixture
def read(small_settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """Settings, with overrides."""

    def with_components(*overrides: str) -> Settings:
        return small_settings(f"encoder.dims=[{T + 20}]", "targets.lexical_components=20", *overrides)

    return with_components


def spread(scores: np.ndarray) -> float:
    return float(np.sqrt(np.square(scores.astype(np.float64).std(1)).mean()))


@pytest.mark.parametrize(("share", "without_words"), [(0.2, 0), (0.8, 0), (0.8, 60)])
def test_the_share_is_one_of_scores_deviations(
    share: float, without_words: int, tmp_path: Path, read: Callable[..., Settings]
) -> None:
    """Queries without a known word do not make BM25 heavier for the others."""
    teachers = [vectors(QUERIES, 1), vectors(PASSAGES, 2)]
    rows = words(QUERIES, 3).toarray()
    rows[:without_words] = 0
    counts = [csr_matrix(rows), words(PASSAGES, 4)]
    space, scores = fitted(read(f"targets.teacher_share={share}"), teachers, counts, tmp_path)
    assert space.words_VL is not None
    of_words = (unit_rows(counts[0] @ space.words_VL) @ unit_rows(counts[1] @ space.words_VL).T)[without_words:]
    of_teacher = teachers[0] @ teachers[1].T
    mix = space.teacher_weight * of_teacher[without_words:] + (1 - space.teacher_weight) * of_words
    np.testing.assert_allclose(scores[without_words:], mix, atol=1e-5)
    teacher, lexical = space.teacher_weight * spread(of_teacher), (1 - space.teacher_weight) * spread(of_words)
    assert teacher / (teacher + lexical) == pytest.approx(share, abs=1e-4)
    assert abs(space.teacher_weight - share) > 0.02


def test_a_teacher_whose_vectors_are_alike_gives_nearly_the_targets_of_one_whose_are_not(
    tmp_path: Path, read: Callable[..., Settings]
) -> None:
    counts = [words(QUERIES, 3), words(PASSAGES, 4)]
    wide, narrow = ([vectors(QUERIES, 1, common), vectors(PASSAGES, 2, common)] for common in (0.0, 3.0))
    of_wide, expected = fitted(read(), wide, counts, tmp_path / "wide")
    of_narrow, found = fitted(read(), narrow, counts, tmp_path / "narrow")
    assert of_wide.means_2T is None and of_narrow.means_2T is not None
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98  # not 1: the mean of few wide vectors is not zero
    assert found.std() == pytest.approx(expected.std(), rel=0.05)
    assert (narrow[0] @ narrow[1].T).std() < 0.2 * (wide[0] @ wide[1].T).std()


def test_means_are_taken_off_where_cosines_are_above_a_half() -> None:
    for common in (0.0, 0.9, 1.5, 3.0):
        queries, passages = vectors(QUERIES, 1, common), vectors(PASSAGES, 2, common)
        above = float((queries @ passages.T).mean()) > 0.5
        assert above == (common > 1)
        means = common_means(queries, passages)
        if above:
            np.testing.assert_allclose(means, [queries.mean(0), passages.mean(0)], atol=1e-6)
        else:
            assert means is None


def test_vectors_that_are_all_the_same_stay(tmp_path: Path, read: Callable[..., Settings]) -> None:
    """Without their mean they would be rounding, or nothing."""
    queries, passage = vectors(QUERIES, 1, 3.0), vectors(1, 2, 3.0)
    noise = np.random.default_rng(0).standard_normal((PASSAGES, T)).astype(np.float32) * np.float32(1e-7)
    assert common_means(queries, passage) is common_means(queries, unit_rows(passage + noise)) is None
    settings, counts = read("encoder.dims=[8]", "targets.teacher_share=1"), [words(QUERIES, 3), words(1, 4)]
    space, scores = fitted(settings, [queries, passage], counts, tmp_path)
    assert space.means_2T is None and (scores > 0.5).all()


@pytest.mark.parametrize(
    ("override", "weight", "means"),
    [
        ("targets.teacher_share=0", 0, False),
        ("targets.teacher_share=1", 1, True),
        ("targets.lexical_components=0", 0.8, True),
    ],
)
def test_one_part_alone(
    override: str, weight: float, means: bool, tmp_path: Path, read: Callable[..., Settings]
) -> None:
    teachers, counts = [vectors(QUERIES, 1, 3.0), vectors(PASSAGES, 2, 3.0)], [words(QUERIES, 3), words(PASSAGES, 4)]
    space, scores = fitted(read("encoder.dims=[10]", override), teachers, counts, tmp_path)
    assert space.teacher_weight == weight and (space.means_2T is not None) == means
    assert np.isfinite(scores).all() and scores.std() > 0.05


def test_a_part_that_says_nothing_leaves_the_share() -> None:
    alike = np.tile(vectors(1, 1), (PASSAGES, 1))
    assert deviation(vectors(QUERIES, 1), alike) == 0
    assert weight_of_teacher(0.8, 0.0, 0.1) == weight_of_teacher(0.8, 0.1, 0.0) == 0.8
    assert weight_of_teacher(0.8, 0.1, 0.1) == pytest.approx(0.8)
    assert weight_of_teacher(1.0, 0.2, 0.1) == 1.0 and weight_of_teacher(0.0, 0.2, 0.1) == 0.0

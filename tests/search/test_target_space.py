"""The target space: dot products are the mix of the teacher's and BM25's, prefixes are the best of their size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array

from drama_dist.search.target_space import KINDS, TargetSpace, joined_parts, lexical_part, principal_axes, word_vectors

T, V, SHARE = 6, 40, 0.6


def texts(count: int, seed: int) -> tuple[np.ndarray, csr_matrix]:
    chance = np.random.default_rng(seed)
    teacher = chance.standard_normal((count, T)).astype(np.float32)
    words = csr_matrix(random_array((count, V), density=0.2, rng=chance, dtype=np.float32))
    return teacher / np.linalg.norm(teacher, axis=1, keepdims=True), words


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def space_of(components: int, lexical: int) -> TargetSpace:
    teacher, words = texts(50, 0)
    basis = word_vectors(words, lexical, seed=1)
    parts = joined_parts(SHARE, teacher, lexical_part(words, basis))
    return TargetSpace(SHARE, None, basis, principal_axes(parts.T @ parts, components, lexical))


def test_dot_products_are_the_mix_of_both() -> None:
    (queries, counts), (passages, weights) = texts(9, 1), texts(11, 2)
    space = space_of(T + V - 1, V - 1)
    basis = space.words_VL
    assert basis is not None and basis.shape == (V, V - 1)
    mix = SHARE * queries @ passages.T + (1 - SHARE) * unit(counts @ basis) @ unit(weights @ basis).T
    found = space.targets("query", queries, counts) @ space.targets("passage", passages, weights).T
    np.testing.assert_allclose(found, mix, atol=1e-5)
    assert np.abs(found - queries @ passages.T).max() > 0.05


def test_each_kind_is_taken_without_its_own_mean() -> None:
    (queries, counts), (passages, weights) = texts(9, 1), texts(11, 2)
    means = np.stack([np.full(T, 0.3), np.linspace(-1, 1, T)]).astype(np.float32)
    space = replace(space_of(T + V - 1, V - 1), means_2T=means)
    basis = space.words_VL
    assert basis is not None
    lexical = unit(counts @ basis) @ unit(weights @ basis).T
    mix = SHARE * unit(queries - means[0]) @ unit(passages - means[1]).T + (1 - SHARE) * lexical
    found = space.targets("query", queries, counts) @ space.targets("passage", passages, weights).T
    np.testing.assert_allclose(found, mix, atol=1e-5)
    swapped = space.targets("passage", queries, counts) @ space.targets("query", passages, weights).T
    assert np.abs(swapped - mix).max() > 0.05


def test_with_all_singular_vectors_the_lexical_part_is_the_cosine_of_words() -> None:
    """Of a matrix with fewer rows than words, whose rows the vectors span but for one."""
    words = texts(20, 3)[1]
    basis = word_vectors(words, 1000, seed=1)
    assert basis.shape == (V, 19)
    exact = np.linalg.svd(words.toarray())[2][:19].T
    np.testing.assert_allclose(np.abs((basis * exact).sum(0)), 1, atol=1e-4)


def test_prefixes_keep_the_most_of_the_targets() -> None:
    teacher, words = texts(50, 0)
    space = space_of(10, 12)
    assert space.words_VL is not None
    rows = joined_parts(SHARE, teacher, lexical_part(words, space.words_VL))
    kept = np.square(rows @ space.axes_JK).sum(0)
    assert (np.diff(kept) <= 1e-4).all()
    assert kept.sum() == pytest.approx(np.linalg.svd(rows)[1][:10].__pow__(2).sum(), rel=1e-4)


def test_a_text_without_a_known_word_keeps_its_teachers_direction() -> None:
    teacher, _ = texts(3, 4)
    space = space_of(T + 12, 12)
    nothing = csr_matrix((3, V), dtype=np.float32)
    found = space.targets("query", teacher, nothing)
    np.testing.assert_allclose(found @ found.T, teacher @ teacher.T, atol=1e-5)


def test_a_space_comes_back_from_its_folder(tmp_path: Path) -> None:
    (teacher, words), means = texts(4, 5), np.eye(2, T, dtype=np.float32)
    with_words = replace(space_of(8, 5), means_2T=means)
    alone = TargetSpace(1.0, None, None, principal_axes(teacher.T @ teacher, 3, 0))
    for space, counts in ((with_words, words), (alone, None)):
        space.save(tmp_path)
        for kind in KINDS:
            found = TargetSpace.open(tmp_path).targets(kind, teacher, counts)
            np.testing.assert_array_equal(found, space.targets(kind, teacher, counts))


def test_more_components_than_the_targets_have_are_refused() -> None:
    message = r"encoder\.dims asks for 7 components, but the targets have 6, of which the teacher gives 4 and BM25 2"
    with pytest.raises(ValueError, match=message):
        principal_axes(np.eye(6), 7, lexical=2)


def test_a_part_without_weight_has_no_components() -> None:
    teacher, words = texts(9, 6)
    lexical = lexical_part(words, word_vectors(words, 5, seed=1))
    np.testing.assert_allclose(joined_parts(0.0, teacher, lexical), lexical, atol=1e-6)
    assert not joined_parts(0.0, teacher, np.zeros((9, 5), dtype=np.float32)).any()
    assert joined_parts(1.0, teacher, None).shape == (9, T)

"""How the target space of search/target_space.py is fitted to the training texts, without labels.

Covers what the teacher's vectors have in common, the weights of teacher and BM25, and the axes; nested_axes.py has
their last turn.
Shapes: n texts, V words, L singular vectors, T components of the teacher, J = T + L, K components that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix

from drama_dist.encoder.pooling import unit_rows
from drama_dist.run.progress import say
from drama_dist.search.shards import EmbeddingShards
from drama_dist.search.target_space import TargetSpace, joined_parts, principal_axes, word_vectors
from drama_dist.settings import Settings
from drama_dist.train.nested_axes import nested_turn
from drama_dist.train.teacher_scale import passage_moments

FITTED = 50_000  # texts of each kind that the space, and then the closed form, is fitted to
COMMON = 0.5  # of a cosine; benchmarks/results/recipe.md has what was measured on both sides of it

Words = Callable[[np.ndarray], csr_matrix]  # of texts at these positions


def fit_target_space(
    settings: Settings, weights_NV: csr_matrix | None, kinds: Sequence[tuple[EmbeddingShards, Words | None]]
) -> TargetSpace:
    """The space of a run. weights_NV: BM25's; None where it has no part. kinds: the teacher's vectors of all queries
    and of all passages, each with the words of those at some positions.

    Raises ValueError where the targets have fewer components than encoder.dims asks for.
    """
    share, chance = settings.targets.teacher_share, np.random.default_rng(settings.seed)
    if weights_NV is None:
        words_VL = None
    else:
        some = drawn(weights_NV.shape[0], chance)
        words_VL = word_vectors(weights_NV[some], settings.targets.lexical_components, settings.seed)
    teachers, words_of = [], []
    for vectors, words in kinds:
        rows = drawn(len(vectors), chance)
        teachers.append(vectors.rows(rows))
        words_of.append(None if words is None else words(rows))
    means_2T = common_means(*teachers)
    if means_2T.any():
        say(
            f"targets: the teacher's vectors have cosines above {COMMON} on average; they are taken without their means"
        )
    teachers = [unit_rows(teacher_nT - mean_T) for teacher_nT, mean_T in zip(teachers, means_2T, strict=True)]
    if words_VL is not None:
        lexical = [joined_parts(0, *each, words_VL) for each in zip(teachers, words_of, strict=True)]
        share = share_of_products(share, deviation(*teachers), deviation(*lexical))
        say(f"targets: {share:.2f} of the teacher's cosine and {1 - share:.2f} of BM25's")
    parts = [joined_parts(share, *each, words_VL) for each in zip(teachers, words_of, strict=True)]
    moment_JJ = np.sum([part_nJ.T.astype(np.float64) @ part_nJ / len(part_nJ) for part_nJ in parts], axis=0)
    dims, lexical_count = settings.encoder.dims, 0 if words_VL is None else words_VL.shape[1]
    axes_JK = principal_axes(moment_JJ, max(dims), lexical_count)
    queries_nK, passages_nK = (unit_rows(part_nJ @ axes_JK) for part_nJ in parts)
    turn_KK = nested_turn(queries_nK, passages_nK, dims, settings.seed)
    return TargetSpace(share, means_2T, words_VL, axes_JK @ turn_KK)


def common_means(queries_nT: np.ndarray, passages_nT: np.ndarray) -> np.ndarray:
    """What is to be taken from the teacher's vectors of queries and of passages, float32 (2, T): their means where the
    cosine of a query and a passage is more than COMMON on average, otherwise zeros.

    Such a teacher's vectors lie in a narrow cone (Ethayarajh 2019, arXiv 1909.00512). What they have in common says
    nothing of a passage, but a student that errs in it errs by more than passages differ.
    """
    means_2T = np.stack([vectors_nT.mean(0, dtype=np.float64) for vectors_nT in (queries_nT, passages_nT)])
    return (means_2T if means_2T[0] @ means_2T[1] > COMMON else np.zeros_like(means_2T)).astype(np.float32)


def deviation(queries_nT: np.ndarray, passages_nT: np.ndarray) -> float:
    """Of a query's scores over the passages: the standard deviation, root mean square over the queries."""
    moments = passage_moments(torch.from_numpy(passages_nT))
    return float(moments.deviations(torch.from_numpy(queries_nT)).square().mean().sqrt())


def share_of_products(share: float, of_teacher: float, of_words: float) -> float:
    """The teacher's share in a mix of dot products, so that its share in the mix's deviation is `share`.

    of_teacher, of_words: deviations of their scores. Where either is 0 it says nothing, and the share stays.
    """
    if not of_teacher or not of_words:
        return share
    teacher, words = share / of_teacher, (1 - share) / of_words
    return teacher / (teacher + words)


def drawn(count: int, chance: np.random.Generator) -> np.ndarray:
    """Positions of some of so many texts, in order: FITTED at most."""
    return np.sort(chance.choice(count, min(count, FITTED), replace=False, shuffle=False))

"""How the target space of search/target_space.py is fitted to the training texts, without labels.

Covers what the teacher's vectors have in common, the weights of teacher and BM25, and the axes; nested_axes.py has
their last turn.
Shapes: n texts, V words, L singular vectors, T components of the teacher, J = T + L, K components that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from drama_dist.encoder.pooling import unit_rows
from drama_dist.run.progress import say
from drama_dist.search.shards import EmbeddingShards
from drama_dist.search.target_space import TargetSpace, joined_parts, lexical_part, principal_axes, word_vectors
from drama_dist.settings import Settings
from drama_dist.train.nested_axes import nested_turn
from drama_dist.train.teacher_scale import passage_moments

FITTED = 50_000  # texts of each kind that the space, and then the closed form, is fitted to
COMMON = 0.5  # of a cosine: between two teachers, with .11 to .17 and .75 to .79 (benchmarks/results/recipe.md)

_ROUNDING = 1e-6  # of a vector's squared length
_ROWS = 4096  # that are in float64 at a time


@dataclass(frozen=True)
class Texts:
    """Queries or passages: the teacher's vectors, and the words at some positions: counts, or BM25's weights."""

    vectors: EmbeddingShards
    words: Callable[[np.ndarray], csr_matrix] | None

    def lexical_part(self, rows: np.ndarray, words_VL: np.ndarray | None) -> np.ndarray | None:
        """Of the texts at these positions, float32 (n, L); None where BM25 has no part."""
        if self.words is None or words_VL is None or not words_VL.shape[1]:
            return None
        return lexical_part(self.words(rows), words_VL)


def fit_target_space(settings: Settings, weights_NV: csr_matrix | None, queries: Texts, passages: Texts) -> TargetSpace:
    """The space of a run. weights_NV: BM25's, of the training passages; None where it has no part.

    Raises ValueError where the targets have fewer components than encoder.dims asks for.
    """
    share, chance = settings.targets.teacher_share, np.random.default_rng(settings.seed)
    words_VL = None
    if weights_NV is not None:
        some = drawn(weights_NV.shape[0], chance)
        words_VL = word_vectors(weights_NV[some], settings.targets.lexical_components, settings.seed)
    kinds = (queries, passages)
    rows = [drawn(len(texts.vectors), chance) for texts in kinds]
    teacher = [texts.vectors.rows(some) for texts, some in zip(kinds, rows, strict=True)]
    means_2T = common_means(*teacher) if share > 0 else None
    if means_2T is not None:
        teacher = [unit_rows(teacher_nT - mean_T) for teacher_nT, mean_T in zip(teacher, means_2T, strict=True)]
    of_queries, of_passages = (texts.lexical_part(some, words_VL) for texts, some in zip(kinds, rows, strict=True))
    if of_queries is None or of_passages is None:
        weight = share
    else:
        weight = weight_of_teacher(share, deviation(*teacher), deviation(of_queries, of_passages))
        say(f"targets: {weight:.2f} of the teacher's cosine and {1 - weight:.2f} of BM25's")
    joined = [joined_parts(weight, *both) for both in zip(teacher, (of_queries, of_passages), strict=True)]
    del teacher, of_queries, of_passages
    moment_JJ = np.sum([part_nJ.T.astype(np.float64) @ part_nJ / len(part_nJ) for part_nJ in joined], axis=0)
    dims, lexical_count = settings.encoder.dims, 0 if words_VL is None else words_VL.shape[1]
    axes_JK = principal_axes(moment_JJ, max(dims), lexical_count)
    queries_nK, passages_nK = (unit_rows(part_nJ @ axes_JK) for part_nJ in joined)
    turn_KK = nested_turn(queries_nK, passages_nK, dims, settings.seed)
    return TargetSpace(weight, means_2T, words_VL, axes_JK @ turn_KK)


def common_means(queries_nT: np.ndarray, passages_nT: np.ndarray) -> np.ndarray | None:
    """What to take from the teacher's vectors of queries and of passages, float32 (2, T): their means. None where the
    cosine of a query and a passage is COMMON or less on average, or where the vectors of a kind are the same but for
    rounding.

    Where it is more, the vectors lie in a narrow cone (Ethayarajh 2019, arXiv 1909.00512). What they have in common
    says nothing of a passage, but a student that errs in it errs by more than passages differ. Several teachers joined
    as one have one mean cosine.
    """
    means_2T = np.stack([vectors_nT.mean(0, dtype=np.float64) for vectors_nT in (queries_nT, passages_nT)])
    cosine = float(means_2T[0] @ means_2T[1])
    same = (1 - np.square(means_2T).sum(1) < _ROUNDING).any()
    taken = cosine > COMMON and not same
    say(f"targets: the teacher's cosines are {cosine:.2f} on average; means are {'taken off' if taken else 'left'}")
    return means_2T.astype(np.float32) if taken else None


def deviation(queries_nT: np.ndarray, passages_nT: np.ndarray) -> float:
    """The standard deviation of a query's scores over the passages, root mean square over the queries that have one.

    queries_nT, passages_nT: float32; rows of zeros are allowed. 0 where all scores of each query are the same.
    """
    moments = passage_moments(torch.from_numpy(passages_nT))
    blocks = torch.from_numpy(queries_nT).split(_ROWS)
    deviations_n = torch.cat([moments.deviations(block) for block in blocks])
    return float(deviations_n[deviations_n > 0].square().mean().nan_to_num().sqrt())


def weight_of_teacher(share: float, of_teacher: float, of_words: float) -> float:
    """What the teacher weighs in a mix of dot products, so that its share in the mix's deviation is `share`.

    of_teacher, of_words: deviations of their scores. Where either is 0 it says nothing, and the weight is the share.
    """
    if not of_teacher or not of_words:
        return share
    teacher, words = share / of_teacher, (1 - share) / of_words
    return teacher / (teacher + words)


def drawn(count: int, chance: np.random.Generator) -> np.ndarray:
    """Positions of at most FITTED of `count` texts, ascending."""
    return np.sort(chance.choice(count, min(count, FITTED), replace=False, shuffle=False))

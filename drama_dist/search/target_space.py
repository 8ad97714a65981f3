"""The space of the regression's targets: the teacher's vectors beside BM25's, in one set of components.

Covers the map from what teacher and BM25 say of a text to its target; train/target_fit.py fits it. Concatenation adds
scores: the dot product of [√a · t ; √(1 − a) · l] of a query and of a passage is a · (dot of t) + (1 − a) · (dot of l).
The teacher's part t is its vector. Where its cosines are high on average, the mean of its kind is taken off first, and
t is scaled to length 1 again.
BM25's part l is latent semantic indexing of its weights (Deerwester et al. 1990): the weights of a passage, or the word
counts of a query, times the weights' leading right singular vectors. The components are then turned onto the principal
axes of the targets, and from there as train/nested_axes.py says, which leaves dot products as they are and makes
prefixes of encoder.dims rank as whole vectors do.
Shapes: n texts, T components of the teacher, V words, L singular vectors, J = T + L, K components that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds

from drama_dist.encoder.pooling import unit_rows
from drama_dist.run.files import put_in_place
from drama_dist.search.teacher import Kind

KINDS: tuple[Kind, Kind] = ("query", "passage")
_FILE = "space.safetensors"


@dataclass(frozen=True)
class TargetSpace:
    """teacher_weight: a. means_2T: to take from the teacher's vectors of queries and of passages, float32; None where
    they stay as they are. words_VL: float32, None where BM25 has no part. axes_JK: float32, orthonormal columns.
    """

    teacher_weight: float
    means_2T: np.ndarray | None
    words_VL: np.ndarray | None
    axes_JK: np.ndarray

    def targets(self, kind: Kind, teacher_nT: np.ndarray, words_nV: csr_matrix | None) -> np.ndarray:
        """Unit vectors, float32 (n, K), or zeros where no part says anything of a text.

        teacher_nT: unit vectors. words_nV: weights of passages, counts of queries.
        """
        if self.means_2T is not None:
            teacher_nT = unit_rows(teacher_nT - self.means_2T[KINDS.index(kind)])
        lexical_nL = None if words_nV is None or self.words_VL is None else lexical_part(words_nV, self.words_VL)
        return unit_rows(joined_parts(self.teacher_weight, teacher_nT, lexical_nL) @ self.axes_JK)

    def save(self, folder: Path) -> None:
        """Write the space to a folder."""
        parts = {"teacher_weight": np.array([self.teacher_weight]), "axes": self.axes_JK}
        parts |= {} if self.means_2T is None else {"means": self.means_2T}
        parts |= {} if self.words_VL is None else {"words": self.words_VL}
        temporary = folder / f"{_FILE}.tmp"
        save_file(parts, temporary)
        put_in_place(temporary, folder / _FILE)

    @classmethod
    def open(cls, folder: Path) -> TargetSpace:
        """Read what `save` wrote."""
        parts = load_file(folder / _FILE)
        return cls(float(parts["teacher_weight"][0]), parts.get("means"), parts.get("words"), parts["axes"])


def word_vectors(weights_NV: csr_matrix, components: int, seed: int) -> np.ndarray:
    """The leading right singular vectors of BM25's weights, float32 (V, L); fewer where the matrix has no more."""
    count = min(components, min(weights_NV.shape) - 1)
    if count < 1:
        return np.zeros((weights_NV.shape[1], 0), dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(min(weights_NV.shape))
    _, _, right_LV = svds(weights_NV.astype(np.float32), k=count, v0=start.astype(np.float32))
    return np.ascontiguousarray(right_LV[::-1].T, dtype=np.float32)


def lexical_part(words_nV: csr_matrix, words_VL: np.ndarray) -> np.ndarray:
    """BM25's part of the targets, float32 (n, L): unit vectors; zeros for a text without a word of the index."""
    return unit_rows(words_nV @ words_VL)


def joined_parts(teacher_weight: float, teacher_nT: np.ndarray, lexical_nL: np.ndarray | None) -> np.ndarray:
    """The targets before they are turned, float32 (n, J), of length 1, or zeros where both parts are.

    A teacher without weight has no components.
    """
    parts = [np.sqrt(teacher_weight) * teacher_nT if teacher_weight > 0 else teacher_nT[:, :0]]
    if lexical_nL is not None:
        parts.append(np.sqrt(1 - teacher_weight) * lexical_nL)
    return unit_rows(np.hstack(parts))


def principal_axes(moment_JJ: np.ndarray, components: int, lexical: int) -> np.ndarray:
    """The leading eigenvectors of a moment matrix, float32 (J, K).

    lexical: how many of the J components are BM25's. Raises ValueError where there are not as many components.
    """
    if components > len(moment_JJ):
        raise ValueError(
            f"encoder.dims asks for {components} components, but the targets have {len(moment_JJ)}, of which the "
            f"teacher gives {len(moment_JJ) - lexical} and BM25 {lexical}: it has at most targets.lexical_components, "
            "and fewer than there are training passages or words; lower the dims to what there is"
        )
    return np.ascontiguousarray(np.linalg.eigh(moment_JJ)[1][:, ::-1][:, :components], dtype=np.float32)

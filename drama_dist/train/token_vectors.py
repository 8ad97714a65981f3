"""Token vectors in closed form: a vector for each token, so that the sum over a text's tokens points to its target.

Covers the regression. Counts of tokens, weighted by inverse document frequency and scaled by their length, are mapped
to the targets by ridge regression (Hoerl and Kennard 1970), twice: first through the LLM's token embeddings, which says
something about every token; then what is left, token by token, for which only frequent tokens have enough texts.
Superwords (encoder/superwords.py) are counted beside the tokens that they stand for. Where a tokenizer has no more than
letters and bytes of a script, as many do of Arabic and Hindi, superwords are the words, and what they have beyond their
tokens is most of what they mean: hence LONGEST, and a penalty that falls with the number of tokens.
Special tokens at the ends of a text have no vector. The order of tokens does not matter here. How a backbone comes to
give these sums is in token_start.py.
Shapes: n texts, V tokens, S superwords, K hidden components, J components of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, diags_array, hstack, vstack

from drama_dist.run.progress import progress_bar

# How these five were chosen: benchmarks/results/recipe.md, the last two also by languages.md.
PASSAGE_WEIGHT = 10.0  # of a passage's squared error, where a query's is 1: passages are known already
EMBEDDING_PENALTY = 50.0  # on the map from embeddings
TOKEN_PENALTY = 1.0  # on the vectors of tokens: as much as a text that has this token alone, with target 0
SUPERWORD_PENALTY = 8.0  # on what a superword has beyond its tokens; divided by their number
LONGEST = 1.25  # times the length with superwords in place of their tokens is the most that a text is divided by
_ITERATIONS = 40  # of conjugate gradients; these end 2e-5 from the exact solution in the test of superwords, 30 1e-3


def token_counts(texts: Sequence[Sequence[int]], vocabulary: int, before: int) -> csr_matrix:
    """How often each token is in each text, float32 (n, V), but for the last, EOS, and for `before` first ones: BOS."""
    inner = [ids[before:-1] for ids in texts]
    starts = np.cumsum([0, *map(len, inner)])
    columns = np.fromiter((token for ids in inner for token in ids), dtype=np.int64, count=int(starts[-1]))
    counts = csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=(len(inner), vocabulary))
    counts.sum_duplicates()
    return counts


def token_vectors(
    queries: tuple[csr_matrix, np.ndarray],
    passages: tuple[csr_matrix, np.ndarray],
    embeddings_VK: np.ndarray,
    parts: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """The vector of every token of the vocabulary and then of every superword, float32 (V + S, J).

    queries, passages: counts (n, V + S), and targets (n, J) of length 1; texts whose target is zero are left out.
    embeddings_VK: the LLM's. parts: the tokens that each superword stands for; its vector is their sum, and what a
    regression on superwords, beside all texts' tokens, finds that they have beyond it.
    """
    kinds = [(counts[targets.any(1)], targets[targets.any(1)]) for counts, targets in (queries, passages)]
    vocabulary, within = len(embeddings_VK), _within_superwords(parts, len(embeddings_VK))
    shortened = [each for each, _ in kinds]
    counts = [_with_parts(each, vocabulary, within) for each in shortened]
    frequencies = sum(np.asarray((each > 0).sum(0)).ravel() for each in counts)
    texts = sum(each.shape[0] for each in counts)
    idf = np.log(1 + texts / (1 + frequencies)).astype(np.float32)
    factors = np.sqrt([1, PASSAGE_WEIGHT], dtype=np.float32)
    scaled = [_scaled(*both, idf, vocabulary) for both in zip(counts, shortened, strict=True)]
    weights = csr_matrix(vstack([factor * each for factor, each in zip(factors, scaled, strict=True)]))
    targets_nJ = np.vstack([factor * targets for factor, (_, targets) in zip(factors, kinds, strict=True)])

    of_tokens_nV = weights[:, :vocabulary]
    features_VK = _features(embeddings_VK, seen=np.unique(of_tokens_nV.indices))
    pooled_nK = np.asarray(of_tokens_nV @ features_VK, dtype=np.float64)
    products_KK = pooled_nK.T @ pooled_nK + EMBEDDING_PENALTY * np.eye(pooled_nK.shape[1])
    map_KJ = np.linalg.solve(products_KK, pooled_nK.T @ targets_nJ)
    rest_nJ = (targets_nJ - pooled_nK @ map_KJ).astype(np.float32)
    of_superwords = [SUPERWORD_PENALTY / len(tokens) for tokens in parts]
    penalties = np.array([TOKEN_PENALTY] * vocabulary + of_superwords, dtype=np.float32)
    vectors = ridge_solution(weights, rest_nJ, penalties)
    vectors[:vocabulary] += features_VK @ map_KJ.astype(np.float32)
    vectors *= idf[:, None]
    vectors[vocabulary:] += within @ vectors[:vocabulary]
    return np.asarray(vectors, dtype=np.float32)


def ridge_solution(
    weights_nV: csr_matrix, targets_nJ: np.ndarray, penalties_V: np.ndarray, iterations: int = _ITERATIONS
) -> np.ndarray:
    """The W, V × J, that minimises |X W − Y|² + Σ penalty · |row of W|², by conjugate gradients (Hestenes and Stiefel
    1952).

    They are preconditioned by the diagonal, and run for all columns of Y side by side.
    """
    across_Vn = weights_nV.T.tocsr()
    diagonal_V1 = np.asarray(weights_nV.multiply(weights_nV).sum(0)).reshape(-1, 1) + penalties_V[:, None]
    solution_VJ = np.zeros((weights_nV.shape[1], targets_nJ.shape[1]), dtype=targets_nJ.dtype)
    residual_VJ = np.asarray(across_Vn @ targets_nJ)
    direction_VJ = scaled_VJ = residual_VJ / diagonal_V1
    product_J = _dots(residual_VJ, scaled_VJ)
    bar = progress_bar(iterations, "ridge", "iterations")
    for _ in range(iterations):
        image_VJ = np.asarray(across_Vn @ (weights_nV @ direction_VJ)) + penalties_V[:, None] * direction_VJ
        length_J = _ratio(product_J, _dots(direction_VJ, image_VJ))
        solution_VJ += length_J * direction_VJ
        residual_VJ = residual_VJ - length_J * image_VJ
        scaled_VJ = residual_VJ / diagonal_V1
        before_J, product_J = product_J, _dots(residual_VJ, scaled_VJ)
        direction_VJ = scaled_VJ + _ratio(product_J, before_J) * direction_VJ
        bar.update()
    bar.close()
    return solution_VJ


def _within_superwords(parts: Sequence[Sequence[int]], vocabulary: int) -> csr_matrix:
    """How often each token is in each superword, (S, V)."""
    around = [0]  # what is at both ends is not counted
    return token_counts([[*around, *tokens, *around] for tokens in parts], vocabulary, before=1)


def _with_parts(counts: csr_matrix, vocabulary: int, within_SV: csr_matrix) -> csr_matrix:
    """The counts with each superword's tokens counted too, as if the text had not been shortened."""
    superwords = counts[:, vocabulary:]
    return csr_matrix(hstack([counts[:, :vocabulary] + superwords @ within_SV, superwords]))


def _scaled(counts: csr_matrix, shortened: csr_matrix, idf: np.ndarray, vocabulary: int) -> csr_matrix:
    """Weighted counts, each row divided by the length of its tokens, or by LONGEST times that of `shortened`: by the
    smaller of the two.

    shortened: the counts without the tokens that superwords stand for.
    """
    weighted, read = (csr_matrix(each @ diags_array(idf)) for each in (counts, shortened))
    lengths_n = np.minimum(_lengths(weighted[:, :vocabulary]), LONGEST * _lengths(read))
    return csr_matrix(diags_array(np.divide(1, lengths_n, where=lengths_n > 0, out=lengths_n)) @ weighted)


def _lengths(rows: csr_matrix) -> np.ndarray:
    return np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())


def _features(embeddings_VK: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Embeddings less the mean of the tokens seen, which then have a mean squared length of 1; and a constant."""
    centred_VK = embeddings_VK - embeddings_VK[seen].mean(0)
    scale = np.sqrt(np.square(centred_VK[seen]).sum(1).mean())
    return np.hstack([centred_VK / scale, np.ones((len(centred_VK), 1), np.float32)])


def _dots(one_VJ: np.ndarray, other_VJ: np.ndarray) -> np.ndarray:
    return np.einsum("vj,vj->j", one_VJ, other_VJ)


def _ratio(numerator_J: np.ndarray, denominator_J: np.ndarray) -> np.ndarray:
    """0 where the denominator is, which is where a column has reached its solution."""
    return np.divide(numerator_J, denominator_J, out=np.zeros_like(numerator_J), where=denominator_J != 0)

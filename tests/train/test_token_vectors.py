"""Token vectors: the closed form against dense algebra, and the encoder that begins from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, random_array
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaModel

from drama_dist.encoder import attention
from drama_dist.encoder.fused_layers import fuse_layers
from drama_dist.encoder.packing import pack
from drama_dist.encoder.pooling import mean_pool
from drama_dist.train.token_start import put_token_vectors
from drama_dist.train.token_vectors import (
    EMBEDDING_PENALTY,
    LONGEST,
    PASSAGE_WEIGHT,
    SUPERWORD_PENALTY,
    TOKEN_PENALTY,
    ridge_solution,
    token_counts,
    token_vectors,
)

V, K, J = 97, 24, 11
CHANCE = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def same_chance() -> None:
    """Each test's data do not depend on which others ran."""
    global CHANCE
    CHANCE = np.random.default_rng(5)
    torch.manual_seed(5)


def texts(count: int, longest: int = 9) -> list[list[int]]:
    """Token ids between BOS and EOS, which are 0 and 1; the first has nothing between."""
    lengths = [0, *CHANCE.integers(1, longest, count - 1)]
    return [[0, *CHANCE.integers(2, V, length).tolist(), 1] for length in lengths]


def units(count: int) -> np.ndarray:
    rows = CHANCE.standard_normal((count, J)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_counts_leave_out_the_special_tokens_at_both_ends() -> None:
    counts = token_counts([[0, 5, 7, 5, 1], [0, 1], [0, 0, 1, 1]], V, before=1).toarray()
    assert counts.sum() == 5 and counts[0, 5] == 2 and counts[0, 7] == 1
    assert counts[2, 0] == 1 and counts[2, 1] == 1  # inside a text they are tokens as others
    without_bos = token_counts([[5, 7, 5, 1], [1], [0, 1, 1]], V, before=0).toarray()
    np.testing.assert_array_equal(without_bos, counts)


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_conjugate_gradients_find_the_solution(penalty: float) -> None:
    matrix = csr_matrix(random_array((150, V), density=0.1, rng=CHANCE, dtype=np.float64))
    targets = CHANCE.standard_normal((150, J))
    targets[:, 3] = 0  # a column that is solved before the first iteration
    dense = matrix.toarray()
    penalties = penalty * CHANCE.uniform(0.5, 2, V)
    expected = np.linalg.solve(dense.T @ dense + np.diag(penalties), dense.T @ targets)
    np.testing.assert_allclose(ridge_solution(matrix, targets, penalties, 200), expected, atol=1e-9)
    assert np.abs(ridge_solution(matrix, targets, 2 * penalties, 200) - expected).max() > 1e-3


def test_token_vectors_are_the_two_regressions_of_the_formula() -> None:
    """Written out densely, in float64."""
    queries, passages = token_counts(texts(60), V, before=1), token_counts(texts(40, 30), V, before=1)
    of_queries, of_passages, embeddings = units(60), units(40), CHANCE.standard_normal((V, K)).astype(np.float32)
    of_queries[7] = 0  # what a text without a known word has, without a teacher
    found = token_vectors((queries, of_queries), (passages, of_passages), embeddings)

    kept, of_queries = np.delete(queries.toarray().astype(np.float64), 7, 0), np.delete(of_queries, 7, 0)
    counts = passages.toarray().astype(np.float64)
    idf = np.log(1 + 99 / (1 + (counts > 0).sum(0) + (kept > 0).sum(0)))
    rows = []
    for part, weight in ((kept, 1.0), (counts, PASSAGE_WEIGHT)):
        weighted = part * idf
        lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
        rows.append(np.sqrt(weight) * weighted / np.where(lengths > 0, lengths, 1))
    x, y = np.vstack(rows), np.vstack([of_queries, np.sqrt(PASSAGE_WEIGHT) * of_passages])
    seen = (x > 0).any(0)
    centred = embeddings - embeddings[seen].mean(0)
    features = np.hstack([centred / np.sqrt(np.square(centred[seen]).sum(1).mean()), np.ones((V, 1))])
    pooled = x @ features
    first = np.linalg.solve(pooled.T @ pooled + EMBEDDING_PENALTY * np.eye(K + 1), pooled.T @ y)
    second = np.linalg.solve(x.T @ x + TOKEN_PENALTY * np.eye(V), x.T @ (y - pooled @ first))
    np.testing.assert_allclose(found, idf[:, None] * (features @ first + second), atol=1e-4)
    assert np.abs(found - idf[:, None] * (features @ first)).max() > 0.1


def test_a_superword_has_the_sum_of_its_tokens_and_what_the_texts_say_beyond_it() -> None:
    """A superword beside its tokens is a column more in the regression, with an idf of its own."""
    parts, of_texts = [[5, 6], [7, 7, 8, *[9] * 5]], units(120)
    sequences = [[0, *CHANCE.integers(2, V + 2, 6).tolist(), 1] for _ in range(120)]
    counts, embeddings = token_counts(sequences, V + 2, before=1), CHANCE.standard_normal((V, K)).astype(np.float32)
    halves = (counts[:60], of_texts[:60]), (counts[60:], of_texts[60:])
    found = token_vectors(*halves, embeddings, parts)

    superwords = counts.toarray()[:, V:].astype(np.float64)
    plain = counts.toarray()[:, :V].astype(np.float64)
    for column, tokens in enumerate(parts):
        for token in tokens:
            plain[:, token] += superwords[:, column]
    x = np.hstack([plain, superwords])
    idf = np.log(1 + 120 / (1 + (x > 0).sum(0)))
    of_tokens = np.linalg.norm(plain * idf[:V], axis=1, keepdims=True)
    shortened = LONGEST * np.linalg.norm(counts.toarray() * idf, axis=1, keepdims=True)
    assert (of_tokens < shortened).any() and (shortened < of_tokens).any()
    x = x * idf / np.minimum(of_tokens, shortened)
    weights = np.sqrt(np.repeat([1, PASSAGE_WEIGHT], 60))[:, None]
    x, y = weights * x, weights * of_texts
    centred = embeddings - embeddings[(plain > 0).any(0)].mean(0)
    features = centred / np.sqrt(np.square(centred[(plain > 0).any(0)]).sum(1).mean())
    features = np.hstack([features, np.ones((V, 1))])
    pooled = x[:, :V] @ features
    first = np.linalg.solve(pooled.T @ pooled + EMBEDDING_PENALTY * np.eye(K + 1), pooled.T @ y)
    penalties = np.diag([TOKEN_PENALTY] * V + [SUPERWORD_PENALTY / 2, SUPERWORD_PENALTY / 8])
    second = np.linalg.solve(x.T @ x + penalties, x.T @ (y - pooled @ first))
    of_tokens = idf[:V, None] * (features @ first + second[:V])
    sums = np.stack([of_tokens[tokens].sum(0) for tokens in parts])
    beyond = idf[V:, None] * second[V:]
    np.testing.assert_allclose(found, np.vstack([of_tokens, sums + beyond]), atol=1e-4)
    assert np.abs(beyond).max() > 0.1


def llama(hidden: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=V, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        is_causal=False,
    )  # fmt: skip
    config._attn_implementation = attention.NAME
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaModel(config).eval()


def states(backbone: LlamaModel, sequences: list[list[int]]) -> torch.Tensor:
    packed = pack(sequences, torch.device("cpu"))
    output = backbone(
        inputs_embeds=backbone.embed_tokens(packed.token_ids_T)[None],
        position_ids=packed.position_ids_T[None],
        use_cache=False,
        packed=packed,
    )
    return mean_pool(output.last_hidden_state[0], packed)


@pytest.mark.parametrize(("hidden", "fused"), [(24, False), (32, False), (64, True)])
def test_a_backbone_begins_as_the_sum_of_token_vectors(hidden: int, fused: bool) -> None:
    backbone, sequences = llama(hidden), texts(20)[1:]
    assert fuse_layers(backbone) == fused
    vectors = CHANCE.standard_normal((V, J)).astype(np.float32) * CHANCE.uniform(0, 3, (V, 1)).astype(np.float32)
    counts = np.asarray(token_counts(sequences, V, before=1).sum(0)).ravel()
    vectors[:2] = 0
    vectors[np.flatnonzero(counts == 0)[2]] *= 1e4  # of a token that is in no text: it does not set the scale
    head = put_token_vectors(backbone, vectors, counts)
    assert float(head.weight.detach().norm(dim=0).max()) < 10
    found = head(states(backbone, sequences))
    sums = torch.tensor(np.array([vectors[ids].sum(0) for ids in sequences]))
    torch.testing.assert_close(cosine_similarity(found, sums), torch.ones(len(sums)), atol=1e-5, rtol=0)
    with torch.no_grad():
        backbone.layers[0].mlp.down_proj.weight.normal_(std=30)  # whatever a layer adds is seen
        assert float(cosine_similarity(head(states(backbone, sequences)), sums).min()) < 0.99


def test_the_first_layer_reads_what_it_read_before() -> None:
    """Up to what least squares lose: the old embeddings' principal components are kept, the token vectors help too."""
    hidden, plain, changed = 64, llama(64), llama(64)
    with torch.no_grad():  # embeddings of few components, as an LLM's nearly are
        low = torch.randn(V, 16, generator=torch.Generator().manual_seed(1))
        for model in (plain, changed):
            model.embed_tokens.weight.copy_(low @ torch.randn(16, hidden, generator=torch.Generator().manual_seed(2)))
            model.layers[0].input_layernorm.weight.fill_(1.7)
    vectors = CHANCE.standard_normal((V, J)).astype(np.float32)
    put_token_vectors(changed, vectors, np.full(V, 4.0))
    queries = [
        layer.self_attn.q_proj(layer.input_layernorm(model.embed_tokens.weight)).detach()
        for model in (plain, changed)
        for layer in model.layers[:1]
    ]
    assert float((queries[0] - queries[1]).norm() / queries[0].norm()) < 0.3
    assert float((queries[0] - queries[1][torch.randperm(V)]).norm() / queries[0].norm()) > 1


def test_with_fewer_hidden_components_the_leading_ones_of_the_vectors_stay() -> None:
    backbone, sequences = llama(12), texts(20)[1:]  # 8 components for the vectors
    vectors = CHANCE.standard_normal((V, 8)).astype(np.float32) @ CHANCE.standard_normal((8, J)).astype(np.float32)
    vectors += 0.01 * CHANCE.standard_normal((V, J)).astype(np.float32)
    vectors[:2] = 0
    head = put_token_vectors(backbone, vectors, np.asarray(token_counts(sequences, V, before=1).sum(0)).ravel())
    sums = torch.tensor(np.array([vectors[ids].sum(0) for ids in sequences]))
    assert float(cosine_similarity(head(states(backbone, sequences)), sums).min().detach()) > 0.999

"""Packing and chunks of a token budget."""

from __future__ import annotations

import pytest
import torch

from drama_dist.encoder.packing import filled, pack, token_budget_chunks
from drama_dist.encoder.pooling import mean_pool


def test_positions_restart_and_boundaries_are_where_sequences_begin() -> None:
    packed = pack([[5, 6, 7], [8], [9, 10]])
    assert packed.token_ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert packed.position_ids_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.boundaries_B1.tolist() == [0, 3, 4, 6]
    assert packed.runs == [(1, 3), (1, 1), (1, 2)]


def test_neighbours_of_equal_length_are_one_run() -> None:
    assert pack([[1, 2], [3, 4], [5]]).runs == [(2, 2), (1, 1)]


@pytest.mark.parametrize("sequences", [[], [[1], []]])
def test_nothing_to_pack_is_an_error(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="cannot pack"):
        pack(sequences)


@pytest.mark.parametrize(
    ("tokens", "round_number"), [(1, 8), (8, 8), (9, 16), (250, 256), (257, 272), (1500, 1536), (2048, 2048)]
)
def test_filled_sequences_have_a_round_number_of_tokens(tokens: int, round_number: int) -> None:
    for sequences in ([[7] * tokens], [[7], [5] * (tokens - 1)] if tokens > 1 else [[7]]):
        rounded = filled(sequences)
        assert rounded[: len(sequences)] == sequences and len(rounded) <= len(sequences) + 1
        assert len(pack(rounded).token_ids_T) == round_number


def test_there_are_few_round_numbers() -> None:
    assert len({len(pack(filled([[7] * tokens])).token_ids_T) for tokens in range(1025, 2049)}) == 16


def test_chunks_hold_every_sequence_once_within_the_budget() -> None:
    lengths = [3, 50, 1, 8, 8, 2, 30, 9]
    chunks = token_budget_chunks(lengths, 20)
    assert sorted(position for chunk in chunks for position in chunk) == list(range(8))
    assert all(sum(lengths[i] for i in chunk) <= 20 or len(chunk) == 1 for chunk in chunks)


def test_pooling_is_the_mean_of_each_sequences_tokens() -> None:
    packed = pack([[1, 2, 3], [4]])
    hidden = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 3.0], [7.0, 8.0]])
    assert mean_pool(hidden, packed).tolist() == [[2.0, 1.0], [7.0, 8.0]]
    assert mean_pool(hidden.bfloat16(), packed).dtype == torch.float32

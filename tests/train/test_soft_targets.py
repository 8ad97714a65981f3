"""The soft targets' term on several ranks is that of one process; and raw scores become the logits that it takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from soft_target_ranks import (
    DIM_WEIGHTS,
    DIMS,
    KINDS,
    MIX,
    PASSAGES,
    QUERIES,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
    K,
    T,
    batch_of_this_rank,
    inputs,
    run,
    sparse_of,
)
from test_ranks import start_ranks

from drama_dist.kernels import SparseLogits, TeacherScores, soft_targets
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.soft_target_term import SoftTargetTerm
from drama_dist.train.teacher_scale import passage_moments, scaled_teacher
from drama_dist.train.term import EmbeddedBatch

NAMES = [f"{partition}-{kind}" for partition in ("passages", "queries") for kind in KINDS]


def normalised(scores_BN: torch.Tensor) -> torch.Tensor:
    """Each row's scores less their mean, over their standard deviation; 0 where all are the same."""
    centred_BN = scores_BN - scores_BN.mean(1, keepdim=True)
    return centred_BN / scores_BN.std(1, correction=0, keepdim=True).clamp_min(1e-9)


def mixed(kind: str) -> torch.Tensor:
    """The teacher's logits in float64, as one writes them down."""
    *_, teacher_queries, teacher_passages, scores = (side.double() for side in inputs())
    mix = MIX[0] * normalised(teacher_queries @ teacher_passages.T)
    return (mix + (MIX[1] * normalised(scores) if kind == "both" else 0)) / TEACHER_TEMPERATURE


def expected(kind: str, shift: int = 0) -> dict[str, Any]:
    """Of the whole batch by the reference, with a dense matrix of logits, its columns shifted."""
    leaves = [side.double().requires_grad_() for side in inputs()[:2]]
    teacher = TeacherScores(mixed(kind).roll(shift, 1).float(), torch.eye(PASSAGES))
    given: dict[str, Any] = {"temperature": TEMPERATURE, "dims": DIMS, "dim_weights": DIM_WEIGHTS}
    result = soft_targets(*leaves, teacher, backend="reference", **given)
    return {
        "loss": float(result.loss.detach()),
        "per_dim": result.per_dim.tolist(),
        "entropy": float(result.entropy),
        "gradients": torch.autograd.grad(result.loss, leaves),
    }


def compare(ended: dict[str, Any], truth: dict[str, Any]) -> None:
    assert ended["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert ended["figures"]["soft_per_dim"] == pytest.approx(dict(zip(DIMS, truth["per_dim"], strict=True)), rel=1e-5)
    assert ended["figures"]["teacher_entropy"] == pytest.approx(truth["entropy"], rel=1e-5)
    for gradient, its in zip(ended["gradients"], truth["gradients"], strict=True):
        assert float((gradient - its).abs().max()) <= 1e-5 * float(its.abs().max())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks write."""
    out = tmp_path_factory.mktemp("two-ranks")
    start_ranks(2, Path("-"), out, NAMES, program="soft_target_ranks.py")
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_dense_process(name: str, two_ranks: Path) -> None:
    kind = name.partition("-")[2]
    compare(torch.load(two_ranks / f"{name}.pt"), expected(kind))
    with pytest.raises(AssertionError):
        compare(torch.load(two_ranks / f"{name}.pt"), expected(kind, shift=1))


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4])
def test_more_ranks_equal_one_dense_process(count: int, tmp_path: Path) -> None:
    start_ranks(count, Path("-"), tmp_path, NAMES, program="soft_target_ranks.py")
    for name in NAMES:
        compare(torch.load(tmp_path / f"{name}.pt"), expected(name.partition("-")[2]))


@pytest.mark.parametrize("name", NAMES)
def test_one_process_has_no_use_for_a_partition(name: str) -> None:
    compare(run(name), expected(name.partition("-")[2]))


def test_bytes_equal_theory(two_ranks: Path) -> None:
    """Rank 0 of two sends its side's vectors, embeddings' gradients, and of sparse logits what its rows have."""
    sent = {name: torch.load(two_ranks / f"{name}.pt")["sent"] for name in NAMES}
    rows, columns = (QUERIES + 1) // 2, (PASSAGES + 1) // 2
    assert sent["passages-both"]["teacher"] == sent["passages-dense"]["teacher"] == 4 * columns * T
    assert sent["passages-both"]["passages"] == 4 * columns * K
    assert sent["queries-dense"]["teacher"] == 4 * rows * T
    matrix = inputs()[-1]
    entries = max(int(part.count_nonzero()) for part in (matrix[:rows], matrix[rows:]))  # the larger, as gathers pad
    assert sent["queries-both"]["teacher"] == 4 * rows * T + 8 * rows + (4 + 4) * entries
    assert sent["queries-both"]["merged rows"] == 4 * QUERIES * (3 * len(DIMS) + 3)


@pytest.mark.parametrize(
    ("queries", "passages", "entries", "gathers"), [(64, 512, 0, True), (64, 64, 0, False), (64, 512, 3000, False)]
)
def test_auto_moves_the_side_of_fewer_bytes(queries: int, passages: int, entries: int, gathers: bool) -> None:
    batch = batch_of_this_rank("dense")
    relevance = replace(batch.relevance, positives_B=torch.zeros(queries), passage_ids_N=torch.zeros(passages))
    values = torch.zeros(6 * entries)
    sparse = SparseLogits(torch.zeros(1), values, values) if entries else None
    teacher = TeacherScores(torch.zeros(1, T), torch.zeros(1, T), sparse)
    term = SoftTargetTerm(EncoderSettings(dims=DIMS), TrainSettings(soft_target_temperature=TEMPERATURE))
    assert term._gathers_queries(replace(batch, relevance=relevance), teacher) == gathers


def test_a_batch_without_a_teacher_is_refused() -> None:
    batch = batch_of_this_rank("dense")
    term = SoftTargetTerm(EncoderSettings(dims=DIMS), TrainSettings(soft_target_temperature=TEMPERATURE))
    with pytest.raises(ValueError, match="soft targets: the batch has no teacher's scores"):
        term(EmbeddedBatch(batch.queries_BK, batch.passages_NK, batch.relevance))


def targets(teacher: TeacherScores) -> torch.Tensor:
    """The softmax of the logits, which has no shifts."""
    return teacher.logits(slice(0, len(teacher.queries_BT)), torch.float64).softmax(1)


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_scores_have_the_targets_of_the_mix(kind: str) -> None:
    _, _, *vectors, scores = inputs()
    sparse = sparse_of(scores) if kind == "both" else None
    scaled = scaled_teacher(*vectors, sparse, MIX, TEACHER_TEMPERATURE)
    torch.testing.assert_close(targets(scaled), mixed(kind).softmax(1), rtol=1e-5, atol=1e-7)
    other = scaled_teacher(*vectors, sparse, (MIX[0] + 0.1, MIX[1]), TEACHER_TEMPERATURE)
    assert float((targets(other) - targets(scaled)).abs().max()) > 1e-3


def test_moments_of_parts_add_up() -> None:
    """More passages than are summed at a time."""
    passages = torch.randn(5000, T, generator=torch.Generator().manual_seed(0)) + 3
    moments = passage_moments(passages)
    torch.testing.assert_close(moments.products_TT, passages.double().T @ passages.double())
    queries = torch.randn(6, T, generator=torch.Generator().manual_seed(1))
    expected = (queries.double() @ passages.double().T).std(1, correction=0)
    torch.testing.assert_close(moments.deviations(queries), expected)


@pytest.mark.parametrize("passages", [1, 40])
def test_scores_that_are_all_the_same_say_nothing(passages: int) -> None:
    """One passage; equal passages, whose deviation is rounding; a query of zeros; full and empty rows of BM25."""
    queries = torch.randn(3, T, generator=torch.Generator().manual_seed(0))
    queries[1] = 0
    same = torch.randn(1, T, generator=torch.Generator().manual_seed(1)).repeat(passages, 1)
    scores = torch.zeros(3, passages)
    scores[2] = 7.3
    uniform = torch.full((3, passages), 1 / passages, dtype=torch.float64)
    torch.testing.assert_close(targets(scaled_teacher(queries, same, sparse_of(scores), MIX, 0.01)), uniform)
    some = same + torch.randn(passages, T, generator=torch.Generator().manual_seed(2))
    found = targets(scaled_teacher(queries, some, sparse_of(scores), MIX, 0.01))
    torch.testing.assert_close(found[1], uniform[1])
    assert passages == 1 or float(found[[0, 2]].amax()) > 0.9


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    _, _, *vectors, _ = inputs()
    with pytest.raises(ValueError, match=r"temperature=.*: expected more than 0"):
        scaled_teacher(*vectors, None, MIX, temperature)

"""Every backend of the soft targets against the float64 oracle: values, gradients, odd sizes, parts, memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import (
    DIMS,
    ON_GPU,
    WEIGHTS,
    K,
    allowed,
    assert_gradients_close,
    device_of,
    every_backend,
    every_case,
    inputs,
    uninterpreted,
)
from scipy.sparse import csr_matrix
from teachers import KINDS, T, assert_close, ours_and_truth, outcome, sparse_of, teacher
from test_backends import Held
from torch.nn.functional import kl_div, normalize

from drama_dist.kernels import SparseLogits, TeacherScores, soft_targets
from drama_dist.kernels.info_nce import backends
from drama_dist.kernels.info_nce import cpu as KERNEL
from drama_dist.kernels.info_nce.problem import Distillation
from drama_dist.kernels.info_nce.reference import soft_targets_reference

SHAPES = [(1, 1), (1, 5), (9, 7), (33, 70)]
# Triton's interpreter takes seconds for each: by default one of each dtype.
INTERPRETED = {((9, 7), "both", torch.float32), ((9, 7), "dense", torch.float16)}
GIVEN: dict[str, Any] = {"temperature": 0.05, "dims": DIMS, "dim_weights": WEIGHTS}


def close_in(dtype: torch.dtype) -> float:
    """Of losses; bfloat16's products are PyTorch's and the CPU's."""
    return {torch.float64: 1e-12, torch.bfloat16: 2e-4}.get(dtype, 2e-6)


@every_case(SHAPES, KINDS, INTERPRETED)
def test_loss_and_gradients_equal_the_reference(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], option: str
) -> None:
    (ours, gradients), (truth, exact) = ours_and_truth(backend, shape, dtype, option)
    assert_close(ours, truth, close_in(dtype))
    assert_gradients_close(gradients, exact, dtype)


@uninterpreted
def test_float32_errs_no_more_than_plain_pytorch(backend: str) -> None:
    """Relative errors of loss and gradients, the mean of several draws; 3e-7 is two units in the last place."""
    errors = []
    for shape in ((33, 70), (29, 66), (35, 40), (20, 64)):
        queries, passages, *_ = inputs(*shape, torch.float32, device_of(backend))
        (ours, gradients), (truth, exact) = ours_and_truth(backend, shape, torch.float32, "both", 0.02)
        scores = teacher("both", *shape, device_of(backend))
        problem = Distillation(teacher=scores, dims=tuple(DIMS[::-1]), weights=tuple(WEIGHTS[::-1]))
        plain, *_ = soft_targets_reference(queries, passages, 0.02, problem, torch.float32)
        theirs = torch.autograd.grad(2.5 * plain, (queries, passages))
        losses = [side.detach() for side in (ours.loss, plain, truth.loss)]
        triples = [losses, *zip(gradients, theirs, exact, strict=True)]
        errors.append([[float((side - its).norm() / its.norm()) for side in sides] for *sides, its in triples])
    for ours_error, plain_error in torch.tensor(errors).mean(0).tolist():
        assert ours_error <= plain_error + 3e-7


@uninterpreted
@pytest.mark.parametrize("dims", [[K], [5], DIMS], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0])
def test_other_dims_and_temperatures_equal_the_reference(backend: str, temperature: float, dims: list[int]) -> None:
    (ours, gradients), (truth, exact) = ours_and_truth(backend, (33, 70), torch.float32, "both", temperature, dims)
    assert_close(ours, truth, 2e-6)
    assert_gradients_close(gradients, exact, torch.float32)


@pytest.mark.usefixtures("nan_in_new_memory", "instructions")
@pytest.mark.parametrize(("rows", "columns"), [(300, 520), (49, 200), (16, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_tiles_of_every_instruction_set(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Whole and partial tiles, a teacher of more components than one part of a product's depth."""
    generator = torch.Generator().manual_seed(6)
    sides = [torch.randn(count, 600, generator=generator).to(dtype) for count in (rows, columns)]
    dense = [0.2 * torch.randn(count, 300, generator=generator) for count in (rows, columns)]
    scores = TeacherScores(*dense, teacher("both", rows, columns).sparse)
    given: dict[str, Any] = {"temperature": 0.05, "dims": [600, 300]}
    ours, gradients = outcome("cpu", *sides, scores, **given)
    truth, exact = outcome("reference", *(side.double() for side in sides), scores, **given)
    assert KERNEL.extension() is not None
    assert_close(ours, truth, 2e-3 if dtype == torch.bfloat16 else 4e-6)
    for gradient, its in zip(gradients, exact, strict=True):
        bound = 2e-2 if dtype == torch.bfloat16 else 4e-6
        assert float((gradient - its).abs().max()) <= bound * float(its.abs().max())


def test_the_reference_is_pytorchs_divergence() -> None:
    queries, passages, *_ = inputs(9, 7, torch.float64)
    scores = teacher("both", 9, 7)
    assert scores.sparse is not None
    dense = csr_matrix((scores.sparse.values, scores.sparse.columns, scores.sparse.starts), (9, 7)).toarray()
    logits = scores.queries_BT.double() @ scores.passages_NT.double().T + torch.tensor(dense).double()
    expected = []
    for dim in DIMS:
        student = normalize(queries[:, :dim]) @ normalize(passages[:, :dim]).T / 0.05
        expected.append(kl_div(student.log_softmax(1), logits.softmax(1), reduction="batchmean"))
    result = soft_targets(queries, passages, scores, backend="reference", **GIVEN)
    torch.testing.assert_close(result.per_dim, torch.stack(expected).detach())
    torch.testing.assert_close(result.loss, sum(w * one for w, one in zip(WEIGHTS, expected, strict=True)))
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(result.entropy, entropies.mean())


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    queries, passages, *_ = inputs(4, 6, torch.float64)
    scores = teacher("both", 4, 6)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return soft_targets(*leaves, scores, temperature=0.3, dims=[5, 2, 3], dim_weights=WEIGHTS, backend=backend).loss

    assert torch.autograd.gradcheck(loss, (queries[:, :6], passages[:, :6]))


@every_backend
def test_a_teacher_that_is_the_student_has_nothing_to_teach(backend: str) -> None:
    """And one whose columns are shifted by one has."""
    queries, passages, *_ = (side.detach() for side in inputs(9, 7, torch.float32, device_of(backend)))
    itself = TeacherScores(normalize(queries[:, :20]) / 0.1, normalize(passages[:, :20]))
    same, gradients = outcome(backend, queries, passages, itself, temperature=0.1, dims=[20])
    assert abs(float(same.loss.detach())) < 1e-5 and max(float(each.abs().max()) for each in gradients) < 1e-5
    shifted = dataclasses.replace(itself, passages_NT=itself.passages_NT.roll(1, 0))
    other, gradients = outcome(backend, queries, passages, shifted, temperature=0.1, dims=[20])
    assert float(other.loss.detach()) > 0.1 and min(float(each.abs().max()) for each in gradients) > 0.01


@uninterpreted
def test_sparse_logits_are_those_of_a_dense_teacher(backend: str) -> None:
    """One passage's logits shifted by a column are noticed; int64 columns are those of int32."""
    queries, passages, *_ = inputs(9, 7, torch.float32, device_of(backend))
    logits = 4 * torch.randn(9, 7, generator=torch.Generator().manual_seed(2)).to(queries.device)
    dense = TeacherScores(logits, torch.eye(7, device=queries.device))
    sparse = [
        dataclasses.replace(teacher("sparse", 9, 7, device_of(backend)), sparse=sparse_of(matrix, columns))
        for matrix, columns in ((logits, torch.int32), (logits, torch.int64), (logits.roll(1, 1), torch.int32))
    ]
    results = [outcome(backend, queries, passages, scores, **GIVEN) for scores in (dense, *sparse)]
    for result, gradients in results[1:3]:
        assert_close(result, results[0][0], 1e-6)
        assert_gradients_close(gradients, results[0][1], torch.float32)
    assert abs(float((results[3][0].loss - results[0][0].loss).detach())) > 0.1


@uninterpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-4, 1e3, 4e3])
def test_small_and_large_logits(backend: str, kind: str, scale: float) -> None:
    """Up to 1e4 and more, where float32's steps are a thousandth: targets are right to about that."""
    scores = teacher(kind, 33, 70, scale=scale)
    assert scale < 1 or float(scores.logits(slice(0, 33), torch.float64).abs().max()) > 1e4 * scale / 4e3
    (ours, gradients), (truth, exact) = ours_and_truth(backend, (33, 70), torch.float32, kind, scale=scale)
    assert all(bool(each.isfinite().all()) for each in (ours.loss, ours.per_dim, ours.entropy, *gradients))
    close = max(2e-6, 1e-6 * scale)
    assert_close(ours, truth, close)
    for gradient, its in zip(gradients, exact, strict=True):
        assert float((gradient - its).abs().max()) <= 2 * close * float(its.abs().max()) + 1e-7


@uninterpreted
def test_a_shift_of_a_rows_logits_changes_nothing(backend: str) -> None:
    queries, passages, *_ = inputs(9, 7, torch.float32, device_of(backend))
    scores = teacher("dense", 9, 7, device_of(backend))
    shifts, ones = torch.tensor([[-100.0], [0.0], [100.0]]).repeat(3, 1), torch.ones(7, 1)
    shifted = TeacherScores(
        torch.cat([scores.queries_BT, shifts.to(queries.device)], 1),
        torch.cat([scores.passages_NT, ones.to(queries.device)], 1),
    )
    plain, moved = (outcome(backend, queries, passages, each, **GIVEN) for each in (scores, shifted))
    assert_close(moved[0], plain[0], 2e-5)
    torch.testing.assert_close(moved[1][0], plain[1][0], rtol=1e-3, atol=1e-4)


@uninterpreted
def test_zero_vectors_score_nothing_and_get_no_gradient(backend: str) -> None:
    queries, passages, *_ = (side.detach() for side in inputs(9, 12, torch.float32, device_of(backend)))
    queries[2] = passages[3] = passages[11] = 0
    queries[4, :5] = passages[5, :20] = 0  # zero in some dims only
    scores = teacher("both", 9, 12, device_of(backend))
    (ours, gradients), (truth, exact) = (
        outcome(name, queries, passages, scores, **GIVEN) for name in (backend, "reference")
    )
    assert_close(ours, truth, 2e-6)
    for gradient, its in zip(gradients, exact, strict=True):  # by row: some are larger by orders of magnitude
        assert bool(
            ((gradient - its).abs() <= 3 * allowed(torch.float32) * its.abs().amax(1, keepdim=True) + 1e-7).all()
        )
    assert all(bool((row == 0).all()) for row in (gradients[0][2], gradients[1][3], gradients[1][11]))


@uninterpreted
@pytest.mark.parametrize("power", [70, 120])
def test_huge_values_have_the_loss_of_ordinary_ones(backend: str, power: int) -> None:
    queries, passages, *_ = (side.detach() for side in inputs(9, 12, torch.float32, device_of(backend)))
    scores = teacher("both", 9, 12, device_of(backend))
    ordinary, _ = outcome(backend, queries, passages, scores, **GIVEN)
    queries[[0, 5]] *= 2.0**power
    passages[[1, 11]] *= 2.0**power
    assert_close(outcome(backend, queries, passages, scores, **GIVEN)[0], ordinary, 1e-6)


@uninterpreted
@pytest.mark.parametrize("where", ["passages", "teacher", "sparse"])
def test_what_is_not_a_number_shows_in_the_loss(backend: str, where: str) -> None:
    queries, passages, *_ = (side.detach() for side in inputs(3, 40, torch.float32, device_of(backend)))
    scores = teacher("both", 3, 40, device_of(backend))
    assert scores.sparse is not None
    {"passages": passages, "teacher": scores.passages_NT, "sparse": scores.sparse.values[:, None]}[where][7] = torch.nan
    result = soft_targets(queries, passages, scores, backend=backend, **GIVEN)
    assert result.loss.isnan() and (where == "passages" or result.entropy.isnan())


@pytest.mark.usefixtures("nan_in_new_memory")
@every_backend
def test_nothing_is_read_before_it_is_written(backend: str) -> None:
    (ours, gradients), (truth, exact) = ours_and_truth(backend, (9, 7), torch.float32, "both")
    assert_close(ours, truth, 2e-6)
    assert_gradients_close(gradients, exact, torch.float32)


@uninterpreted
def test_the_same_to_the_bit_when_run_again_and_without_gradients(backend: str) -> None:
    runs = [ours_and_truth(backend, (33, 70), torch.float32, "both")[0] for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert all(torch.equal(first, second) for first, second in zip(runs[0][1], runs[1][1], strict=True))
    queries, passages, *_ = inputs(33, 70, torch.float32, device_of(backend))
    with torch.no_grad():
        without = soft_targets(queries, passages, teacher("both", 33, 70, device_of(backend)), backend=backend, **GIVEN)
    assert torch.equal(runs[0][0].loss, without.loss) and not without.loss.requires_grad


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"], indirect=True)
def test_autocast_changes_nothing_and_the_teacher_gets_no_gradient(backend: str) -> None:
    queries, passages, *_ = inputs(9, 7, torch.float32)
    scores = teacher("both", 9, 7)
    scores.queries_BT.requires_grad_()
    plain = outcome(backend, queries, passages, scores, **GIVEN)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outcome(backend, queries, passages, scores, **GIVEN)
    assert torch.equal(plain[0].loss, cast[0].loss)
    assert all(torch.equal(one, other) for one, other in zip(plain[1], cast[1], strict=True))
    assert not any(each.requires_grad for each in (plain[0].per_dim, plain[0].entropy))
    soft_targets(queries, passages, scores, backend=backend, **GIVEN).loss.backward()
    assert queries.grad is not None and scores.queries_BT.grad is None


@every_backend
def test_second_order_gradients_are_refused(backend: str) -> None:
    queries, passages, *_ = inputs(3, 5, torch.float32, device_of(backend))
    loss = soft_targets(queries, passages, teacher("both", 3, 5, device_of(backend)), backend=backend, **GIVEN).loss
    with pytest.raises(RuntimeError, match=r"soft_targets has no second-order gradients: .* backend='reference'"):
        torch.autograd.grad(loss, queries, create_graph=True)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [(name, *size) for name in ("eager", "cpu") for size in ((1300, 2500), (300, 9000))]
    + [pytest.param(name, *size, marks=pytest.mark.slow) for name in ON_GPU for size in ((130, 400), (40, 900))],
)
def test_no_more_is_held_than_it_says(name: str, rows: int, columns: int) -> None:
    """And never a whole matrix of scores, where there is more than one chunk; sparse logits count by their entries."""
    backend = backends.named_backend(name, torch.device(device_of(name)), torch.float32)
    queries, passages = (torch.randn(count, 96, device=device_of(name)).requires_grad_() for count in (rows, columns))
    dense = [torch.randn(count, T, device=device_of(name)) for count in (rows, columns)]
    few = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.01
    sparse = sparse_of(few.to(device_of(name)).float())
    given = (queries, passages, *dense, sparse.starts, sparse.columns, sparse.values)
    with Held(*given) as held:
        soft_targets(queries, passages, TeacherScores(*dense, sparse), temperature=0.1, dims=(96, 32), backend=name)
    said = backend.held_bytes(rows, columns, (96, 32), torch.get_num_threads(), teacher=T)
    said += 40 * len(sparse.columns)
    assert said / 2 < held.peak <= said
    assert backend.chunks(rows, columns, (96, 32), teacher=T)[0].stop * columns * 4 * 3 < said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"queries_BT": torch.ones(3, 4)},
            r"teacher.queries_BT: expected 2 float32 vectors, got \(3, 4\) torch.float32",
        ),
        ({"passages_NT": torch.ones(5, 4, dtype=torch.float64)}, r"teacher.passages_NT: expected 5 float32 vectors"),
        ({"passages_NT": torch.ones(5, 3)}, "vectors of one length, got 4 for queries and 3 for passages"),
        ({"sparse": torch.zeros(2, 5)}, "teacher.sparse: expected SparseLogits, got Tensor"),
        ({"starts": torch.tensor([0, 1])}, r"teacher.sparse.starts: expected 3 of int64, got \(2,\)"),
        ({"starts": torch.tensor([0, 2, 2])}, "teacher.sparse.starts: expected to ascend from 0 to the 3 entries"),
        ({"starts": torch.tensor([0, 4, 3])}, "teacher.sparse.starts: expected to ascend"),
        ({"columns": torch.tensor([0.0, 3.0, 1.0])}, "teacher.sparse.columns: expected 3 of int32 or int64"),
        ({"columns": torch.tensor([0, 5, 1])}, "teacher.sparse.columns: names columns 0..5 of 5"),
        ({"columns": torch.tensor([3, 0, 1])}, "teacher.sparse.columns: expected to ascend in every row"),
        ({"columns": torch.tensor([3, 3, 1])}, "teacher.sparse.columns: expected to ascend in every row"),
        ({"values": torch.ones(2)}, "teacher.sparse.values: expected 3 of float32"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_teachers_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    queries, passages, *_ = inputs(2, 5, torch.float32)
    entries = {"starts": torch.tensor([0, 2, 3]), "columns": torch.tensor([0, 3, 1]), "values": torch.ones(3)}
    sparse = SparseLogits(**{name: change.get(name, value) for name, value in entries.items()})
    sides = {"queries_BT": torch.ones(2, 4), "passages_NT": torch.ones(5, 4), "sparse": sparse}
    scores = TeacherScores(**{name: change.get(name, value) for name, value in sides.items()})
    with pytest.raises(ValueError, match=message):
        soft_targets(queries, passages, scores, temperature=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"dims": [3, 3]}, "different"),
        ({"dim_weights": [1.0, 2.0]}, "dim_weights"),
        ({"backend": "triton"}, "backend='triton': expected one of"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    queries, passages, *_ = inputs(2, 5, torch.float32)
    with pytest.raises(ValueError, match=message):
        soft_targets(queries, passages, teacher("both", 2, 5), **{"temperature": 0.1, **change})

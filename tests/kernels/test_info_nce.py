"""Every backend of the loss against the float64 oracle: values, gradients, all options, odd sizes, extremes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from drama_dist.kernels import ColumnPart, Distillation, InfoNCE, TeacherMargin, compiled_tiles, info_nce, libraries
from drama_dist.kernels.problem import Problem
from drama_dist.kernels.reference import info_nce_reference

K, DIMS, WEIGHTS = 37, [33, 20, 5], [0.5, 0.2, 0.3]
SHAPES = [(1, 1), (1, 5), (7, 9), (33, 70)]
OPTIONS = ["plain", "same document", "excluded", "teacher", "hardness", "symmetric", "everything"]
GPU = torch.cuda.is_available()
BACKENDS = {
    "eager": ("streaming", [torch.float64, torch.float32]),
    "compiled": ("streaming", [torch.float32, torch.bfloat16]),
    "triton": ("triton", [torch.float32, torch.float16]),
    "triton-separate": ("triton-separate", [torch.float32, torch.float16]),
    "triton-shared": ("triton-shared", [torch.float32, torch.float16]),
}


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name that info_nce knows; eager hides the compiler's work."""
    if request.param == "eager":
        monkeypatch.setattr(compiled_tiles, "extension", lambda: None)
        monkeypatch.setattr("drama_dist.kernels.eager_tiles._SCORE_BYTES", 4 * 3 * 70 * 5)  # several chunks
    monkeypatch.setattr(compiled_tiles, "_SCORE_BYTES", 4 * 3 * 70 * 12)
    monkeypatch.setattr(compiled_tiles, "_ROW_STEP", 12)
    if request.param == "compiled":
        assert compiled_tiles.extension() is not None
        assert compiled_tiles.chunk_rows(33, 70, DIMS) == [12, 12, 9]
    return BACKENDS[request.param][0]


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend.startswith("triton") else "cpu"


def inputs(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Queries, passages (views into buffers of NaN), positives and ids."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    sides = []
    for count, scale in ((rows, 1), (columns, 3)):
        buffer = torch.full((count, K + 4), torch.nan, dtype=dtype, device=device)
        buffer[:, :K] = scale * torch.randn(count, K, generator=generator, dtype=torch.float64).to(buffer)
        sides.append(buffer[:, :K].requires_grad_())
    positives = torch.randint(columns, (rows,), generator=generator)
    ids = torch.randint(max(1, columns // 2), (columns,), generator=generator)
    return *sides, positives.to(device), ids.to(device)


def options(name: str, rows: int, columns: int, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of info_nce."""
    generator = torch.Generator().manual_seed(5)
    excluded = torch.randint(-1, max(1, columns // 2), (rows, 3), generator=generator).to(ids)
    vectors = [torch.randint(-3, 4, (count, 6), generator=generator).float() + 0.5 for count in (rows, columns)]
    found: dict[str, Any] = {}
    if name in ("same document", "excluded", "everything"):
        found["passage_ids"] = ids
    if name in ("excluded", "everything"):
        found["excluded_ids"] = excluded
    if name in ("teacher", "everything"):
        found["teacher"] = TeacherMargin(vectors[0].to(ids.device), vectors[1].to(ids.device), 0.1003)
    if name in ("hardness", "everything"):
        found["hardness"] = 3.0
    if name in ("symmetric", "everything"):
        found["symmetric"] = 0.7
    if name == "everything":
        own = torch.randint(-1, columns, (rows, 4), generator=generator)
        scores = torch.randn(rows, 4, generator=generator)
        found["distillation"] = Distillation(own.to(ids.device), scores.to(ids.device), 0.4)
    return found


def ours_and_truth(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, name: str, temperature: float, device: str = "cpu"
) -> tuple[tuple[InfoNCE, list[torch.Tensor]], tuple[InfoNCE, list[torch.Tensor]]]:
    """Result and gradients (queries, passages, temperature) of a backend, and of the oracle."""
    queries, passages, positives, ids = inputs(*shape, dtype, device)
    both = []
    for chosen in (backend, "reference"):
        learned = torch.tensor(
            temperature, dtype=torch.promote_types(dtype, torch.float32), device=device, requires_grad=True
        )
        result = info_nce(
            queries,
            passages,
            positives,
            temperature=learned,
            dims=DIMS,
            dim_weights=WEIGHTS,
            backend=chosen,
            **options(name, *shape, ids),
        )
        leaves = queries, passages, learned
        both.append((result, [gradient.double() for gradient in torch.autograd.grad(2.5 * result.loss, leaves)]))
    return both[0], both[1]


def allowed(dtype: torch.dtype) -> float:
    """Of the largest gradient: sums in float32, operands and results rounded to the inputs' precision."""
    return {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


CASES = [
    pytest.param(name, dtype, shape, option, temperature, id=f"{name}-{str(dtype)[6:]}-{shape}-{option}-{temperature}")
    for name, (_, dtypes) in BACKENDS.items()
    for dtype in dtypes
    for shape in SHAPES
    for option, temperature in ((option, 0.05) for option in OPTIONS)
    # The interpreter takes seconds for each: all options where there are several tiles, else one of each kind.
    if not name.startswith("triton") or (shape == (33, 70) and option in ("plain", "everything")) or shape == (7, 9)
]


@pytest.mark.parametrize(("backend", "dtype", "shape", "option", "temperature"), CASES, indirect=["backend"])
def test_loss_and_gradients_equal_the_reference(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], option: str, temperature: float
) -> None:
    device = device_of(backend)
    (ours, found), (truth, expected) = ours_and_truth(backend, shape, dtype, option, temperature, device)
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    loose = tight if dtype != torch.bfloat16 else 2e-4  # bfloat16's products are PyTorch's and the CPU's
    torch.testing.assert_close(ours.loss.double(), truth.loss.double(), rtol=loose, atol=loose)
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim.double(), rtol=loose, atol=loose)
    for own, theirs in zip(found, expected, strict=True):
        assert float((own - theirs).abs().max()) <= allowed(dtype) * float(theirs.abs().max()) + 1e-7


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_float32_errs_no_more_than_plain_pytorch(backend: str) -> None:
    """Relative errors of loss and gradients, the mean of several draws; 3e-7 is two units in the last place."""
    device = device_of(backend)
    errors = []
    for shape in ((33, 70), (29, 66), (35, 40), (20, 64)):
        queries, passages, positives, _ = inputs(*shape, torch.float32, device)
        (ours, found), (truth, expected) = ours_and_truth(backend, shape, torch.float32, "plain", 0.02, device)
        problem = Problem(positives, tuple(DIMS[::-1]), tuple(WEIGHTS[::-1]))
        plain, _ = info_nce_reference(queries, passages, 0.02, problem, torch.float32)
        theirs = torch.autograd.grad(2.5 * plain, (queries, passages))
        pairs = [(ours.loss, plain, truth.loss), *zip(found, theirs, expected, strict=False)]
        errors.append(
            [[float((side - exact).detach().norm() / exact.norm()) for side in sides] for *sides, exact in pairs]
        )
    for own, other in torch.tensor(errors).mean(0).tolist():
        assert own <= other + 3e-7


def test_the_comparison_notices_a_wrong_weight() -> None:
    queries, passages, positives, _ = inputs(9, 12, torch.float64)
    ours = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, dim_weights=WEIGHTS)
    swapped = info_nce(
        queries, passages, positives, temperature=0.1, dims=DIMS, dim_weights=WEIGHTS[::-1], backend="reference"
    )
    assert abs(float((ours.loss - swapped.loss).detach())) > 1e-3


@pytest.mark.parametrize("option", ["plain", "same document", "symmetric"])
def test_gradients_are_those_of_finite_differences(option: str) -> None:
    queries, passages, positives, ids = inputs(4, 6, torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        given = options(option, 4, 6, ids)
        return info_nce(leaves[0], leaves[1], positives, temperature=leaves[2], dims=DIMS, **given).loss

    assert torch.autograd.gradcheck(loss, (queries, passages, temperature))


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_nothing_is_read_before_it_is_written(backend: str) -> None:
    assert torch.empty(3).isnan().all()
    device = device_of(backend)
    (ours, found), (truth, expected) = ours_and_truth(backend, (7, 9), torch.float32, "everything", 0.05, device)
    torch.testing.assert_close(ours.loss.double(), truth.loss.double(), rtol=2e-6, atol=2e-6)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "compiled", "triton", "triton-separate"], indirect=True)
def test_the_same_to_the_bit_when_run_again(backend: str) -> None:
    device = device_of(backend)
    runs = [ours_and_truth(backend, (33, 70), torch.float32, "plain", 0.05, device)[0] for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert all(torch.equal(own, again) for own, again in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("backend", ["eager", "compiled", "triton", "triton-separate"], indirect=True)
def test_accuracy_margins_and_masked_pairs_are_those_of_the_scores(backend: str) -> None:
    queries, passages, positives, ids = inputs(20, 30, torch.float32, device_of(backend))
    result = info_nce(queries, passages, positives, temperature=0.5, dims=DIMS, passage_ids=ids, backend=backend)
    scores = normalize(queries[:, :33]) @ normalize(passages[:, :33]).T / 0.5
    own = scores.gather(1, positives[:, None])[:, 0]
    same = (ids == ids[positives][:, None]).scatter(1, positives[:, None], True)
    rivals = scores.masked_fill(same, -torch.inf).amax(1)
    assert result.accuracy is not None and result.margins is not None and result.margin is not None
    assert float(result.accuracy) == pytest.approx(float((own > rivals).float().mean()))
    torch.testing.assert_close(result.margins, (own - rivals).detach(), rtol=1e-5, atol=1e-5)
    assert float(result.margin) == pytest.approx(float((own - rivals).mean()), rel=1e-5)
    assert result.masked is not None and int(result.masked) == int(same.sum()) - 20


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
@pytest.mark.parametrize("symmetric", [0.0, 1.0])
def test_a_query_with_no_rival_has_no_loss_and_no_gradient(backend: str, symmetric: float) -> None:
    queries, passages, _, _ = inputs(3, 4, torch.float32, device_of(backend))
    result = info_nce(
        queries,
        passages,
        torch.tensor([0, 1, 2], device=queries.device),
        temperature=0.1,
        dims=DIMS,
        passage_ids=torch.zeros(4, dtype=torch.int64, device=queries.device),
        symmetric=symmetric,
        backend=backend,
    )
    gradients = torch.autograd.grad(result.loss, (queries, passages))
    assert float(result.loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    assert result.margins is not None and result.margins.isnan().all()
    assert result.accuracy is not None and float(result.accuracy) == 1


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
@pytest.mark.parametrize("temperature", [0.01, 1e-3])
def test_a_tiny_temperature_does_not_overflow(backend: str, temperature: float) -> None:
    queries, passages, positives, _ = inputs(8, 16, torch.float32, device_of(backend))
    result = info_nce(queries, passages, positives, temperature=temperature, dims=DIMS, backend=backend)
    truth = info_nce(queries, passages, positives, temperature=temperature, dims=DIMS, backend="reference")
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(result.loss, (queries, passages))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["eager", "compiled", "triton", "triton-separate"], indirect=True)
def test_without_gradients_there_is_the_same_loss(backend: str) -> None:
    queries, passages, positives, _ = inputs(8, 16, torch.float32, device_of(backend))
    with_gradients = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, backend=backend)
    with torch.no_grad():
        without = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, backend=backend)
    assert torch.equal(with_gradients.loss, without.loss) and not without.loss.requires_grad


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(name: str, openmp: bool) -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(libraries, "_build", no_compiler)
    libraries.library.cache_clear()
    queries, passages, positives, _ = inputs(3, 4, torch.float32)
    with pytest.warns(UserWarning, match=r"tiles.cpp was not compiled \(no g\+\+\).*install a C\+\+ compiler"):
        info_nce(queries, passages, positives, temperature=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_nce(queries, passages, positives, temperature=0.1)
    libraries.library.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"dims": [K + 1]}, rf"dims=\[{K + 1}\]: expected different numbers from 1 to {K}"),
        ({"dims": [3, 3]}, "different"),
        ({"dim_weights": [1.0, 2.0]}, "dim_weights"),
        ({"positives": torch.tensor([0, 9])}, "positives name columns 0..9 of 5"),
        ({"positives": torch.tensor([0])}, "expected 2 int64 positives"),
        ({"passage_ids": torch.tensor([0])}, "expected 5 passage ids"),
        ({"excluded_ids": torch.tensor([[0], [1]])}, "beside passage_ids"),
        ({"teacher": TeacherMargin(torch.ones(2, 3), torch.ones(4, 3))}, "expected 2 and 5 vectors of the teacher"),
        ({"distillation": Distillation(torch.tensor([[0], [9]]), torch.zeros(2, 1))}, "own passages name column 9"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"passages": torch.ones(5, K, dtype=torch.float64)}, "of one dtype on one device, got torch.float32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    queries, passages, positives, _ = inputs(2, 5, torch.float32)
    given = {"passages": passages, "positives": positives, "temperature": 0.1}
    arguments: dict[str, Any] = {**given, **change}
    with pytest.raises(ValueError, match=message):
        info_nce(queries, **arguments)


@pytest.mark.parametrize("backend", ["eager", "compiled"], indirect=True)
def test_a_passage_that_is_not_a_number_shows_in_the_loss(backend: str) -> None:
    queries, passages, positives, _ = inputs(3, 40, torch.float32)
    broken = passages.detach().clone()
    broken[next(column for column in range(40) if column not in positives)] = torch.nan
    assert info_nce(queries, broken, positives, temperature=0.1, backend=backend).loss.isnan()


def test_triton_on_the_cpu_is_refused_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    queries, passages, positives, _ = inputs(2, 5, torch.float32)
    with pytest.raises(ValueError, match="the vectors are on cpu, expected CUDA"):
        info_nce(queries, passages, positives, temperature=0.1, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "triton-separate"])
def test_triton_refuses_what_it_cannot_take(backend: str) -> None:
    queries, passages, positives, _ = inputs(2, 5, torch.float64, device_of("triton"))
    with pytest.raises(ValueError, match="triton backends take float32, bfloat16 or float16"):
        info_nce(queries, passages, positives, temperature=0.1, backend=backend)


CUTS = (0, 1, 31, 70)  # of the columns into parts


def in_parts(backend: str, dtype: torch.dtype, merged: bool) -> tuple[list[InfoNCE], list[torch.Tensor]]:
    """Three threads with a part of the columns each: their results; and the gradients of queries and passages."""
    queries, passages, positives, ids = inputs(33, 70, dtype, device_of(backend))
    excluded = options("excluded", 33, 70, ids)["excluded_ids"]
    slots: list[tuple[torch.Tensor, ...]] = [()] * (len(CUTS) - 1)
    meeting, turn = threading.Barrier(len(slots)), threading.Lock()  # Triton's interpreter takes one thread at a time

    def merge_of(place: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def merge(*own: torch.Tensor) -> tuple[torch.Tensor, ...]:
            slots[place] = own
            turn.release()
            meeting.wait(120)
            positive, rivals, best = (torch.stack(each) for each in zip(*slots, strict=True))
            meeting.wait(120)
            turn.acquire()
            return (positive.sum(0), rivals.logsumexp(0), best.amax(0)) if merged else own

        return merge

    def run(place: int) -> tuple[InfoNCE, list[torch.Tensor]]:
        begin, end = CUTS[place : place + 2]
        leaves = queries.detach().requires_grad_(), passages[begin:end].detach().requires_grad_()
        here = torch.where((positives >= begin) & (positives < end), positives - begin, -1)
        with turn:
            result = info_nce(
                *leaves,
                here,
                temperature=0.05,
                dims=DIMS,
                dim_weights=WEIGHTS,
                passage_ids=ids[begin:end],
                excluded_ids=excluded,
                part=ColumnPart(ids[positives], 39, merge_of(place)),
                backend=backend,
            )
            return result, list(torch.autograd.grad(result.loss, leaves))

    with ThreadPoolExecutor(len(slots)) as pool:
        results, gradients = zip(*pool.map(run, range(len(slots))), strict=True)
    return list(results), [sum(each[0] for each in gradients), torch.cat([each[1] for each in gradients])]


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_parts_of_the_columns_make_up_the_whole(backend: str) -> None:
    dtype = torch.float32
    queries, passages, positives, ids = inputs(33, 70, dtype, device_of(backend))
    excluded = options("excluded", 33, 70, ids)["excluded_ids"]
    given = {"dims": DIMS, "dim_weights": WEIGHTS, "passage_ids": ids, "excluded_ids": excluded}
    truth = info_nce(queries, passages, positives, temperature=0.05, backend="reference", **given)
    ours = info_nce(queries, passages, positives, temperature=0.05, backend=backend, **given)
    expected = torch.autograd.grad(truth.loss, (queries, passages))
    results, found = in_parts(backend, dtype, merged=True)
    for result in results:
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result.margins, ours.margins, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert sum(int(result.masked) for result in results) == int(ours.masked)
    for own, theirs in zip(found, expected, strict=True):
        assert float((own - theirs).abs().max()) <= allowed(dtype) * float(theirs.abs().max()) + 1e-7


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
def test_parts_that_are_not_merged_are_found_out(backend: str) -> None:
    results, _ = in_parts(backend, torch.float32, merged=False)
    losses = [float(result.loss.detach()) for result in results]
    assert max(losses) - min(losses) > 0.1


def test_a_part_refuses_what_needs_all_columns() -> None:
    queries, passages, positives, ids = inputs(7, 9, torch.float32)
    part = ColumnPart(ids[positives], 9, lambda *own: own)
    with pytest.raises(ValueError, match="part: expected no symmetric"):
        info_nce(queries, passages, positives, temperature=0.1, passage_ids=ids, part=part, symmetric=1.0)

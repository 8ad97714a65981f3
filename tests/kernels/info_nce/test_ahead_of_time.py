"""Every Triton kernel, compiled for chips that are not here, by the chips' own compilers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

ahead_of_time = pytest.importorskip("drama_dist.kernels.info_nce.ahead_of_time")
KERNELS = ("rows", "soft rows", "gradients", "norms", "finish")
# Bytes. Without ids this tile was the fastest timed (loss-cuda-bfloat16.md); with them it lacks four registers.
SPILLING = {("sm_90", "gradients fp32 3 dims 2×512 ids"): 16}


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    """Processes of their own: in this one Triton may be interpreting, and tiles are the interpreter's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "every"])
def test_no_registers_spill_but_those_known_and_shared_memory_fits(
    target: str, every: bool, compilers: ProcessPoolExecutor
) -> None:
    """Of each kernel the first variant, and the first with a teacher; or every one."""
    shipped = compilers.submit(ahead_of_time.variants).result()
    assert {variant.kernel for variant in shipped} == set(KERNELS)
    first = [next(variant for variant in shipped if variant.kernel == kernel) for kernel in KERNELS]
    first.append(next(variant for variant in shipped if dict(variant.constants).get("HAS_TEACHER")))
    tried = shipped if every else first
    reports = list(compilers.map(ahead_of_time.compile_variant, tried, [target] * len(tried)))
    spilled = {(target, variant.name): report.spilled for variant, report in zip(tried, reports, strict=True)}
    names = {(target, variant.name) for variant in tried}
    assert {name: size for name, size in spilled.items() if size} == {
        name: size for name, size in SPILLING.items() if name in names
    }
    assert max(report.shared for report in reports) <= ahead_of_time.SHARED_LIMITS[target]


def test_the_report_shows_a_spill_where_there_is_one(compilers: ProcessPoolExecutor) -> None:
    """A tile far too large for one warp."""
    variants = compilers.submit(ahead_of_time.variants).result()
    rows = next(variant for variant in variants if variant.kernel == "rows")
    narrow = dataclasses.replace(rows, warps=1, constants=(*rows.constants[:-1], ("BLOCK_C", 1024)))
    assert compilers.submit(ahead_of_time.compile_variant, narrow, "sm_80").result().spilled > 0


# Of training's own kernels on Hopper: instructions for each score and dim outside the loops over components, and bytes
# that may spill. What was counted, rounded up (benchmarks/results/kernels-fused.md).
COUNTED = {"fused rows": (13, 0), "fused gradients": (18, 1300)}


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_100",))])
def test_fused_kernels_have_matrix_instructions_and_few_others(target: str, compilers: ProcessPoolExecutor) -> None:
    """The two of training: one exponential for a score and dim, and a dozen other instructions."""
    shipped = compilers.submit(ahead_of_time.fused_variants, target).result()
    reports = list(compilers.map(ahead_of_time.compile_variant, shipped[:2], [target] * 2))
    for variant, report in zip(shipped, reports, strict=False):
        assert report.shared <= ahead_of_time.SHARED_LIMITS[target]
        assert 1 <= report.exponentials < 1.1
        assert report.matrix.startswith("HGMMA" if target == "sm_90" else "UTC")
        if target == "sm_90":
            most, spilled = COUNTED[variant.kernel]
            assert report.outside <= most and report.spilled <= spilled


@pytest.mark.slow
@pytest.mark.parametrize("target", list(ahead_of_time.TARGETS))
def test_every_fused_kernel_compiles_and_fits(target: str, compilers: ProcessPoolExecutor) -> None:
    shipped = compilers.submit(ahead_of_time.fused_variants, target).result()
    assert len({variant.kernel for variant in shipped}) == 6
    reports = compilers.map(ahead_of_time.compile_variant, shipped, [target] * len(shipped))
    assert max(report.shared for report in reports) <= ahead_of_time.SHARED_LIMITS[target]

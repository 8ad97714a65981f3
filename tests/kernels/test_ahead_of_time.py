"""Every kernel that the launchers ship, compiled for chips that are not here, by the chips' own compilers."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from drama_dist.kernels import ahead_of_time
from drama_dist.kernels.ahead_of_time import SHARED_LIMITS, TARGETS, Compiled, Variant


def shipped(target: str) -> list[Variant]:
    """In a process of its own: here, Triton may be interpreting."""
    return list(ahead_of_time.variants(target))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[Variant, Compiled]]:
    """What the compilers report of every variant for every target."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = [(variant, target) for target in TARGETS for variant in pool.submit(shipped, target).result()]
        reports = list(pool.map(ahead_of_time.compile_variant, *zip(*jobs, strict=True)))
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    found: dict[str, dict[Variant, Compiled]] = {target: {} for target in TARGETS}
    for (variant, target), report in zip(jobs, reports, strict=True):
        found[target][variant] = report
    return found


@pytest.mark.parametrize("target", list(TARGETS))
def test_registers_do_not_spill_and_shared_memory_fits(
    target: str, compiled: dict[str, dict[Variant, Compiled]]
) -> None:
    assert {variant.kernel for variant in compiled[target]} == {
        "forward",
        "separate",
        "shared",
        "pool_forward",
        "pool_backward",
    }
    spilled = {variant.name: report for variant, report in compiled[target].items() if report.spilled}
    assert not spilled
    assert max(report.shared for report in compiled[target].values()) <= SHARED_LIMITS[target]


def test_products_are_matrix_instructions(compiled: dict[str, dict[Variant, Compiled]]) -> None:
    kinds = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for target, kind in kinds.items():
        for variant, report in compiled[target].items():
            if variant.kernel.startswith("pool"):
                continue
            # Float32 by three TF32 products, and tiles of 32 rows, are for the older instruction.
            kinds_that_do = {kind, "mma"} if variant.precision == "fp32" else {kind}
            assert kinds_that_do & report.matrix_instructions.keys(), (target, variant.name)


def test_the_report_shows_a_spill_where_there_is_one() -> None:
    """A tile far too large for two warps."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        report = pool.submit(_spilling).result()
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before
    assert report.spilled > 0


def _spilling() -> Compiled:
    import dataclasses

    variant = next(one for one in ahead_of_time.variants("sm_80") if one.kernel == "forward")
    return ahead_of_time.compile_variant(dataclasses.replace(variant, warps=1), "sm_80")

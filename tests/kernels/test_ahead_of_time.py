"""Every kernel that the launchers ship, compiled for chips that are not here, by the chips' own compilers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from drama_dist.kernels import ahead_of_time
from drama_dist.kernels.ahead_of_time import SHARED_LIMITS, TARGETS, Compiled, Variant

STREAMING = ("rows", "columns", "gradients", "norms", "finish")  # between products that are the library's


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    """Processes of their own: in this one Triton may be interpreting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.fixture(scope="module")
def compiled(compilers: ProcessPoolExecutor) -> dict[str, dict[Variant, Compiled]]:
    """What the compilers report of every variant for every target."""
    shipped = [
        (variant, target) for target in TARGETS for variant in compilers.submit(ahead_of_time.variants, target).result()
    ]
    reports = compilers.map(ahead_of_time.compile_variant, *zip(*shipped, strict=True))
    found: dict[str, dict[Variant, Compiled]] = {target: {} for target in TARGETS}
    for (variant, target), report in zip(shipped, reports, strict=True):
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
        *STREAMING,
        "pool_forward",
        "pool_backward",
    }
    assert not [(variant.name, report.spilled) for variant, report in compiled[target].items() if report.spilled]
    assert max(report.shared for report in compiled[target].values()) <= SHARED_LIMITS[target]


def test_products_are_matrix_instructions(compiled: dict[str, dict[Variant, Compiled]]) -> None:
    kinds = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for target, kind in kinds.items():
        for variant, report in compiled[target].items():
            if variant.kernel.startswith("pool") or variant.kernel in STREAMING:
                continue
            # Float32 by three TF32 products, and tiles of 32 rows, are for the older instruction.
            kinds_that_do = {kind, "mma"} if variant.precision == "fp32" else {kind}
            assert kinds_that_do & report.matrix_instructions.keys(), (target, variant.name)


def test_the_report_shows_a_spill_where_there_is_one(compilers: ProcessPoolExecutor) -> None:
    """A tile far too large for one warp."""
    variants = compilers.submit(ahead_of_time.variants, "sm_80").result()
    forward = next(variant for variant in variants if variant.kernel == "forward")
    narrow = dataclasses.replace(forward, warps=1)
    assert compilers.submit(ahead_of_time.compile_variant, narrow, "sm_80").result().spilled > 0

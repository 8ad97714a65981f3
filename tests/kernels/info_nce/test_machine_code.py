"""Counting instructions by loop, on a listing small enough to count by hand."""

from __future__ import annotations

import pytest

machine_code = pytest.importorskip("drama_dist.kernels.info_nce.machine_code")
LISTING = """
\ts_mov_b32 s0, 0
.LBB0_1:
\tv_add_f32 v0, v0, v1
.LBB0_2:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v0, v1, a[0:15]
\tv_add_u32 v2, v2, v3
\ts_cbranch_scc1 .LBB0_2
\tv_exp_f32_e32 v4, v5
.LBB0_3:
\tv_cmp_eq_u32 vcc, v6, v7
\ts_cbranch_scc1 .LBB0_3
\tv_exp_f32_e32 v4, v6
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_a_tile_is_the_outer_loop_without_the_products() -> None:
    """Six outside: an addition, two exponentials, the loop without a product once, and the branch."""
    tile = machine_code.of_tile(machine_code.of_amd(LISTING))
    assert (tile.outside, tile.exponentials, tile.in_loops) == (6, 2, (3,))
    assert tile.matrix == "v_mfma_f32_32x32x8_bf16"


def test_a_loop_that_was_unrolled_is_outside() -> None:
    unrolled = LISTING.replace("\ts_cbranch_scc1 .LBB0_2\n", "")
    tile = machine_code.of_tile(machine_code.of_amd(unrolled))
    assert (tile.outside, tile.in_loops) == (8, ())


def test_code_without_a_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop"):
        machine_code.of_tile(machine_code.of_amd("\ts_mov_b32 s0, 0\n\ts_endpgm\n"))

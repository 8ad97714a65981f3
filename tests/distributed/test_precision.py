"""auto takes bfloat16 only where the device is fast in it."""

from __future__ import annotations

import pytest
import torch

from drama_dist.distributed import precision, ranks
from drama_dist.distributed.precision import AUTO, agreed_dtype_name, dtype_name, dtype_of


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 fma", "float32"), ("fpu avx512f avx512_bf16", "bfloat16"), ("asimd bf16", "bfloat16"), ("", "float32")],
)
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, flags: str, expected: str) -> None:
    monkeypatch.setattr(precision, "cpuinfo", lambda field: flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dtype_name(AUTO) == expected and dtype_of(AUTO) == getattr(torch, expected)


def test_ranks_agree_on_what_all_are_fast_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for others, expected in ((1, "bfloat16"), (0, "float32")):
        monkeypatch.setattr(ranks, "on_every_rank", lambda value, others=others: [value, others])
        assert agreed_dtype_name("bfloat16") == expected


def test_what_the_settings_name_is_taken() -> None:
    assert (dtype_name("bfloat16"), dtype_of("float32")) == ("bfloat16", torch.float32)

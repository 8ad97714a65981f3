"""The C++ libraries' build: what a killed process or a full disk leaves does not stop the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from drama_dist.kernels import native


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to build, in a cache of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "one.cpp"


def answer(source: Path, value: int) -> int:
    """What a library says that was built anew from a source that returns `value`."""
    source.write_text(f'extern "C" int drama_answer() {{ return {value}; }}\n', "utf-8")
    native.library.cache_clear()
    compiled = native.library(source, "no answer")
    native.library.cache_clear()
    assert compiled is not None
    return int(compiled.drama_answer())


def test_what_a_killed_build_leaves_is_no_hindrance_and_another_source_has_another_library(
    source: Path, tmp_path: Path
) -> None:
    assert answer(source, 1) == 1
    (built,) = (tmp_path / "cache").rglob("*.so")
    assert (built.parent / "builder").exists()
    built.unlink()
    (built.parent / "tmpkilled").mkdir()
    assert [answer(source, value) for value in (1, 2)] == [1, 2]
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2


def test_a_compilers_complaint_is_the_reason(source: Path) -> None:
    source.write_text("int answer() {\n  return five;\n}\n", "utf-8")
    native.library.cache_clear()
    with pytest.warns(UserWarning, match=r"one\.cpp was not compiled \(.*one.cpp:2.*five.*\): no answer; install"):
        assert native.library(source, "no answer") is None
    native.library.cache_clear()


@pytest.mark.parametrize("left", ["nothing", "half of it", "half of it, and no digest"])
def test_a_library_that_was_cut_short_is_built_again(source: Path, tmp_path: Path, left: str) -> None:
    assert answer(source, 3) == 3
    (built,) = (tmp_path / "cache").rglob("*.so")
    whole = built.read_bytes()
    built.unlink()  # a new file: the loaded one is mapped into this process
    built.write_bytes(whole[: 0 if left == "nothing" else len(whole) // 2])
    if "no digest" in left:
        built.with_suffix(".sha256").unlink()
    assert answer(source, 3) == 3
    assert built.read_bytes() == whole
    before = built.stat().st_mtime_ns
    assert answer(source, 3) == 3 and built.stat().st_mtime_ns == before, "a whole one is not built again"


def test_headers_are_part_of_the_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "HEADERS", tmp_path)
    for value in (4, 5):
        (tmp_path / "value.h").write_text(f"constexpr int value = {value};\n", "utf-8")
        source.write_text('#include "value.h"\nextern "C" int drama_answer() { return value; }\n', "utf-8")
        native.library.cache_clear()
        compiled = native.library(source, "no answer")
        assert compiled is not None and compiled.drama_answer() == value
    native.library.cache_clear()
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2


def test_flags_are_part_of_the_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text('extern "C" int drama_answer() { return VALUE; }\n', "utf-8")
    for value, openmp in ((4, False), (5, False), (5, True)):
        monkeypatch.setattr(native, "_COMPILE", ("-fPIC", f"-DVALUE={value}"))
        native.library.cache_clear()
        compiled = native.library(source, "no answer", openmp)
        assert compiled is not None and compiled.drama_answer() == value
    native.library.cache_clear()
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 3

"""The C++ libraries' build: what a killed process leaves does not stop the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import cpp_extension

from drama_dist.kernels import libraries


def test_the_lock_file_of_a_killed_build_is_no_hindrance_and_another_source_has_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    folder_of = cpp_extension._get_build_directory
    left_behind: list[Path] = []

    def with_a_lock(name: str, verbose: bool) -> str:
        lock = Path(folder_of(name, verbose)) / "lock"
        if lock not in left_behind:  # PyTorch asks again
            lock.touch()
            left_behind.append(lock)
        return str(lock.parent)

    monkeypatch.setattr(cpp_extension, "_get_build_directory", with_a_lock)
    for number in (1, 2):
        (tmp_path / "one.cpp").write_text(f'extern "C" int drama_number() {{ return {number}; }}\n', "utf-8")
        libraries.library.cache_clear()
        compiled = libraries.library("one", "no number")
        assert compiled is not None and compiled.drama_number() == number
    libraries.library.cache_clear()
    assert len(left_behind) == 2 and not any(path.exists() for path in left_behind)

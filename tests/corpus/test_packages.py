"""Docs of installed packages: what becomes a passage, and how it reads."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from drama_dist.corpus.packages import clean, name_words, package_passages, package_versions

SOURCE = '''"""The module's doc."""
def area(radius):
    """Area of a circle.

    Parameters
    ----------
    radius : float
        In metres, see :func:`~shapes.side`.

    >>> area(1)
    3.14
    """
class Square:
    """A square."""
    def side(self):
        """Its side."""
        def inner():
            """Not seen."""
    def _hidden(self):
        """Private."""
def _private():
    """Private."""
def bare(): pass
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "shapes_for_test"
    (root / "_core").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text("", "utf-8")
    (root / "_core" / "flat.py").write_text(SOURCE, "utf-8")
    (root / "tests" / "test_flat.py").write_text('"""A test."""', "utf-8")
    (root / "broken.py").write_text("def (", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return root.name


def test_every_public_documented_object_is_a_passage_with_its_qualified_name(package: str) -> None:
    texts = {passage.id: passage.text for passage in package_passages([package], "en")}
    names = {f"{package}.flat", f"{package}.flat.area", f"{package}.flat.Square", f"{package}.flat.Square.side"}
    assert set(texts) == names
    assert texts[f"{package}.flat.area"] == (
        "Area of a circle.\n\nParameters\n\nradius : float In metres, see shapes.side."
    )
    assert package not in sys.modules


def test_a_leading_signature_is_taken_out() -> None:
    assert clean("busday(a, b=1)\n\n    Find days.\n\n    More.") == "Find days.\n\nMore."
    assert clean("Find days (of work).") == "Find days (of work)."


def test_a_name_gives_itself_and_its_parts() -> None:
    assert name_words("numpy.linalg.matrix_power") >= {"matrix_power", "matrix", "power", "numpy.linalg.matrix_power"}
    assert name_words("a.MultiDiGraph") == {"multidigraph", "a.multidigraph", "multi", "di", "graph"}


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"corpus.packages: 'no_such_package' is not an installed Python package"):
        package_passages(["no_such_package"], "en")


def test_versions_are_those_of_the_distributions() -> None:
    import numpy

    assert package_versions(["numpy"]) == {"numpy": numpy.__version__}


def test_versions_are_of_the_distribution_or_of_python_and_a_missing_package_is_named(package: str) -> None:
    versions = package_versions(["numpy", "json", package])
    assert versions == {"numpy": np.__version__, "json": platform.python_version(), package: platform.python_version()}
    for name in ("no_such_package", "numpy.no_such", "no_such.part", "not a name", "."):
        with pytest.raises(ValueError, match=rf"corpus.packages: {re.escape(repr(name))} is not an installed"):
            package_versions([name])

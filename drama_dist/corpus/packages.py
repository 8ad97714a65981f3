"""A corpus that every machine has: the documentation of installed Python packages.

One passage per documented public object, parsed from the source files with `ast`; nothing is imported. Does not see
objects that get their docstrings at run time or in C.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from drama_dist.records import Passage
from drama_dist.run.progress import progress_bar

_SKIPPED_FOLDERS = {"tests", "test", "testing", "conftest", "_vendor", "vendored", "externals"}
_DIRECTIVE = re.compile(r"^\s*\.\. .*$", re.MULTILINE)
_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`]*)`")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?")
_BLANK_LINES = re.compile(r"\n\s*\n")
_UNDERLINE = re.compile(r"^\s*([-=~^])\1{2,}\s*$", re.MULTILINE)


def package_passages(packages: list[str], language: str) -> list[Passage]:
    """Passages in order of package and file; ids are qualified names. Raises ValueError for a missing package."""
    roots = {package: _root(package) for package in packages}
    files = [(package, root, path) for package, root in roots.items() for path in _source_files(root)]
    passages: dict[str, Passage] = {}
    bar = progress_bar(len(files), "corpus: docs of packages", "files")
    for package, root, path in files:
        module = ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for name, doc in _documented(path, module):
            text = clean(doc)
            public = _public_name(name)
            id = public if public not in passages else name
            if text and id not in passages:
                passages[id] = Passage(id, text, "", language)
        bar.update(1)
    bar.close()
    return list(passages.values())


def package_versions(packages: list[str]) -> dict[str, str]:
    """Installed version of each package, which this corpus depends on; Python's own for a part of Python.

    Raises ValueError for a missing package.
    """
    distributions = importlib.metadata.packages_distributions()
    versions = {}
    for name in packages:
        _root(name)
        found = distributions.get(name.partition(".")[0])
        versions[name] = importlib.metadata.version(found[0]) if found else platform.python_version()
    return versions


def name_words(id: str) -> set[str]:
    """Lower-case forms of an object's name, whole and in parts: words that would give the object away in a query."""
    name = id.rsplit(".", 1)[-1]
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return {form.lower() for form in (name, id, *parts) if len(form) > 1}


def clean(doc: str) -> str:
    """A docstring as paragraphs of plain text, without indentation, markup, doctests and leading signature."""
    lines = []
    in_example = False
    for line in textwrap.dedent(doc).splitlines():
        if line.lstrip().startswith(">>>"):
            in_example = True
        elif not line.strip():
            in_example = False
        if not in_example:
            lines.append(line)
    text = _ROLE.sub(r"\1", _UNDERLINE.sub("", _DIRECTIVE.sub("", "\n".join(lines))))
    paragraphs = [" ".join(part.split()) for part in _BLANK_LINES.split(text.replace("`", ""))]
    filled = [paragraph for paragraph in paragraphs if paragraph]
    return "\n\n".join(filled[1:] if filled and _SIGNATURE.fullmatch(filled[0]) else filled)


def _root(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a part of a package that is not there, and of what is no name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"corpus.packages: {package!r} is not an installed Python package; give its import name")
    return Path(spec.submodule_search_locations[0])


def _source_files(root: Path) -> list[Path]:
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]) and not path.name.startswith("test_")
    ]


def _documented(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a file's public objects."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    yield from _walk(tree, module)


def _walk(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node, clean=False)
    if doc:
        yield name, doc
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif doc := ast.get_docstring(child, clean=False):
            yield f"{name}.{child.name}", doc


def _public_name(name: str) -> str:
    """The name without private modules: numpy.linalg._linalg.inv is known as numpy.linalg.inv."""
    return ".".join(part for part in name.split(".") if not part.startswith("_"))

"""Writing a collection that comes from elsewhere as a BEIR folder, once: it is there when it is whole.

Covers runs that want the same at once, and what a killed one left. Does not cover where the rows come from
(fetch.py, hub.py, ir_collections.py), nor what they mean: rows are written as they come, and read.py sets aside what
cannot be used.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drama_dist.records import write_records
from drama_dist.run.files import put_in_place
from drama_dist.run.progress import progress_bar, say

_UPDATE = 256  # rows between two updates of a bar


class NoSuchCollection(ValueError):
    """A library has no collection of this name, or several of which the name does not say one."""


@dataclass(frozen=True)
class Table:
    """Rows, which are read one after the other. count: how many, where that is known."""

    rows: Iterable[dict[str, Any]]
    count: int | None = None


@dataclass(frozen=True)
class Tables:
    """A collection: of queries and judgements both or none are there. origin: where it comes from, in a line."""

    passages: Table
    queries: Table | None
    judgements: Table | None
    origin: str


def write_once(folder: Path, tables: Tables) -> None:
    """Write a collection, if the folder is not there. Memory holds a few rows at a time.

    Another process that writes the same is waited for; where the file system has no locks both write, and the first to
    finish counts. Raises whatever reading the rows raises, and then leaves no folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as excludes:
        if folder.is_dir():
            return
        prefix = f".{folder.name}.partial-"  # hidden: a folder of collections does not count it among them
        if excludes:  # what is there was left by a process that was killed
            for left in [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]:
                shutil.rmtree(left)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            partial.chmod(0o755)
            _write(partial, folder.name, tables)
            _put_in_place(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _put_in_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another was first
            raise
        shutil.rmtree(partial)


def _write(folder: Path, name: str, tables: Tables) -> None:
    (folder / "README.md").write_text(f"Fetched from {tables.origin}\n", "utf-8")
    write_records(folder / "corpus.jsonl", _counted(tables.passages, f"{name}: passages"))
    if tables.queries and tables.judgements:
        write_records(folder / "queries.jsonl", _counted(tables.queries, f"{name}: queries"))
        (folder / "qrels").mkdir()
        _write_tsv(folder / "qrels" / "test.tsv", _counted(tables.judgements, f"{name}: judgements"))


def _write_tsv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Under the names that the first row has."""
    temporary, names = path.with_name(f"{path.name}.tmp"), list[str]()
    with open(temporary, "w", encoding="utf-8") as out:
        for row in rows:
            if not names:
                names = list(row)
                out.write("\t".join(names) + "\n")
            out.write("\t".join("" if row.get(name) is None else str(row[name]) for name in names) + "\n")
    put_in_place(temporary, path)


def _counted(table: Table, description: str) -> Iterator[dict[str, Any]]:
    bar = progress_bar(table.count, description, "rows")
    try:
        number = 0
        for number, row in enumerate(table.rows, 1):
            yield row
            if number % _UPDATE == 0:
                bar.update(_UPDATE)
        bar.update(number % _UPDATE)
    finally:
        bar.close()


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait for other processes here, and say whether they are excluded: not where the file system has no locks."""
    path = folder.with_name(f".{folder.name}.lock")
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            excludes = True
        except (BlockingIOError, PermissionError):
            say(f"{folder}: another process is fetching it; waiting for that (it holds {path})")
            fcntl.lockf(file, fcntl.LOCK_EX)
            excludes = True
        except OSError:
            excludes = False
        yield excludes
        if folder.is_dir():  # else one that waits would write beside one that comes now
            path.unlink(missing_ok=True)

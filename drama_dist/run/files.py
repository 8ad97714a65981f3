"""Files that are whole or not there: written under a temporary name, put on the disk, renamed; and their hashes.

Knows nothing of stages (folder.py) or checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader never sees half of it, not even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a written file to its final name once its contents are on the disk."""
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, paths: Sequence[Path]) -> str:
    """SHA-256 over contents and names, relative to the folder, of files in it, in any order."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.relative_to(folder)}\0{hash_file(path)}\n".encode())
    return total.hexdigest()

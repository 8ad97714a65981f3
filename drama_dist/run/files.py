"""Files that are whole or not there: written under a temporary name, put on the disk, renamed; and their hashes.

Knows nothing of stages (folder.py) or checkpoints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
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


def write_checksum(file: Path, path: Path) -> None:
    """Write the SHA-256 of a file's contents to `path`."""
    write_text(path, hash_file(file) + "\n")


def matches_checksum(file: Path, path: Path) -> bool:
    """Whether a file is there with the contents whose SHA-256 `write_checksum` wrote."""
    return file.is_file() and path.is_file() and path.read_bytes() == f"{hash_file(file)}\n".encode()


def hash_files(folder: Path, paths: Sequence[Path]) -> str:
    """SHA-256 over contents and names, relative to the folder, of files in it, in any order."""
    return combined_hash({path.relative_to(folder): hash_file(path) for path in paths})


def combined_hash(hashes: Mapping[Path, str]) -> str:
    """SHA-256 over names and hashes of files, in any order."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(f"{name}\0{hashes[name]}\n".encode())
    return total.hexdigest()

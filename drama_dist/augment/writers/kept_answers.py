"""Answers of an endpoint, kept on disk: what was written once is not written, or paid for, again.

Covers where an answer lies and how it is found: by the model, the conversation and how it was to be drawn. A stage that
is written anew with other settings finds what it asks for as before. Does not cover parts of stages, which are in
../parts.py; or whether an endpoint has another model of the same name by now: then the folder is to be deleted.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drama_dist.run.files import put_in_place


@dataclass(frozen=True)
class Answer:
    """A text. tokens_read, tokens_written: what the endpoint counted, 0 where it does not."""

    text: str
    tokens_read: int = 0
    tokens_written: int = 0


class KeptAnswers:
    """folder: made with the first answer. Several threads, processes and machines may share it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find(self, asked: Any) -> Answer | None:
        """The answer to what is asked, any JSON; None where there is none, or it is damaged."""
        try:
            return Answer(**json.loads(self._path(asked).read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def keep(self, asked: Any, answer: Answer) -> None:
        """Store it; of two answers to the same the later one stays."""
        path = self._path(asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_text(json.dumps(asdict(answer), ensure_ascii=False), "utf-8")
        put_in_place(temporary, path)

    def _path(self, asked: Any) -> Path:
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self._folder / key[:2] / f"{key[2:]}.json"

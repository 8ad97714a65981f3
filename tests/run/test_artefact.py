"""Finished artefacts: whatever happens to their files is noticed, and what has not changed is not read again."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.distributed import ranks
from drama_dist.run import artefact
from drama_dist.run.artefact import Damaged, fingerprint_of_artefact, inputs_of, read_provenance, seconds_of, verify
from drama_dist.run.folder import fingerprint, open_stage
from tests.conftest import gathering


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished artefact of a few files."""
    stage = open_stage(tmp_path, "encode/letters", {"steps": 3}, {"corpus": "abc"})
    (stage.folder / "table").mkdir()
    (stage.folder / "table" / "rows.arrow").write_bytes(bytes(range(256)))
    (stage.folder / "shard-00000.npy").write_bytes(b"vectors")
    (stage.folder / "checkpoints").mkdir()
    (stage.folder / "checkpoints" / "step").write_text("gone when it is finished", "utf-8")
    stage.log(step=1)
    return stage.finish(passages=7)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read from now on."""
    names: list[str] = []
    hash_file = artefact.hash_file
    monkeypatch.setattr(artefact, "hash_file", lambda path: (names.append(path.name), hash_file(path))[1])
    return names


def test_the_record_has_every_file_and_the_facts(made: Path, tmp_path: Path) -> None:
    record = read_provenance(made)
    assert set(record["files"]) == {"settings.yaml", "metrics.jsonl", "shard-00000.npy", "table/rows.arrow"}
    assert record["files"]["table/rows.arrow"]["bytes"] == 256
    assert fingerprint_of_artefact(made) == fingerprint(made)
    assert inputs_of(made) == {"corpus": "abc"} and record["passages"] == 7
    assert seconds_of(tmp_path, "encode/letters") >= 0


FILES = ["settings.yaml", "metrics.jsonl", "shard-00000.npy", "table/rows.arrow", "provenance.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "same size and time"])
def test_damage_is_named_with_the_remedy(file: str, how: str, made: Path, tmp_path: Path) -> None:
    path = made / file
    before, contents = path.stat(), bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 2
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": contents[:-3], "empty": b""}.get(how, bytes(contents)))
    if how == "same size and time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Damaged) as error:
        open_stage(tmp_path, "encode/letters", {"steps": 3}, {"corpus": "abc"})
    message = str(error.value)
    assert message.startswith(f"{path}: damaged (") and "\n" not in message
    assert f"delete the folder {made} and make it again with `drama run`" in message
    shutil.rmtree(made)
    assert not open_stage(tmp_path, "encode/letters", {"steps": 3}, {"corpus": "abc"}).done


def test_every_flip_of_the_record_itself_is_noticed_or_changes_nothing(made: Path, tmp_path: Path) -> None:
    path = made / "provenance.json"
    whole, original = read_provenance(made), path.read_bytes()
    for position in range(0, len(original), 3):
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(bytes(flipped))
        try:
            verify(tmp_path, "encode/letters")
        except Damaged as error:
            assert str(path) in str(error)
        else:
            assert read_provenance(made) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"seconds": 1}', "[" * 100_000, "\udc80"])
def test_what_is_no_record_is_damage(text: str, made: Path) -> None:
    (made / "provenance.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Damaged, match=r"provenance.json: damaged \((not JSON|not the record of an artefact, .*)\)"):
        read_provenance(made)


def test_a_file_is_read_again_only_where_it_may_have_changed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = hashed(monkeypatch)
    verify(tmp_path, "encode/letters")
    assert not names  # finish has noted what it hashed
    (made / "table" / "rows.arrow").touch()
    verify(tmp_path, "encode/letters")
    assert names == ["rows.arrow"]
    verify(tmp_path, "encode/letters")
    assert names == ["rows.arrow"]


@pytest.mark.parametrize("note", [None, "", "[]", "{", '{"files": 3}', '{"of": "x", "files": {}}'])
def test_without_a_note_of_the_last_check_everything_is_read(
    note: str | None, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".checked" / "encode" / "letters.json"
    path.unlink() if note is None else path.write_text(note, "utf-8")
    names = hashed(monkeypatch)
    verify(tmp_path, "encode/letters")
    assert sorted(names) == ["metrics.jsonl", "rows.arrow", "settings.yaml", "shard-00000.npy"]
    verify(tmp_path, "encode/letters")
    assert len(names) == 4


def test_a_run_that_cannot_be_written_to_is_checked_all_the_same(made: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / ".checked")
    (tmp_path / ".checked").write_text("no folder", "utf-8")
    verify(tmp_path, "encode/letters")
    (made / "shard-00000.npy").write_bytes(b"vectorS")
    with pytest.raises(Damaged):
        verify(tmp_path, "encode/letters")


def test_a_file_beside_the_others_does_no_harm_unless_it_would_be_read(made: Path, tmp_path: Path) -> None:
    for name in (".DS_Store", "notes.txt", "table/notes.txt"):
        (made / name).write_text("mine", "utf-8")
    verify(tmp_path, "encode/letters")
    (made / "shard-00001.npy").write_bytes(b"vectors")
    with pytest.raises(Damaged, match=r"shard-00001.npy: no part of the artefact"):
        verify(tmp_path, "encode/letters")


@pytest.mark.parametrize("part", ["files", "sha256"])
def test_a_record_without_files_or_seal_is_no_record(part: str, made: Path, tmp_path: Path) -> None:
    path = made / "provenance.json"
    record = json.loads(path.read_text("utf-8"))
    del record[part]
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Damaged, match=r"not the record of an artefact, or that of an earlier version"):
        verify(tmp_path, "encode/letters")


def test_what_a_kill_in_the_middle_of_finishing_left_is_not_recorded(tmp_path: Path) -> None:
    stage = open_stage(tmp_path, "s", {}, {})
    for name in ("provenance.json", "provenance.json.tmp"):
        (stage.folder / name).write_text("{", "utf-8")
    (stage.folder / "artefact").write_text("x", "utf-8")
    folder = stage.finish()
    assert set(read_provenance(folder)["files"]) == {"settings.yaml", "artefact"}
    verify(tmp_path, "s")


def test_rank_0_checks_and_all_ranks_fail(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made / "table" / "rows.arrow").unlink()
    messages = on_two_ranks(
        monkeypatch, lambda: open_stage(tmp_path, "encode/letters", {"steps": 3}, {"corpus": "abc"})
    )
    assert "rows.arrow: damaged (missing)" in messages[0] and messages[1] == "rank 0 failed; see its message"


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[str]:
    """What two ranks, as threads, raise; a rank that waits for the other in vain raises BrokenBarrierError."""
    own, meeting = threading.local(), threading.Barrier(2, timeout=20)
    monkeypatch.setattr(ranks, "rank", lambda: own.rank)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "barrier", meeting.wait)
    messages = ["", ""]
    on_every_rank = gathering(own, meeting)
    monkeypatch.setattr(ranks, "on_every_rank", on_every_rank)

    def start(rank: int) -> None:
        own.rank = rank
        try:
            work()
        except Exception as error:
            messages[rank] = str(error) or type(error).__name__

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return messages

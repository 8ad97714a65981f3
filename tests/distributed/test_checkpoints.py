"""Checkpoints: intact or skipped, whatever happens to their files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import CheckpointError, Checkpoints, Piece, Reader, read_state


def pieces(step: int) -> dict[str, Piece]:
    values = torch.arange(12.0) + step
    return {"a": Piece(values, 0, (3, 4)), "b": Piece(values[:5], 0, (5,))}


def written(folder: Path, steps: range, keep: int = 9, losses: dict[int, float] | None = None) -> Checkpoints:
    saved = Checkpoints(folder, keep)
    for step in steps:
        saved.save(step, pieces(step), **({"loss": losses[step]} if losses else {}))
    saved.wait()
    return saved


def names(saved: Checkpoints) -> list[str]:
    return [path.name for path in saved.whole()]


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    newest = written(tmp_path, range(1, 3)).newest()
    assert newest is not None and newest.name == "step-0000002"
    assert read_state(newest)["step"] == 2
    assert torch.equal(Reader(newest).read("a"), (torch.arange(12.0) + 2).view(3, 4))
    with pytest.raises(KeyError):
        Reader(newest).read("c")


def test_the_tensors_of_the_moment_are_saved(tmp_path: Path) -> None:
    """What training changes while the file is being written does not reach it."""
    saved, values = Checkpoints(tmp_path, 1), torch.zeros(1 << 20)
    saved.save(1, {"a": Piece(values, 0, (1 << 20,))})
    values += 1
    saved.wait()
    assert not Reader(saved.whole()[0]).read("a").any()


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_anywhere_is_found_and_named(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, chance = written(tmp_path, range(1, 4)), random.Random(seed)
    file = sorted((tmp_path / "step-0000003").iterdir())[seed % 3]
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    newest = saved.newest()
    assert newest is not None and newest.name == "step-0000002"
    said = capsys.readouterr()
    assert "step-0000003" in said.out + said.err and "damaged" in said.out + said.err


@pytest.mark.parametrize("missing", ["state.json", "rank-00000.json", "rank-00000.safetensors"])
def test_a_checkpoint_without_a_file_is_skipped(missing: str, tmp_path: Path) -> None:
    saved = written(tmp_path, range(1, 3))
    (tmp_path / "step-0000002" / missing).unlink()
    newest = saved.newest()
    assert newest is not None and newest.name == "step-0000001"


def test_pieces_of_several_ranks_make_a_whole_and_a_lost_one_is_found(tmp_path: Path) -> None:
    saved, values = Checkpoints(tmp_path, 1), torch.arange(10.0)
    saved._write(4, {"a": Piece(values[7:], 7, (2, 5))}, {"step": 4}, rank=1, size=2)
    assert not saved.whole()  # rank 0 is still to come
    saved._write(4, {"a": Piece(values[:7], 0, (2, 5))}, {"step": 4}, rank=0, size=2)
    assert torch.equal(Reader(saved.whole()[0]).read("a"), values.view(2, 5))
    (saved.whole()[0] / "rank-00001.json").unlink()
    with pytest.raises(FileNotFoundError, match="rank-00001"):
        Reader(saved.whole()[0])


def test_what_no_rank_wrote_is_not_read(tmp_path: Path) -> None:
    """A file of more ranks, left by somebody."""
    saved = written(tmp_path, range(1, 2))
    for suffix in ("json", "safetensors"):
        (saved.whole()[0] / f"rank-00001.{suffix}").write_bytes(
            (saved.whole()[0] / f"rank-00000.{suffix}").read_bytes()
        )
    assert torch.equal(Reader(saved.whole()[0]).read("b"), torch.arange(5.0) + 1)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    saved = written(tmp_path, range(1, 6), keep=2, losses={1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0})
    assert names(saved) == ["step-0000002", "step-0000004", "step-0000005"]


def test_a_damaged_one_does_not_stop_the_next_from_being_saved(tmp_path: Path) -> None:
    saved = written(tmp_path, range(1, 4), keep=2, losses={1: 3.0, 2: 1.0, 3: 2.0})
    (tmp_path / "step-0000003" / "state.json").write_text("{", "utf-8")
    written(tmp_path, range(4, 6), keep=2, losses={4: 2.0, 5: 2.0})
    assert names(saved) == ["step-0000002", "step-0000004", "step-0000005"]


def test_a_damaged_one_gives_way_to_what_is_trained_again(tmp_path: Path) -> None:
    saved = written(tmp_path, range(5, 6), keep=1)
    (tmp_path / "step-0000005" / "state.json").write_text("{", "utf-8")
    assert saved.newest() is None
    assert names(written(tmp_path, range(3, 4), keep=1)) == ["step-0000003"]


def test_where_another_rank_fails_all_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "on_every_rank", lambda value: [value, 1])
    saved = Checkpoints(tmp_path, 1)
    saved.save(1, pieces(1))
    with pytest.raises(CheckpointError, match="rank 1 failed"):
        saved.wait()


def test_half_written_checkpoints_are_ignored_and_cleared(tmp_path: Path) -> None:
    saved = written(tmp_path, range(1, 2))
    (tmp_path / "step-0000009.tmp").mkdir()
    newest = saved.newest()
    assert newest is not None and newest.name == "step-0000001"
    saved.clear_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_a_failed_write_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    saved = Checkpoints(tmp_path / "file" / "folder", 1)
    saved.save(1, pieces(1))
    with pytest.raises(CheckpointError, match="could not be written"):
        saved.save(2, pieces(2))

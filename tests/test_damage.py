"""Flips and cuts in the files of a finished run: each ends in the same result, or is named. None in another result."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.cli import main
from drama_dist.run.folder import fingerprint
from drama_dist.settings import Settings, write_settings

CHANGES = [
    "encode.index=HNSW8",
    "evaluate.systems=[drama]",
    "augment.synthetic_queries=0",
    "prune.heal_steps=0",
    "train.steps=2",
]
LAST = ("evaluate", "export")  # made again in every trial, from whatever is there


@pytest.fixture(scope="module")
def finished(small_settings_in: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The settings' file and the folder of a whole run."""
    folder = tmp_path_factory.mktemp("damage")
    settings = small_settings_in(folder, *CHANGES)
    write_settings(settings, folder / "whole.yaml")
    assert main(["run", str(folder / "whole.yaml")]) == 0
    return folder / "whole.yaml", Path(settings.run)


def result(run: Path) -> tuple[str, ...]:
    """What a run comes to: its figures, rankings and model."""
    return tuple(fingerprint(run / name) for name in ("evaluate/corpus", "export"))


def damaged(contents: bytes, chance: random.Random) -> bytes:
    """A bit flipped, or the end cut off."""
    if chance.random() < 0.25:
        return contents[: chance.randrange(len(contents))]
    flipped = bytearray(contents)
    flipped[chance.randrange(len(contents))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def trials(count: int, seed: int, files: list[Path], attempt: Callable[[Path], str]) -> Counter[str]:
    """Damage files in turn, and count how the attempts end."""
    chance, ends = random.Random(seed), Counter[str]()
    order = [*files] * (count // len(files)) + chance.sample(files, count % len(files))
    for path in order:
        before = path.read_bytes()
        path.write_bytes(damaged(before, chance))
        ends[attempt(path)] += 1
        if path.parent.is_dir():
            path.write_bytes(before)
    print(dict(ends))
    return ends


@pytest.mark.parametrize(("count", "beside"), [(10, False), pytest.param(300, True, marks=pytest.mark.slow)])
def test_no_damage_to_a_finished_run_ends_in_another_result(
    count: int, beside: bool, finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """beside: damage what lies beside the artefacts, too; a run that goes on takes longer than one that is refused."""
    settings, run = finished
    expected = result(run)

    def attempt(path: Path) -> str:
        for name in LAST:
            shutil.rmtree(run / name, ignore_errors=True)
        capsys.readouterr()
        status = main(["run", str(settings)])  # raises what is not a user's mistake
        said = capsys.readouterr().err
        if status == 0:
            assert result(run) == expected, path
            return "same result"
        assert status == 2 and f"{path}: damaged" in said, (path, said)
        return "named"

    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    files = [path for path in files if path.relative_to(run).parts[0] not in LAST]
    files = [path for path in files if beside or not path.relative_to(run).parts[0].startswith((".", "report."))]
    ends = trials(count, 1, files, attempt)
    assert ends["named"] > count / 2 and ends.total() == count
    assert main(["run", str(settings)]) == 0 and result(run) == expected


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["index/corpus/drama/index.faiss", "encode/corpus/drama/shard-00000.npy"])
def test_no_damage_to_what_is_searched_gives_other_hits(
    file: str, count: int, finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = finished

    def attempt(path: Path) -> str:
        assert main(["search", str(run), "the river"]) == 2
        assert f"{path}: damaged" in capsys.readouterr().err
        return "named"

    assert trials(count, 2, [run / file], attempt) == {"named": count}
    assert main(["search", str(run), "the river"]) == 0


def test_the_report_reads_no_damaged_file(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings, run = finished
    for file in ("train/metrics.jsonl", "train/token_lengths.json", "augment/counts.json", "export/provenance.json"):
        path, before = run / file, (run / file).read_bytes()
        path.write_bytes(before.replace(b"1", b"2"))
        assert main(["report", str(settings)]) == 2
        assert f"{path}: damaged" in capsys.readouterr().err
        path.write_bytes(before)
    assert main(["report", str(settings)]) == 0
    assert json.loads((run / "report.json").read_text("utf-8"))["results"]

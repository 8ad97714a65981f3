"""Stage folders: finished, half done, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from drama_dist.run import folder
from drama_dist.run.artefact import seconds_of
from drama_dist.run.folder import OtherSettings, StageFolder, fingerprint, open_stage, refuse_what_is_there
from drama_dist.run.locks import InUse
from drama_dist.run.shares import WHOLE, Share

SETTINGS = {"train": {"steps": 3, "dims": [4, 2]}}


def test_a_stage_works_in_a_partial_folder_until_it_is_whole(tmp_path: Path) -> None:
    stage = open_stage(tmp_path, "train", SETTINGS, {"corpus": "abc"})
    assert not stage.done and not stage.resumed and stage.folder == tmp_path / "train.partial"
    (stage.folder / "weights").write_text("w", "utf-8")
    assert stage.finish(steps=3) == tmp_path / "train"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checked", ".locks", "train"]
    record = json.loads((tmp_path / "train" / "provenance.json").read_text("utf-8"))
    assert record["steps"] == 3 and record["inputs"] == {"corpus": "abc"} and record["versions"]["torch"]
    assert seconds_of(tmp_path, "train") >= 0
    assert open_stage(tmp_path, "train", SETTINGS, {"corpus": "abc"}).done


def test_a_partial_folder_is_resumed(tmp_path: Path) -> None:
    first = open_stage(tmp_path, "train", SETTINGS, {})
    (first.folder / "half").write_text("x", "utf-8")
    again = open_stage(tmp_path, "train", SETTINGS, {})
    assert again.resumed and not again.done and (again.folder / "half").exists()


@pytest.mark.parametrize("share", [WHOLE, Share(1, 4)])
def test_a_stage_that_another_process_works_on_is_refused_until_that_ends(tmp_path: Path, share: Share) -> None:
    program = (
        "import sys, time; from drama_dist.run.folder import open_stage; from drama_dist.run.shares import Share\n"
        f"stage = open_stage({str(tmp_path)!r}, 'train', {SETTINGS!r}, {{}}, Share({share.index}, {share.count}))\n"
        "print('open', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "open\n"
        holder = f"{'' if share.whole else 'share 1 of 4, '}process {other.pid} of "
        with pytest.raises(InUse, match=rf"another run is working on this stage \({holder}"):
            open_stage(tmp_path, "train", SETTINGS, {})
        with pytest.raises(InUse):  # and nothing is deleted
            open_stage(tmp_path, "train", {"train": {"steps": 5}}, {}, discard_partial=True)
        assert (tmp_path / "train.partial" / "settings.yaml").exists()
        for index in range(4):
            if share.whole or index == share.index:
                with pytest.raises(InUse):
                    open_stage(tmp_path, "train", SETTINGS, {}, Share(index, 4))
            else:
                open_stage(tmp_path, "train", SETTINGS, {}, Share(index, 4))
    finally:
        other.kill()
        other.wait()
    open_stage(tmp_path, "train", SETTINGS, {}).finish()


def test_a_rank_that_was_left_running_holds_the_stage_too(tmp_path: Path) -> None:
    program = (
        "import time; from drama_dist.distributed import ranks; from drama_dist.run.folder import open_stage\n"
        "ranks.rank, ranks.barrier, ranks.on_every_rank = lambda: 1, lambda: None, lambda value: [value, value]\n"
        f"stage = open_stage({str(tmp_path)!r}, 'train', {SETTINGS!r}, {{}})\n"
        "print('open', flush=True); time.sleep(600)"
    )
    open_stage(tmp_path, "train", SETTINGS, {})
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "open\n"
        with pytest.raises(InUse):
            open_stage(tmp_path, "train", SETTINGS, {})
    finally:
        other.kill()
        other.wait()


def test_only_one_of_several_processes_makes_the_folder_and_none_sees_it_incomplete(tmp_path: Path) -> None:
    together = threading.Barrier(8, timeout=20)

    def enter(index: int, run: Path) -> str:
        together.wait()
        try:
            stage = open_stage(run, "encode/drama", {"steps": 0 if index else 1}, {}, Share(index, 8))
        except OtherSettings:
            return "refused"
        return yaml.safe_load((stage.folder / "settings.yaml").read_text("utf-8"))["settings"]["steps"]

    for attempt in range(20):  # one process has other settings: either it, or all others, are refused
        run = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            odd, *others = pool.map(enter, range(8), [run] * 8)
        assert (odd, set(others)) in ((1, {"refused"}), ("refused", {0}))
        assert [path.name for path in (run / "encode").iterdir()] == ["drama.partial"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_and_inputs_are_refused_and_listed(tmp_path: Path, finished: bool) -> None:
    stage = open_stage(tmp_path, "train", SETTINGS, {"corpus": "abc"})
    if finished:
        stage.finish()
    else:
        (stage.folder / "shard-00000.npy").write_text("work", "utf-8")
    with pytest.raises(OtherSettings) as error:
        open_stage(tmp_path, "train", {"train": {"steps": 5, "dims": [4, 2], "seed": 1}}, {"corpus": "abd"})
    message = str(error.value)
    for line in (
        "settings.train.steps: 3 in the folder, 5 now",
        "settings.train.seed: '(absent)' in the folder, 1 now",
        "inputs.corpus: 'abc' in the folder, 'abd' now",
        "Use another run (run=runs/NAME)",
    ):
        assert line in message
    assert "dims" not in message


def test_the_fingerprint_is_of_the_artefact_and_not_of_its_records(tmp_path: Path) -> None:
    fingerprints = []
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        stage = open_stage(tmp_path / name, "s", {"name": name}, {})
        (stage.folder / "artefact").write_text(text, "utf-8")
        stage.log(step=1, name=name)
        fingerprints.append(fingerprint(stage.finish()))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_missing_input_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the stage that makes it"):
        fingerprint(tmp_path / "nowhere")


def test_metrics_after_a_step_are_forgotten(tmp_path: Path) -> None:
    stage = open_stage(tmp_path, "s", {}, {})
    for step in (1, 2, 3):
        stage.log(step=step)
    with open(stage.folder / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write('{"stfp": 2}\n[2]\n{"step": [2]}\n{"st')
    stage.forget_metrics_after(2)
    lines = (stage.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


WORK = {
    "checkpoints/step-0000050/state.json": "checkpoints up to step 50",
    "checkpoints/synthetic/part-00000.jsonl": "1 stored part",
    "shard-00000.npy": "1 shard",
}
NO_WORK = ["set_aside.jsonl", "checkpoints/step-0000050.tmp/rank-00000.json", "shard-00000.npy.tmp", "index.faiss.tmp"]


def begun(run: Path, file: str) -> StageFolder:
    """A stage that was left behind with a file in its folder."""
    stage = open_stage(run, "train", SETTINGS, {"corpus": "abc"})
    path = stage.folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x", "utf-8")
    assert stage.lock
    stage.lock.release()
    return stage


@pytest.mark.parametrize("file", NO_WORK)
@pytest.mark.parametrize(("settings", "inputs"), [({"train": {"steps": 5}}, "abc"), (SETTINGS, "abd")])
def test_a_partial_folder_without_work_gives_way(
    file: str, settings: dict[str, object], inputs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = begun(tmp_path, file)
    refuse_what_is_there(tmp_path, "train", settings)
    stage = open_stage(tmp_path, "train", settings, {"corpus": inputs})
    assert not stage.resumed and [path.name for path in stage.folder.iterdir()] == ["settings.yaml"]
    assert f"train: starts anew: {left.folder} was made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(("file", "work"), WORK.items())
def test_a_partial_folder_with_work_is_kept_until_it_is_given_up(file: str, work: str, tmp_path: Path) -> None:
    left, other = begun(tmp_path, file), {"train": {"steps": 5}}
    for refused in (
        lambda: refuse_what_is_there(tmp_path, "train", other),
        lambda: open_stage(tmp_path, "train", other, {"corpus": "abc"}),
    ):
        with pytest.raises(OtherSettings, match=rf"steps: 3 in the folder, 5 now(.|\n)*--discard-partial .*{work}"):
            refused()
        assert (left.folder / file).exists()
    refuse_what_is_there(tmp_path, "train", other, discard_partial=True)
    assert not open_stage(tmp_path, "train", other, {"corpus": "abc"}, discard_partial=True).resumed
    assert not (left.folder / file).exists()


def test_only_what_is_partial_and_made_with_others_is_ever_discarded(tmp_path: Path) -> None:
    left = begun(tmp_path, "shard-00000.npy")
    same = open_stage(tmp_path, "train", SETTINGS, {"corpus": "abc"}, discard_partial=True)
    assert same.resumed and (left.folder / "shard-00000.npy").exists()
    same.finish()
    with pytest.raises(OtherSettings, match=r"delete .*train and every later stage"):
        open_stage(tmp_path, "train", {"train": {"steps": 5}}, {}, discard_partial=True)
    assert (tmp_path / "train" / "shard-00000.npy").exists()


def test_tasks_with_shares_delete_nothing(tmp_path: Path) -> None:
    left = begun(tmp_path, "set_aside.jsonl")
    with pytest.raises(OtherSettings, match=r"Tasks with --share delete nothing: delete that folder before they start"):
        open_stage(tmp_path, "train", {"train": {"steps": 5}}, {}, Share(0, 4))
    assert (left.folder / "set_aside.jsonl").exists()


@pytest.mark.parametrize("text", ["{", "- a list", "settings: 3", "", "\x00", None])
def test_partial_work_whose_record_is_damaged_gives_way_or_is_kept_as_other_work_is(
    text: str | None, tmp_path: Path
) -> None:
    for file, discard in (("set_aside.jsonl", False), ("shard-00000.npy", True)):
        left = begun(tmp_path / file, file)
        record = left.folder / "settings.yaml"
        record.unlink() if text is None else record.write_text(text, "utf-8")
        if discard:
            with pytest.raises(OtherSettings, match=r"settings.yaml in it is missing or damaged(.|\n)*1 shard"):
                open_stage(tmp_path / file, "train", SETTINGS, {"corpus": "abc"})
        assert not open_stage(tmp_path / file, "train", SETTINGS, {"corpus": "abc"}, discard_partial=discard).resumed


def test_a_provenance_from_elsewhere_is_not_believed(tmp_path: Path) -> None:
    folders = []
    for name, text in (("a", "one"), ("b", "two")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights").write_text(text, "utf-8")
        (folder / "provenance.json").write_text('{"fingerprint": "same", "by": "somebody"}', "utf-8")
        folders.append(fingerprint(folder))
    assert folders[0] != folders[1]


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_checkpoints_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = open_stage(tmp_path, "train", {}, {})
    for name in ("model.bin", "table/rows", "checkpoints/step-0000002/weights"):
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage.folder / name).write_bytes(b"x")
    done: list[str] = []
    rename, rmtree = Path.rename, shutil.rmtree

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename {path.name}")
        return rename(path, target)

    def removed(path: Path, **options: bool) -> None:
        done.append(f"remove {path.name}")
        rmtree(path, **options)

    monkeypatch.setattr(folder, "sync", lambda path: done.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(folder.shutil, "rmtree", removed)
    stage.finish()
    *before, rename_, parent, remove = done
    assert (rename_, parent, remove) == ("rename train.partial", f"sync {tmp_path.name}", "remove checkpoints")
    names = ["train.partial", "settings.yaml", "model.bin", "table", "rows"]  # write_text syncs provenance.json
    assert sorted(before) == sorted(f"sync {name}" for name in names)

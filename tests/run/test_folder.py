"""Stage folders: finished, half done, refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from drama_dist.run.folder import OtherSettings, fingerprint, open_stage, seconds_of
from drama_dist.run.locks import InUse
from drama_dist.run.shares import WHOLE, Share

SETTINGS = {"train": {"steps": 3, "dims": [4, 2]}}


def test_a_stage_works_in_a_partial_folder_until_it_is_whole(tmp_path: Path) -> None:
    stage = open_stage(tmp_path, "train", SETTINGS, {"corpus": "abc"})
    assert not stage.done and not stage.resumed and stage.folder == tmp_path / "train.partial"
    (stage.folder / "weights").write_text("w", "utf-8")
    assert stage.finish(steps=3) == tmp_path / "train"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "train"]
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
            stage = open_stage(run, "encode/drama", {"steps": 0 if index else 1}, {})
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
    stage.forget_metrics_after(2)
    lines = (stage.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]

"""Collections by name: what may be one, where it lies, what it is called, and what is said where it cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import passages, write_lines

from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.named import folder_of
from drama_dist.corpus.stage import collection_sections
from drama_dist.evaluate.stage import sections
from drama_dist.run.graph import artefacts_of, order_of
from drama_dist.run.runner import make
from drama_dist.settings import CorpusSettings, Settings, SettingsError
from drama_dist.suites import label_of_suite, member_of


def test_without_the_hub_a_run_ends_before_anything_is_made_and_says_what_goes_where(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DRAMA_CACHE", str(tmp_path / "cache"))
    name, folder = "huggingface:nobody/anything", tmp_path / "cache/collections/huggingface/nobody--anything"
    for change, setting in (
        (f"evaluate.collections=[{name}]", "evaluate.collections"),
        (f"evaluate.suite={name}", "evaluate.suite"),
        (f"corpus.path={name}", "corpus.path"),
        (f"corpus.general={name}", "corpus.general"),
    ):
        settings = small_settings(change)
        with pytest.raises(
            SettingsError, match=f"^{setting}={name}: is not in {folder}, and cannot be fetched: "
        ) as no:
            make(settings, "run")
        assert "https://huggingface.co/datasets/nobody/anything" in str(no.value) and "corpus.jsonl" in str(no.value)
        assert not Path(settings.run).exists() and not folder.parent.exists()


def test_what_was_put_there_by_hand_is_read_without_the_hub(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DRAMA_CACHE", str(tmp_path))
    write_lines(folder_of("huggingface:nobody/anything") / "corpus.jsonl", passages(24))
    made = make(small_settings("corpus.path=huggingface:nobody/anything"), "corpus")
    assert len(open_collection(made).passages) == 24
    collection = small_settings("evaluate.collections=[huggingface:nobody/anything]", f"run={tmp_path}/other")
    with pytest.raises(ValueError, match="nobody--anything: no judged queries: expected"):
        make(collection, "evaluate")
    assert not Path(collection.run).exists()


def test_collections_come_before_training(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("evaluate.collections=[ir_datasets:a/b]", "evaluate.suite=huggingface:BeIR/toy")
    for verb in ("run", "evaluate"):
        order = [artefact.name for artefact in order_of(settings, *artefacts_of(settings, verb))]
        assert order[:3] == ["corpus", "collections/a-b", "collections/toy"] and "train" in order


@pytest.mark.parametrize(
    "change",
    [
        "corpus.path=huggingface:scifact",
        "corpus.path=huggingface:a/b@",
        "corpus.path=huggingface:a/b/c/d/e",
        "corpus.general=huggingface:a/../b",
        "corpus.path=huggingface:a/b--c",
        "corpus.path=ir_datasets:",
        "corpus.path=ir_datasets:/etc",
        "evaluate.collections=[ir_datasets:a//b]",
        "evaluate.collections=[huggingface:a/b,huggingface:a/b]",
        "evaluate.suite=huggingface:a/b,data/toy",
        "evaluate.suite=huggingface:a/b,huggingface:a/b",
    ],
)
def test_a_name_that_can_be_none_is_refused(change: str, small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=r"must (be|differ)"):
        small_settings(change)


def test_names_have_labels_and_folders_of_their_own(
    small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAMA_CACHE", "/cache")
    names = [
        "huggingface:BeIR/scifact",
        "huggingface:mteb/many@v1/sw/dev",
        "ir_datasets:beir/scifact/test",
        "d/scifact",
    ]
    settings = small_settings(f"evaluate.collections=[{','.join(names)}]", f"evaluate.suite={names[0]}")
    labels = list(settings.evaluate.collection_labels)
    assert labels[:3] == ["scifact", "many-sw-dev", "beir-scifact-test"] and labels[3].startswith("scifact-")
    assert settings.evaluate.suite_labels == ["scifact"]
    folders = [str(folder_of(name)) for name in names]
    assert folders[1:3] == [
        "/cache/collections/huggingface/mteb--many@v1--sw--dev",
        "/cache/collections/ir_datasets/beir--scifact--test",
    ]
    assert folders[3] == "d/scifact" and label_of_suite(",".join(names[:3])) == "scifact+many-sw-dev+beir-scifact-test"
    many = ",".join(f"huggingface:a/{'x' * 30}{number}" for number in range(9))
    assert label_of_suite("huggingface:me/beir") != "beir" == label_of_suite("beir")  # files of two suites
    assert len(label_of_suite(many)) < 120 and label_of_suite(many) != label_of_suite(many.replace("a/", "b/"))


def test_members_of_the_papers_suites_are_known_by_name(small_settings: Callable[..., Settings]) -> None:
    for name, member in (
        ("huggingface:BeIR/arguana", "arguana"),
        ("huggingface:mteb/fiqa/test", "fiqa"),
        ("huggingface:mteb/MIRACLRetrieval/ar/dev", "miracl-ar"),
        ("ir_datasets:beir/fiqa/test", "fiqa"),
        ("ir_datasets:miracl/ar/dev", "miracl-ar"),
        ("huggingface:mteb/MIRACLRetrieval", None),
        ("huggingface:mine/beir/nq", None),
        ("ir_datasets:mine/fiqa", None),
    ):
        found = member_of(name)
        assert (found and found.name) == member
    names = "evaluate.collections=[ir_datasets:beir/arguana,huggingface:mteb/MIRACLRetrieval/ar,huggingface:a/b]"
    settings = small_settings(names, "corpus.language=sw", "corpus.text_keys=[body]")
    assert sections(settings, "beir-arguana")["own_passage"] == "left out"
    read = [collection_sections(settings, label)["corpus"] for label in settings.evaluate.collection_labels]
    assert [of["language"] for of in read] == ["en", "ar", "sw"]
    assert all(of["text_keys"] == CorpusSettings(path="x").text_keys for of in read)  # the forms are BEIR's

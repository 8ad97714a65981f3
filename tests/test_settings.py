"""Settings: files, overrides, and errors that say where and what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from drama_dist.setting_types import recorded
from drama_dist.settings import (
    EncoderSettings,
    Settings,
    SettingsError,
    TrainSettings,
    as_dict,
    read_settings,
    write_settings,
)
from drama_dist.settings_file import read_json

ROOT = Path(__file__).parent.parent
GOOD = "run: runs/x\nllm: some/model\ncorpus:\n  path: docs.jsonl\ntrain:\n  steps: 7\n"
Read = Callable[..., Settings]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s.yaml"


@pytest.fixture
def read(file: Path) -> Read:
    """Read settings from a text, or from GOOD with overrides."""

    def from_text(*overrides: str, text: str | bytes = GOOD) -> Settings:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_settings(file, overrides)

    return from_text


def get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def test_the_file_is_read_and_overrides_win(read: Read) -> None:
    settings = read("train.steps=9", "encoder.dims=[64,32]", "run=runs/y", "train.steps=8")
    assert (settings.train.steps, settings.encoder.dims, settings.run) == (8, [64, 32], "runs/y")
    assert read().train.steps == 7


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "configs").glob("*.yaml")))
def test_the_shipped_settings_are_valid(name: str) -> None:
    settings = read_settings(ROOT / "configs" / name, [] if name.startswith("quickstart") else ["corpus.path=docs"])
    assert max(settings.encoder.dims) == (settings.vector_size or 2048)  # of Llama-3.2-1B as it is


TEXTS = (
    "no",
    "2024_11_27",
    "runs/exp #2",
    "1e3",
    "null and void",
    "a: b",
    "[x",
    "{x}",
    "'quoted'",
    "${oc.env:HOME}",
    "*x",
)
TEXTS += ("~", "~user/x", "0x10", "true", "12:30:45", "æøå", "- x", "%", "@x", "a=b", " blanks ")


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_and_read_back(read: Read, tmp_path: Path, text: str) -> None:
    keys = ("run", "corpus.language", "encoder.query_prefix", "teacher.model", "encode.index")
    settings = read(*(f"{key}={text}" for key in keys))
    assert {get(settings, key) for key in keys} == {text}
    write_settings(settings, tmp_path / "new" / "again.yaml")
    assert read_settings(tmp_path / "new" / "again.yaml") == settings
    quoted = read(text=GOOD + f"teacher:\n  model: '{text.replace(chr(39), 2 * chr(39))}'\n")
    assert quoted.teacher.model == text


@pytest.mark.parametrize(
    "text", ["no", "2024_11_27", "1e3", "true", "12:30:45", "0x10", "2024-11-27", "3.10", "${oc.env:HOME}"]
)
def test_text_in_a_file_needs_no_quotes(read: Read, text: str) -> None:
    assert read(text=GOOD + f"encode:\n  index: {text}  # a comment\n").encode.index == text
    assert read(text=GOOD + f"evaluate:\n  collections:\n  - {text}\n").evaluate.collections == [text]


def test_a_prefix_keeps_blanks_and_lines(read: Read, tmp_path: Path) -> None:
    for prefix in ("", "query: ", "Instruct: find\nQuery: ", "???", "null", "\t#", "'", '"\\'):
        settings = read(f"encoder.query_prefix={prefix}")
        assert settings.encoder.query_prefix == prefix
        write_settings(settings, tmp_path / "again.yaml")
        assert read_settings(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize("null", ["null", "~", "", "NULL"])
def test_null_is_nothing_where_nothing_is_allowed(read: Read, null: str) -> None:
    for key in ("slurm.partition", "encode.batch_tokens", "train.start", "augment.writer", "corpus.max_passages"):
        assert get(read(f"{key}={null}"), key) is None
        section, name = key.split(".")
        text = GOOD.replace(f"{section}:\n", f"{section}:\n  {name}: {null}\n")
        assert get(read(text=text if text != GOOD else GOOD + f"{section}:\n  {name}: {null}\n"), key) is None
    with pytest.raises(SettingsError, match=r"s.yaml:8: teacher.model=None: must be a valid string"):
        read(text=GOOD + f"teacher:\n  model: {null}\n")
    assert read(text=GOOD + f"encoder: {null}\n").encoder == EncoderSettings()
    assert read(text=GOOD + "slurm: {partition: 'null'}\n").slurm.partition == "null"


def test_the_home_folder_is_expanded_in_names(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    keys = ("run", "llm", "corpus.path", "teacher.model", "train.start", "augment.writer")
    settings = read(*(f"{key}=~/x y" for key in keys), "evaluate.collections=[~/beir]", "encoder.query_prefix=~/x")
    assert {get(settings, key) for key in keys} == {"/home/u/x y"}
    assert settings.evaluate.collections == ["/home/u/beir"]
    assert settings.encoder.query_prefix == "~/x"
    assert read("llm=org/~/x").llm == "org/~/x"


def test_sections_can_be_replaced_and_changed(read: Read) -> None:
    settings = read()
    other = replace(settings, train=replace(settings.train, steps=9))
    assert (other.train.steps, settings.train.steps, other.encoder) == (9, 7, settings.encoder)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        replace(settings.train, steps=0)
    EncoderSettings().dims.append(1)
    assert EncoderSettings().dims == [768, 512, 256]


def test_what_changes_only_the_cost_is_not_recorded(read: Read) -> None:
    cost = {
        "train": "zero_stage offload_optimizer loss_partition chunk_tokens activation_budget checkpoint_layers "
        "tensorboard checkpoint_every keep_checkpoints",
        "corpus": "bad_record_limit",
        "augment": "bad_answer_limit requests answers",
        "teacher": "batch_tokens requests",
        "encode": "batch_tokens",
    }
    settings = read()
    for section in (item.name for item in fields(settings) if is_dataclass(getattr(settings, item.name))):
        whole = as_dict(getattr(settings, section))
        assert set(whole) - set(recorded(getattr(settings, section))) == set(cost.get(section, "").split())
        assert recorded(getattr(settings, section)).items() <= whole.items()
    changed = replace(settings.train, zero_stage=3, activation_budget=0.5)
    assert recorded(changed) == recorded(settings.train) != recorded(replace(settings.train, temperature=0.5))


def test_written_settings_are_plain_yaml(read: Read, tmp_path: Path) -> None:
    settings = read("train.activation_budget=2", "corpus.packages=[numpy]", "corpus.language=no")
    write_settings(settings, tmp_path / "again.yaml")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text("utf-8")) == as_dict(settings)
    assert isinstance(settings.train.learning_rate, float) and TrainSettings().dtype == "auto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "  stepz: 3\n", r"s.yaml:7: train.stepz: no such setting; did you mean train.steps\?"),
        (GOOD + "prune: {steps: 3}\n", r"s.yaml:7: prune.steps: no such setting; did you mean train.steps\?"),
        (GOOD + "  quux: 3\n", "s.yaml:7: train.quux: no such setting; known are train.start, train.steps, "),
        (GOOD.replace("steps: 7", "steps: many"), r"s.yaml:6: train.steps='many': must be a valid integer"),
        (GOOD.replace("train:", "training:"), r"s.yaml:5: training: no such setting; did you mean train\?"),
        (GOOD + "encoder: 5\n", "s.yaml:7: encoder='5': must be a dictionary"),
        (GOOD + "encoder:\n  dims:\n  - 8\n  - many\n", r"s.yaml:10: encoder.dims.1='many': must be a valid integer"),
        (GOOD + "  steps: 8\n", r"s.yaml:7: train.steps: named twice, first at .*s.yaml:6"),
        (GOOD + "run: x\n", r"s.yaml:7: run: named twice, first at .*s.yaml:1"),
        ("run: x\nllm: [unclosed\n", "s.yaml:3: cannot be read as YAML: .*expected ',' or ']'"),
        ("run: x\n\tllm: y\n", "s.yaml:2: cannot be read as YAML: .*indent with blanks, not tabs"),
        (GOOD + "seed: !!int 5\n", "s.yaml:7: cannot be read as YAML: anchors, aliases and tags"),
        (GOOD + "seed: !!python/object/apply:os.system [x]\n", "s.yaml:7: cannot be read as YAML: anchors, aliases"),
        (GOOD + "seed: &a 5\n", "s.yaml:7: cannot be read as YAML: anchors, aliases and tags"),
        (GOOD + "seed: *a\n", "s.yaml:7: cannot be read as YAML: anchors, aliases and tags"),
        (GOOD + "? [a]\n: b\n", "s.yaml:7: found a list or map where a key should be"),
        (GOOD + "---\nrun: y\n", "s.yaml:7: cannot be read as YAML: expected a single document"),
        (GOOD + "seed: \x00\n", r"s.yaml:7: cannot be read as YAML: character '\\x00'"),
        (GOOD + 'encode: {index: "\\U99999999"}\n', "s.yaml:1: cannot be read as YAML: Python int too large"),
        (GOOD + 'encode: {index: "\\ud800"}\n', r"s.yaml:7: encode.index='\\ud800': must be a valid string"),
        (GOOD.encode() + b"seed: \xff\n", "s.yaml:7: not UTF-8 text"),
        (GOOD.encode("utf-16"), "s.yaml:1: not UTF-8 text"),
        ("[" * 5000, "s.yaml:1: cannot be read as YAML: nested too deeply"),
        ("- a\n- b\n", r"s.yaml:1: expected sections with keys, found \['a', 'b'\]"),
        ("", "s.yaml:1: expected sections with keys, found None"),
        ("just text", "s.yaml:1: expected sections with keys, found 'just text'"),
        ("run: runs/x\nllm: m\n", "s.yaml: corpus.path: no value; set it in the file or as corpus.path=VALUE"),
        (GOOD.replace("docs.jsonl", "???"), "s.yaml:4: corpus.path: no value; set it in the file or as"),
        (GOOD + "teacher:\n  max_tokens: ???\n", "s.yaml:8: teacher.max_tokens: no value"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_reason(read: Read, text: str | bytes, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        read(text=text)
    assert len(str(error.value).splitlines()) == 1


def test_several_problems_are_told_at_once(read: Read) -> None:
    with pytest.raises(SettingsError) as error:
        read("seed=-1", "export.dtype=x", text=GOOD + "  dtype: float16\n  zero_stage: 9\n  tensorboard: perhaps\n")
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[2].endswith("(and 2 more problems)")
    assert "override 'seed=-1': seed='-1': must be greater than or equal to 0" in lines
    assert any("s.yaml:7: train.dtype='float16': must be 'auto', 'bfloat16' or 'float32'" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train.stepz: no such setting; did you mean train.steps\?"),
        ("train.steps", "expected section.key=value, for example train.steps=100"),
        ("train={steps: 3}", "expected section.key=value, for example train.steps=100"),
        ("=3", ": no such setting; known are run, seed, llm"),
        ("train.steps=many", "train.steps='many': must be a valid integer"),
        ("train.steps=0", "train.steps='0': must be greater than or equal to 1"),
        ("train.steps=99999999999", "train.steps='99999999999': must be less than 2147483648"),
        ("train.steps=1.5", "train.steps='1.5': must be a valid integer"),
        ("train.batch_size=", "train.batch_size=None: must be a valid integer"),
        (
            "train.minutes=5",
            "train.minutes=5 and train.steps=7: only one can say when training ends",
        ),
        ("train.minutes=0", "train.minutes='0': must be greater than 0"),
        ("train.minutes=inf", "train.minutes='inf': must be a finite number"),
        ("train.steps=[3", "cannot be read as YAML"),
        ("train.tensorboard=perhaps", "train.tensorboard='perhaps': must be a valid boolean"),
        ("train.temperature=0", "train.temperature='0': must be greater than or equal to 0.0001"),
        ("train.temperature=nan", "train.temperature='nan': must be a finite number"),
        ("train.learning_rate=inf", "train.learning_rate='inf': must be a finite number"),
        ("train.learning_rate=-1e-4", "train.learning_rate='-1e-4': must be greater than 0"),
        ("train.learning_rate=3000", "train.learning_rate='3000': must be less than or equal to 1"),
        (
            "train.weight_decay=1e5",
            "train.weight_decay=100000.0 with train.learning_rate=0.0003 and train.embedding_rate=1: the",
        ),
        ("train.dtype=float16", "train.dtype='float16': must be 'auto', 'bfloat16' or 'float32'"),
        ("train.activation_budget=half", "train.activation_budget='half': must be auto, or GiB: a number, 0 or more"),
        ("train.activation_budget=-1", "train.activation_budget='-1': must be auto, or GiB"),
        ("train.zero_stage=4", "train.zero_stage='4': must be less than or equal to 3"),
        ("train.zero_stage=0", "train.zero_stage=0 takes train.dtype=float32 only"),
        ("train.loss_partition=both", "train.loss_partition='both': must be 'auto', 'passages' or 'queries'"),
        ("train.dim_weights=[1.0]", "must be one weight for each of encoder.dims"),
        ("train.dim_weights=[0,0,0]", "one must be more than 0"),
        ("train.dim_weights=[1,-1,1]", "train.dim_weights.1='-1': must be greater than or equal to 0"),
        ("train.batch_size=99999999", "train.batch_size='99999999': must be less than or equal to 1048576"),
        ("evaluate.depth=99999999", "evaluate.depth='99999999': must be less than or equal to 65536"),
        ("evaluate.precisions=[float16]", "evaluate.precisions.0='float16': must be 'float32', 'int8' or 'binary'"),
        ("evaluate.precisions=[]", "evaluate.precisions=.*at least 1 item"),
        ("evaluate.rescore_multiplier=0", "evaluate.rescore_multiplier='0': must be greater than or equal to 1"),
        ("train.passage_share=0.5", "train.passage_share=0.5: InfoNCE and soft targets compare queries with all"),
        ("train.superwords=9", "train.superwords=9 with train.regression_weight=0: only the token vectors that"),
        ("train.passage_share=0", "train.passage_share='0': must be greater than 0"),
        ("train.hard_negatives=9", "train.hard_negatives=9.0 is more than augment.negatives=8"),
        ("train.hard_negatives=-1", "train.hard_negatives='-1': must be greater than or equal to 0"),
        ("encoder.dims=[]", "encoder.dims=.*at least 1 item"),
        ("encoder.dims=64", "encoder.dims='64': must be a valid list"),
        ("encoder.dims=[8,8]", "encoder.dims=.*must differ from each other"),
        ("encoder.dims=[1024]", "encoder.dims=.*: 1024 components are more than prune.hidden=768 has"),
        ("encoder.max_query_tokens=2", "must be greater than or equal to 3"),
        ("prune.layers=999999999", "prune.layers='999999999': must be less than or equal to 16777216"),
        ("prune.parameters=100", "prune.parameters=100: nothing is left for it to decide; set those of prune.layers"),
        ("prune.parameters=0", "prune.parameters='0': must be greater than or equal to 1"),
        ("prune.heal_scored_share=0", "prune.heal_scored_share='0': must be greater than 0"),
        ("prune.heal_kl_weight=1.5", "must be less than or equal to 1"),
        ("prune.layer_choice=odd", "prune.layer_choice='odd': must be 'even', 'first', 'influence' or 'residual'"),
        ("evaluate.systems=[drama,colbert]", "evaluate.systems.1='colbert': must be drama, asymmetric, ridge"),
        ("evaluate.systems=[drama,drama]", "must differ from each other"),
        ("evaluate.systems=[]", "evaluate.systems=.*at least 1 item"),
        (
            "augment.crops=0",
            "augment.crops=0, .*, augment.synthetic_queries=0, .*: nothing to train on",
        ),
        (
            "augment.crop_kinds={spam: 1}",
            "augment.crop_kinds={'spam': '1'}: must be weights of span, sentence",
        ),
        ("augment.round_trip=70", r"augment.round_trip=70 is more than augment.negatives_to_rank=60"),
        (
            "augment.negative_strata=9",
            "augment.negative_strata=9 is more than augment.negatives=8: each is to give one",
        ),
        ("augment.json_answers=true", r"augment.json_answers=true with augment.synthetic_queries=0 and"),
        ("train.source_weights={spam: 1}", "train.source_weights=.*: must be weights of crop, synthetic, rerank"),
        ("train.source_weights={crop: 0}", "must be weights of .*, logged, one of them more than 0"),
        ("train.same_in_batch=[colour]", "train.same_in_batch"),
        ("augment.crop_kinds={span: 0}", "must be weights of .*, title, one of them more than 0"),
        ("augment.crop_kinds={span: -1}", "augment.crop_kinds.span='-1': must be greater than or equal to 0"),
        ("augment.crop_kinds=span", "augment.crop_kinds='span': must be a valid dictionary"),
        ("augment.min_crop_words=99", "augment.min_crop_words=99 is more than augment.max_crop_words"),
        (
            "augment.negatives_to_rank=12",
            "augment.negatives=8 do not fit .* and augment.negatives_to_rank=12",
        ),
        ("augment.positives=55", "augment.negatives=8 do not fit behind augment.positives=55 and"),
        ("augment.top_p=0", "augment.top_p='0': must be greater than 0"),
        ("corpus.path=installed-packages", "corpus.path=installed-packages needs names in corpus.packages"),
        ("corpus.bad_record_limit=-0.1", "must be greater than or equal to 0"),
        ("corpus.language=", "corpus.language='': must be one line of text, not empty"),
        ("run= ", "run=' ': must be one line of text, not empty"),
        ("run=x\ntouch y", r"run='x\\ntouch y': must be one line of text"),
        ("slurm.partition=gpu\n#SBATCH --uid=0", "must be one line of text"),
        ("slurm.account=\x85", "must be one line of text"),
        (
            "slurm.minutes=6",
            "slurm.warning_seconds=300: must be over a minute less than the time limit, slurm.minutes=6",
        ),
        ("seed=-1", "seed='-1': must be greater than or equal to 0"),
        ("run=\udcff", "must be a valid string"),
    ],
)
def test_a_bad_value_is_refused_with_the_allowed_ones(read: Read, override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        read(override)
    assert str(error.value).startswith(f"override {override!r}: ") and len(str(error.value).splitlines()) == 1


def test_targets_without_any_part_are_refused(read: Read) -> None:
    with pytest.raises(
        SettingsError, match=r"targets\.teacher_share=0 with targets\.lexical_components=0: the vectors"
    ):
        read("targets.teacher_share=0", "targets.lexical_components=0")
    assert read("targets.teacher_share=0").targets.uses_bm25


def test_binary_vectors_want_dims_of_whole_bytes(read: Read) -> None:
    binary = "evaluate.precisions=[float32,binary]"
    message = (
        r"encoder\.dims=\[256, 100\] with evaluate\.precisions=\['float32', 'binary'\]: .* and 100 is not a multiple"
    )
    with pytest.raises(SettingsError, match=message):
        read("encoder.dims=[256,100]", binary)
    assert read("encoder.dims=[256,100]", "evaluate.precisions=[float32,int8]").encoder.dims == [256, 100]
    assert read("encoder.dims=[256,104]", binary).evaluate.precisions == ["float32", "binary"]


def test_steps_or_minutes_say_when_training_ends(read: Read, tmp_path: Path) -> None:
    def ends(settings: Settings) -> tuple[int | None, float | None]:
        return settings.train.steps, settings.train.minutes

    assert ends(read("train.steps=")) == (1000, None) and ends(read()) == (7, None)
    timed = read("train.steps=null", "train.minutes=2.5")
    assert ends(timed) == (None, 2.5)
    write_settings(timed, tmp_path / "written.yaml")
    assert ends(read_settings(tmp_path / "written.yaml")) == (None, 2.5)
    with pytest.raises(SettingsError, match="only one can say when training ends"):
        read("train.minutes=2.5", text=GOOD.replace("7", "1000"))  # the default, but written down


def test_settings_that_do_not_fit_are_traced_to_the_one_that_was_given(read: Read) -> None:
    with pytest.raises(SettingsError, match=r"^[^ ]*s.yaml:7: train.hard_negatives=9.0 is more than"):
        read(text=GOOD + "  hard_negatives: 9\n")
    with pytest.raises(SettingsError, match=r"^override 'augment.negatives=0': train.hard_negatives=1.0 is more than"):
        read("augment.negatives=0")
    with pytest.raises(SettingsError, match=r"batch needs two passages"):
        read("train.batch_size=1", "train.hard_negatives=0")
    read("train.batch_size=1", "train.hard_negatives=1")
    read("train.start=some/model", "encoder.dims=[1024]")  # the pruned shape does not matter


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("2", 2), ("0.5", 0.5), ("0", 0)])
def test_the_activation_budget_is_a_number_or_auto(read: Read, text: str, value: object) -> None:
    assert read(f"train.activation_budget={text}").train.activation_budget == value


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: no such settings file"):
        read_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(SettingsError, match="expected a settings file, found a folder"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prefix": ""}', "m.json: prefix: no such setting; known are query_prefix"),
        ('{"max_query_tokens": "64"}', "m.json: max_query_tokens='64': must be a valid integer"),
        ('{"dims": [true]}', "m.json: dims.0=True: must be a valid integer"),
        ('{"dims": 5}', "m.json: dims=5: must be a valid array"),
        ("[1]", r"m.json: \[1\]: must be an object"),
        ("{", "m.json: '{': .*EOF"),
    ],
)
def test_a_section_in_json_has_json_types(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_json(EncoderSettings, text, "m.json")
    assert read_json(EncoderSettings, '{"dims": [8]}', "m.json") == EncoderSettings(dims=[8])

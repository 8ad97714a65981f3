"""The table of stages: name, inputs, settings it depends on, and the function that does the work.

The command line, the runner, submit and the report read it. The work itself is in stage.py of each package, named here
as "module:function" and imported on use: `drama --help` must not wait for torch. Does not make artefacts: runner.py
does. An artefact's name is its folder in the run: `train`, `encode/corpus/drama`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

from drama_dist.labels import OWN_COLLECTIONS, SYSTEMS, mixed
from drama_dist.run.artefact import PROVENANCE
from drama_dist.setting_types import recorded
from drama_dist.settings import EXACT, Settings, SettingsError

CORPUS, TRAINING_TEXTS = OWN_COLLECTIONS  # the collections that a run searches, and that it trains on
TRIPLETS = "triplets"
SUITE = "suite"
MASKS = "masks"
_OF_MASKS = tuple(
    f"prune.{key}"
    for key in [
        "parameters",
        "layers",
        "hidden",
        "heads",
        "mlp",
        "hidden_choice",
        "calibration_passages",
        "calibration_tokens",
        "mask_steps",
        "mask_learning_rate",
        "heal_learning_rate",
        "heal_tokens",
        "heal_scored_share",
    ]
)
# system -> the stage that makes its encoder
TRAINING = {"drama": "train", "ridge": "ridge", "random-init": "train-random-init"}


@dataclass(frozen=True)
class Stage:
    """One kind of artefact.

    name: its folder's; {collection} and {system} are parameters. verb: the command that makes it.
    work: called with the Run, the StageFolder and the parameters; it finishes the folder.
    sections: the settings that the artefact depends on, sections or single keys; or a "module:function" that returns
    them, given the settings and the parameters.
    needs: names of the artefacts that it reads, given the settings and the parameters.
    copies: names of artefacts of which it copies what it would else compute: they are made before it, but it does not
    depend on them. Without them it is the same up to rounding and to counts of work, and is kept.
    inputs: a "module:function" that fingerprints whatever else is read, given the Run and the parameters.
    processes: what slurm starts: "one", a whole "node", or several "nodes"; None if the stage has no job of its own.
    array: whether tasks of an array job share the work, given the settings and the parameters; a job of one node then
    finishes it.
    check: a "module:function" that finds what the work could not be done with, given the settings and the parameters;
    called before anything is made, so it reads headers and configurations, no weights. Raises SettingsError.
    constants: parameters that are not in the name. foldered: False if it writes into the run's folder directly.
    """

    name: str
    verb: str
    help: str
    work: str
    sections: tuple[str, ...] | str
    needs: Callable[..., Sequence[str]] = lambda settings, **_: ()
    copies: Callable[..., Sequence[str]] = lambda settings, **_: ()
    inputs: str | None = None
    check: str | None = None
    processes: str | None = None
    array: Callable[..., bool] = lambda settings, **_: False
    constants: dict[str, str] = field(default_factory=dict)
    foldered: bool = True

    def parameters(self, name: str) -> dict[str, str] | None:
        """The parameters in an artefact's name; None if this stage does not make it."""
        match = re.fullmatch(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(self.name)), name)
        return None if match is None else {**match.groupdict(), **self.constants}


def _of_pruning(settings: Settings) -> list[str]:
    prune = settings.prune
    taught = [TRAINING_TEXTS, f"encode/{TRAINING_TEXTS}/teacher"] if prune.layer_choice == "residual" else []
    return [CORPUS, *([MASKS] if prune.mask_steps else []), *taught]


def _of_training(settings: Settings, system: str) -> list[str]:
    train = settings.train
    regression = ["targets"] if train.regression_weight else []
    start = ["ridge"] if regression and system == "drama" else _of_start(settings)
    scores = _of_targets(settings) if train.soft_target_weight else []
    return list(dict.fromkeys([TRAINING_TEXTS, "augment", *start, *regression, *scores]))


def _of_start(settings: Settings) -> list[str]:
    return [] if settings.train.start else ["prune"]


def _of_targets(settings: Settings) -> list[str]:
    systems = ["teacher", *(["bm25"] if settings.targets.uses_bm25 else [])]
    return ["augment", *(f"encode/{TRAINING_TEXTS}/{system}" for system in systems)]


def _of_encoding(settings: Settings, collection: str, system: str) -> list[str]:
    if system == "asymmetric":
        words = [f"encode/{TRAINING_TEXTS}/bm25"] if settings.targets.uses_bm25 else []
        return [stored_collection(collection), "targets", f"encode/{collection}/teacher", *words]
    return [stored_collection(collection), *([TRAINING[system]] if system in TRAINING else [])]


def encodings_to_copy(settings: Settings, collection: str, system: str) -> list[str]:
    """The encoding whose vectors this one copies: the teacher's of the training texts, for its own of the corpus, in a
    run that trains.
    """
    copies = (collection, system) == (CORPUS, "teacher") and _trained(settings)
    return [f"encode/{TRAINING_TEXTS}/teacher"] if copies else []


def _trained(settings: Settings) -> list[str]:
    """What the run trains."""
    encoded = settings.evaluate.encoded_labels
    asked = {"drama" if name == "asymmetric" else name for name in encoded}
    return [stage for name, stage in TRAINING.items() if name in asked]


def _of_index(settings: Settings, collection: str, system: str) -> list[str]:
    return [stored_collection(collection), f"encode/{collection}/{system}", *_of_asymmetric_queries([system])]


def _of_evaluation(settings: Settings, collection: str) -> list[str]:
    return [
        stored_collection(collection),
        *(f"encode/{collection}/{label}" for label in settings.evaluate.encoded_labels),
        *_of_asymmetric_queries(settings.evaluate.encoded_labels),
    ]


def _of_asymmetric_queries(systems: Iterable[str]) -> list[str]:
    """The encoder of queries, which the vectors of passages do not depend on."""
    return [TRAINING["drama"]] if "asymmetric" in systems else []


def _of_augmentation(settings: Settings) -> list[str]:
    words_count = settings.teacher.fuse_bm25 or settings.augment.draws_keywords
    systems = ["teacher", *(["bm25"] if words_count else [])]
    collections = [CORPUS, TRAINING_TEXTS, *collections_to_leave_out(settings), *_triplets(settings)]
    return [*collections, *(f"encode/{TRAINING_TEXTS}/{system}" for system in systems)]


def _triplets(settings: Settings, **_: str) -> list[str]:
    return [TRIPLETS] if settings.augment.brings_texts else []


def collections_to_leave_out(settings: Settings) -> list[str]:
    """Collections whose test queries may be among people's queries, beside the corpus."""
    peoples = settings.augment.queries or settings.augment.labelled_triples
    return [stored_collection(label) for label in settings.evaluate.collection_labels] if peoples else []


def stored_collection(collection: str) -> str:
    """The artefact that holds a collection's passages, queries and judgements."""
    return collection if collection in OWN_COLLECTIONS else f"collections/{collection}"


STAGES = (
    Stage(
        name=CORPUS,
        verb="corpus",
        help="read, clean and store the corpus",
        work="drama_dist.corpus.stage:build_corpus",
        sections="drama_dist.corpus.stage:corpus_sections",
        inputs="drama_dist.corpus.stage:corpus_inputs",
        check="drama_dist.corpus.stage:check_corpus",
        processes="one",
    ),
    Stage(
        name=TRIPLETS,
        verb="triplets",
        help="let an LLM make up tasks, queries and texts, and read people's triples",
        work="drama_dist.augment.triplet_stage:triplets",
        sections="drama_dist.augment.triplet_stage:sections",
        inputs="drama_dist.augment.triplet_stage:inputs",
        check="drama_dist.augment.triplet_stage:check",
        processes="node",
    ),
    Stage(
        name=TRAINING_TEXTS,
        verb="corpus",
        help="cut the corpus into the windows that are trained on",
        work="drama_dist.corpus.stage:build_windows",
        sections=("corpus.window_words", "corpus.window_step", "corpus.general_share"),
        needs=lambda settings, **_: [CORPUS, *_triplets(settings)],
        processes="one",
        constants={"collection": TRAINING_TEXTS},
    ),
    Stage(
        name="collections/{collection}",
        verb="corpus",
        help="read another collection",
        work="drama_dist.corpus.stage:build_collection",
        sections="drama_dist.corpus.stage:collection_sections",
        inputs="drama_dist.corpus.stage:collection_inputs",
        check="drama_dist.corpus.stage:check_collection",
        processes="one",
    ),
    Stage(
        name=MASKS,
        verb="masks",
        help="learn which parts of the LLM stay",
        work="drama_dist.prune.mask_stage:learn_masks",
        sections=("seed", "llm", "encoder.lower_case", *_OF_MASKS),
        needs=lambda settings: [CORPUS],
        inputs="drama_dist.prune.stage:inputs",
        check="drama_dist.prune.mask_stage:check",
        processes="nodes",
    ),
    Stage(
        name="prune",
        verb="prune",
        help="cut the LLM down to a small encoder",
        work="drama_dist.prune.stage:prune",
        sections=("seed", "llm", "prune", "encoder"),
        needs=_of_pruning,
        inputs="drama_dist.prune.stage:inputs",
        check="drama_dist.prune.source:check",
        processes="node",
    ),
    Stage(
        name="augment",
        verb="augment",
        help="write training examples",
        work="drama_dist.augment.stage:augment",
        sections=("seed", "teacher", "augment"),
        needs=_of_augmentation,
        inputs="drama_dist.augment.stage:inputs",
        check="drama_dist.augment.stage:check",
        array=lambda settings: settings.augment.synthetic_queries > 0,  # they take most of the time
        processes="node",
    ),
    Stage(
        name="targets",
        verb="targets",
        help="what the vectors of training texts are to become",
        work="drama_dist.train.target_vectors:write_targets",
        sections="drama_dist.train.target_vectors:sections",
        needs=_of_targets,
        processes="one",
    ),
    Stage(
        name="ridge",
        verb="ridge",
        help="fit token vectors, which regression begins from",
        work="drama_dist.train.ridge:ridge",
        sections=("seed", "encoder", "train.superwords"),
        needs=lambda settings, system: [TRAINING_TEXTS, "augment", "targets", *_of_start(settings)],
        inputs="drama_dist.train.stage:inputs",
        check="drama_dist.train.stage:check",
        processes="node",
        constants={"system": "ridge"},
    ),
    Stage(
        name="train",
        verb="train",
        help="train the encoder",
        work="drama_dist.train.stage:train",
        sections=("seed", "encoder", "targets.teacher_share", "train"),
        needs=_of_training,
        inputs="drama_dist.train.stage:inputs",
        check="drama_dist.train.stage:check",
        processes="nodes",
        constants={"system": "drama"},
    ),
    Stage(
        name="train-random-init",
        verb="train",
        help="train an encoder of the same shape from random weights",
        work="drama_dist.train.stage:train",
        sections=("seed", "encoder", "targets.teacher_share", "train"),
        needs=_of_training,
        inputs="drama_dist.train.stage:inputs",
        check="drama_dist.train.stage:check",
        processes="nodes",
        constants={"system": "random-init"},
    ),
    Stage(
        name="encode/{collection}/{system}",
        verb="encode",
        help="encode a collection with a system, and index it",
        work="drama_dist.search.stage:encode",
        sections="drama_dist.search.stage:sections",
        needs=_of_encoding,
        copies=encodings_to_copy,
        inputs="drama_dist.search.stage:inputs",
        check="drama_dist.search.stage:check",
        processes="one",
        array=lambda settings, collection, system: system not in ("bm25", "asymmetric"),
    ),
    Stage(
        name="index/{collection}/{system}",
        verb="encode",
        help="build an index over a system's vectors",
        work="drama_dist.search.stage:index",
        sections="drama_dist.search.stage:index_sections",
        needs=_of_index,
    ),
    Stage(
        name="evaluate/{collection}",
        verb="evaluate",
        help="compare the systems on the test queries",
        work="drama_dist.evaluate.stage:evaluate",
        sections="drama_dist.evaluate.stage:sections",
        needs=_of_evaluation,
    ),
    Stage(
        name=SUITE,
        verb="evaluate",
        help="compare the systems over the collections of a suite",
        work="drama_dist.evaluate.suite:compare",
        sections=(),
        needs=lambda settings: [f"evaluate/{label}" for label in settings.evaluate.suite_labels],
        foldered=False,
    ),
    Stage(
        name="export",
        verb="export",
        help="write a folder that sentence-transformers loads",
        work="drama_dist.export.stage:export",
        sections=("export", "encode.max_passage_tokens"),
        needs=lambda settings: ["train"],
    ),
    Stage(
        name="report",
        verb="report",
        help="write report.html and report.json",
        work="drama_dist.evaluate.report:report",
        sections=(),
        needs=lambda settings: evaluations(settings),
        foldered=False,
    ),
)


@dataclass(frozen=True)
class Artefact:
    """One artefact of a run: a stage with its parameters."""

    name: str
    stage: Stage
    parameters: dict[str, str]

    @classmethod
    def named(cls, name: str) -> Artefact:
        """Raises KeyError if no stage makes this artefact."""
        for stage in STAGES:
            parameters = stage.parameters(name)
            if parameters is not None:
                return cls(name, stage, parameters)
        raise KeyError(f"{name}: no stage makes it")

    def needs(self, settings: Settings) -> Sequence[str]:
        """Names of the artefacts that it reads."""
        return self.stage.needs(settings, **self.parameters)

    def copies(self, settings: Settings) -> Sequence[str]:
        """Names of the artefacts that it copies from."""
        return self.stage.copies(settings, **self.parameters)

    def sections(self, settings: Settings) -> dict[str, Any]:
        """The settings that it depends on."""
        if isinstance(self.stage.sections, str):
            sections: dict[str, Any] = function_named(self.stage.sections)(settings, **self.parameters)
            return sections
        return {name: _recorded(settings, name) for name in self.stage.sections}

    def is_array(self, settings: Settings) -> bool:
        """Whether tasks of an array job can share the work."""
        return self.stage.array(settings, **self.parameters)


def order_of(settings: Settings, *names: str) -> list[Artefact]:
    """The artefacts to make, each once and after everything it needs."""
    order: dict[str, Artefact] = {}

    def visit(name: str) -> None:
        if name not in order:
            artefact = Artefact.named(name)
            copies = [] if is_finished(settings.run, name) else artefact.copies(settings)
            for needed in (*artefact.needs(settings), *copies):
                visit(needed)
            order[name] = artefact

    for name in names:
        visit(name)
    return list(order.values())


def evaluations(settings: Settings) -> list[str]:
    """The artefacts that compare the systems, one for each collection."""
    return [f"evaluate/{collection}" for collection in (CORPUS, *settings.evaluate.collection_labels)]


def _compared(settings: Settings) -> list[str]:
    """What `drama evaluate` makes."""
    return [*_stored(settings), *evaluations(settings), *([SUITE] if settings.evaluate.suite else [])]


def _stored(settings: Settings) -> list[str]:
    """All collections, which come before anything is trained: one that cannot be fetched or read ends a run early."""
    return [CORPUS, *(stored_collection(label) for label in settings.evaluate.collection_labels)]


def in_order(names: Iterable[str]) -> list[str]:
    """Artefacts' names as their stages stand in the table; names that no stage makes are left out."""
    known = {name: index for name in names for index, stage in enumerate(STAGES) if stage.parameters(name) is not None}
    return sorted(known, key=lambda name: (known[name], name))


def command_of(artefact: Artefact) -> list[str]:
    """Verb and options of the command that makes an artefact; options only where they differ from the defaults.

    A stage that is called like its verb is all that the verb makes: it needs no options.
    """
    defaults = {"collection": CORPUS, "system": "drama"}
    given = {} if artefact.name == artefact.stage.verb else artefact.parameters
    options = {name: value for name, value in given.items() if value != defaults[name]}
    return [artefact.stage.verb, *(word for name, value in options.items() for word in (f"--{name}", value))]


def artefacts_of(settings: Settings, verb: str, collection: str = CORPUS, system: str = "drama") -> list[str]:
    """What a command makes, `run` everything. collection, system: as folders call them, or as the settings do.

    Raises SettingsError if the settings have no such collection or system.
    """
    own = {name: name for name in OWN_COLLECTIONS}
    collection = _label(collection, {**own, **settings.evaluate.collection_labels}, "evaluate.collections")
    encoded = settings.evaluate.encoded_labels
    if parts := mixed(system):
        raise SettingsError(f"--system {system}: a mix has no encoding; name {' or '.join(parts)}")
    system = _label(system, {**{name: name for name in SYSTEMS}, **encoded}, "evaluate.systems")
    if verb == "run":
        dense = [name for name in ("drama", "asymmetric") if name in encoded]
        searched = [artefact for name in (*dense, "bm25") for artefact in _encoding(settings, CORPUS, name)]
        served = [*searched, "export"] if dense else []
        return [*_stored(settings), *_trained(settings), *_compared(settings), *served, "report"]
    if verb == "evaluate":
        return _compared(settings)
    if verb == "encode":
        return _encoding(settings, collection, system)
    if verb == "train" and system not in TRAINING:
        raise SettingsError(f"--system {system}: expected a system that is trained: {', '.join(TRAINING)}")
    return [{"corpus": stored_collection(collection), "train": TRAINING.get(system, "")}.get(verb, verb)]


def _label(name: str, labels: dict[str, str], setting: str) -> str:
    for label, named in labels.items():
        if name in (label, named):
            return label
    raise SettingsError(f"{name!r}: expected {', '.join(labels)}; others are to be named in {setting}")


def _encoding(settings: Settings, collection: str, system: str) -> list[str]:
    """A system's encoding of a collection, and the index that `drama search` uses."""
    searched = collection == CORPUS and system in ("drama", "asymmetric")
    indexed = settings.encode.index != EXACT and searched
    return [f"encode/{collection}/{system}", *([f"index/{collection}/{system}"] if indexed else [])]


def is_finished(run: Path | str, name: str) -> bool:
    """Whether a run has this artefact complete."""
    return (Path(run) / name / PROVENANCE).exists()


def function_named(name: str) -> Callable[..., Any]:
    """Import the function that the table names as "module:function"."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), attribute)
    return function


def _recorded(settings: Settings, key: str) -> Any:
    value = attrgetter(key)(settings)
    return recorded(value) if is_dataclass(value) else value

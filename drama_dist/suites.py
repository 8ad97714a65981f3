"""Suites: collections that are evaluated together, by name or as a folder.

Covers which collections the paper's suites have, how each is read and scored, where it lies and where it comes from;
and which ones are made. Does not cover reading, fetching or making them (corpus/), nor the table of a suite
(evaluate/suite.py).
Sources: the paper (Ma et al., ACL 2025) for the figures; mteb 2.26 for tasks, data sets, splits, and whose queries may
be passages themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from drama_dist.labels import IR_DATASETS, NAMED_FORMS, hub_name, is_named, labels_of, names_of
from drama_dist.settings_file import SettingsError

DATASETS_PAGE = "https://huggingface.co/datasets/"
_ZIP = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{}.zip"
_LONGEST_LABEL = 100
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MadeKind = Literal["passkey", "needle"]


@dataclass(frozen=True)
class Member:
    """A collection of a named suite.

    name: its folder's, and so its label. task, dataset, subset, split: of mteb, the data set on the hub. language: of
    all its texts. archive: where to find it as a BEIR folder. own_left_out: a passage with the query's id is no
    hit, as in mteb.
    """

    name: str
    task: str
    dataset: str
    subset: str = "default"
    split: str = "test"
    language: str = "en"
    archive: str | None = None
    own_left_out: bool = False

    @property
    def origin(self) -> str:
        """Where to fetch it by hand."""
        part = "" if self.subset == "default" else f" (subset {self.subset}, split {self.split})"
        return self.archive or f"{DATASETS_PAGE}{self.dataset}{part}"


@dataclass(frozen=True)
class Suite:
    """A suite by name. paper: mean nDCG@10 of the paper's models."""

    members: tuple[Member, ...]
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A collection that is made (corpus/made.py). tokens: of each passage, by the LLM's tokenizer."""

    kind: MadeKind
    tokens: int


def _beir(name: str, task: str, dataset: str | None = None, own_left_out: bool = False) -> Member:
    return Member(name, task, f"mteb/{dataset or name}", archive=_ZIP.format(name), own_left_out=own_left_out)


def _in_languages(suite: str, task: str, languages: str, split: str) -> tuple[Member, ...]:
    return tuple(
        Member(f"{suite}-{code}", task, f"mteb/{task}", code, split, language=code) for code in languages.split()
    )


def _paper(base: float, large: float, whole: float) -> dict[str, float]:
    return {"drama-base (0.1B)": base, "drama-large (0.3B)": large, "drama-1b": whole}


SUITES = {
    "beir": Suite(
        (
            _beir("trec-covid", "TRECCOVID"),
            _beir("nfcorpus", "NFCorpus"),
            _beir("nq", "NQ"),
            _beir("hotpotqa", "HotpotQA"),
            _beir("fiqa", "FiQA2018", own_left_out=True),
            _beir("arguana", "ArguAna", own_left_out=True),
            _beir("webis-touche2020", "Touche2020", "touche2020"),
            _beir("quora", "QuoraRetrieval", own_left_out=True),
            _beir("dbpedia-entity", "DBPedia", "dbpedia"),
            _beir("scidocs", "SCIDOCS"),
            _beir("fever", "FEVER", own_left_out=True),
            _beir("climate-fever", "ClimateFEVER"),
            _beir("scifact", "SciFact"),
        ),
        _paper(0.569, 0.580, 0.591),
    ),
    "miracl": Suite(
        _in_languages("miracl", "MIRACLRetrieval", "ar bn de en es fa fi fr hi id ja ko ru sw te th yo zh", "dev"),
        _paper(0.704, 0.714, 0.717),
    ),
    "mldr": Suite(
        _in_languages("mldr", "MultiLongDocRetrieval", "ar de en es fr hi it ja ko pt ru th zh", "test"),
        _paper(0.471, 0.488, 0.548),
    ),
}
# By their names in evaluate.collections, which are no folders
MADE = {f"{kind}/{kind}-{tokens}": Made(kind, tokens) for kind in get_args(MadeKind) for tokens in _LENGTHS}
MADE_SUITES = get_args(MadeKind)
MEMBERS = {member.name: member for suite in SUITES.values() for member in suite.members}


def member_of(path: Path | str) -> Member | None:
    """The member of a named suite that a folder is, by its last two parts, as in beir/scifact; or a data set by name.

    A name is a member's on the hub by its subset, as huggingface:BeIR/scifact, huggingface:mteb/scifact and
    huggingface:mteb/MIRACLRetrieval/ar; and in ir_datasets by its first two parts.
    """
    if is_named(str(path)):
        return _member_named(str(path))
    folder = Path(path).absolute()
    suite = SUITES.get(folder.parent.name)
    return next((member for member in suite.members if member.name == folder.name), None) if suite else None


def _member_named(collection: str) -> Member | None:
    members = ((suite, member) for suite, of in SUITES.items() for member in of.members)
    return next((member for suite, member in members if _is_called(collection, suite, member)), None)


def _is_called(collection: str, suite: str, member: Member) -> bool:
    if collection.startswith(IR_DATASETS):
        parts = collection.removeprefix(IR_DATASETS).split("/")
        return parts[:1] == [suite] and "-".join(parts[:2]) in (member.name, f"{suite}-{member.name}")
    name = hub_name(collection)
    if member.subset != "default":
        return name.repository.lower() == member.dataset.lower() and name.parts[:1] == (member.subset,)
    return name.repository.lower() in (member.dataset.lower(), f"{suite}/{member.name}")


def label_of_suite(suite: str) -> str:
    """What the files of a suite's table are called: its name, its folder's, or its collections' with + between."""
    if not is_named(suite):
        return Path(suite).resolve().name
    label = "+".join(labels_of(names_of(suite), [*SUITES, *MADE_SUITES]))
    digits = sha256(suite.encode()).hexdigest()[:6]
    return label if len(label) <= _LONGEST_LABEL else f"{label[:_LONGEST_LABEL]}-{digits}"


def paths_of(suite: str, suite_path: str) -> list[str]:
    """The folders of a suite's collections: SUITE_PATH/SUITE/NAME of a named one, else what the folder has in it; or
    their names, where it is a list of these.

    Those of a named one need not be there; of one that is made they are the names in MADE. Raises SettingsError where
    the suite is neither a name nor a folder, or the folder has no folders.
    """
    if is_named(suite):
        return names_of(suite)
    if suite in MADE_SUITES:
        return [name for name, made in MADE.items() if made.kind == suite]
    if suite in SUITES:
        return [str(Path(suite_path) / suite / member.name) for member in SUITES[suite].members]
    folder = Path(suite)
    if not folder.is_dir():
        raise SettingsError(
            f"evaluate.suite={suite}: must be {', '.join([*SUITES, *MADE_SUITES])}, a folder of collections' folders, "
            f"or names with commas between, each {NAMED_FORMS}"
        )
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise SettingsError(f"evaluate.suite={suite}: has no folders; expected one for each collection")
    return [str(path) for path in folders]


def missing_collections(suite: str, suite_path: str, reason: str) -> str:
    """What to say where collections of a named suite are not there. reason: why they cannot be fetched."""
    members = {path: MEMBERS[Path(path).name] for path in paths_of(suite, suite_path)}
    missing = {path: member for path, member in members.items() if not Path(path).exists()}
    lines = [f"  {path}: {member.origin}" for path, member in missing.items()]
    there = f"; evaluate.suite={Path(suite_path) / suite} takes those that are" if len(missing) < len(members) else ""
    return (
        f"evaluate.suite={suite}: {len(missing)} of {len(members)} collections are not there, and cannot be fetched: "
        f"{reason}. Put them there as BEIR folders (corpus.jsonl, queries.jsonl, qrels/test.tsv), or start where the "
        f"hub can be reached, with mteb installed (pip install 'drama-dist[mteb]'): it fetches them{there}\n"
        + "\n".join(lines)
    )

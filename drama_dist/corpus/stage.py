"""The corpus stage: read, clean, hold out test queries and store; read, fetch or make collections to evaluate on.

The windows stage cuts the corpus into texts to train on (windows.py).

If the corpus comes with judgements, they are the test set, and every passage is kept. Otherwise the first sentences of
some passages become test queries and are removed from those passages. General text to train on beside the corpus is
stored in a table of its own, which nothing searches.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import PassageTable, open_collection, write_collection
from drama_dist.corpus.fetch import check_fetchable, fetch
from drama_dist.corpus.general import open_general, with_general, write_general
from drama_dist.corpus.layout import find_sources
from drama_dist.corpus.made import NEEDLE_PACKAGES, make_collection, token_counter
from drama_dist.corpus.named import check_named, fetch_named, folder_of, is_missing
from drama_dist.corpus.packages import name_words, package_passages, package_versions
from drama_dist.corpus.read import RawCorpus, SetAside, read_corpus
from drama_dist.corpus.split import count_words, lower_if_capitals, sentences
from drama_dist.corpus.windows import windows
from drama_dist.distributed import ranks
from drama_dist.encoder.failures import named_by
from drama_dist.encoder.model_check import check_llama
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.labels import HUB, IR_DATASETS, is_named
from drama_dist.records import BadRecord, Passage, Query, write_records
from drama_dist.run.folder import StageFolder, fingerprint_of_files
from drama_dist.run.graph import CORPUS, TRIPLETS
from drama_dist.run.progress import say
from drama_dist.run.runner import Run
from drama_dist.setting_types import recorded
from drama_dist.settings import PACKAGES_CORPUS, CorpusSettings, Settings, as_dict
from drama_dist.suites import MADE, MADE_SUITES, SUITES, Made, Member, member_of, paths_of

_HOW_TO_READ = ("language", "lower_capitals", "id_keys", "text_keys", "title_keys", "language_keys", "join_by")
_OF_WINDOWS = ("window_words", "window_step", "general_share")
_QUERY_WORDS = range(4, 41)
_REST_WORDS = 15


@dataclass(frozen=True)
class _Source:
    """Where passages come from: a path, or the docs of packages. setting: what names the path."""

    setting: str
    path: str
    packages: list[str]

    def inputs(self) -> dict[str, str]:
        if self.path == PACKAGES_CORPUS:
            return package_versions(self.packages)
        ranks.by_rank_0(self._fetch)
        path = _existing(self.setting, self.path)
        return {"source": fingerprint_of_files(find_sources(path, self.setting).files)}

    def _fetch(self) -> None:
        if is_missing(self.path):
            fetch_named(self.setting, self.path)

    def check(self) -> None:
        if is_missing(self.path):
            check_named(self.setting, self.path, judged=False)
        elif self.path != PACKAGES_CORPUS:
            find_sources(_existing(self.setting, self.path), self.setting)

    def read(self, corpus: CorpusSettings, aside: SetAside) -> RawCorpus:
        if self.path != PACKAGES_CORPUS:
            return read_corpus(folder_of(self.path), corpus, aside, self.setting)
        passages = package_passages(self.packages, corpus.language)
        aside.seen += len(passages)
        return RawCorpus(passages, [], {})


def _own(corpus: CorpusSettings) -> _Source:
    return _Source("corpus.path", corpus.path, corpus.packages)


def _general(corpus: CorpusSettings) -> _Source | None:
    return _Source("corpus.general", corpus.general, corpus.general_packages) if corpus.general else None


def corpus_sections(settings: Settings) -> dict[str, Any]:
    """The settings that the training corpus depends on."""
    corpus = {name: value for name, value in recorded(settings.corpus).items() if name not in _OF_WINDOWS}
    return {"seed": settings.seed, "corpus": corpus}


def check_corpus(settings: Settings) -> None:
    """Raise what making it would, where what it is made from is not there, and cannot be fetched as it is named."""
    _own(settings.corpus).check()
    if general := _general(settings.corpus):
        general.check()


def corpus_inputs(run: Run) -> dict[str, str]:
    """Fingerprint of the files that are read, or the packages' versions. What is named is fetched first."""
    general = _general(run.settings.corpus)
    inputs_of_general = general.inputs() if general else {}
    return _own(run.settings.corpus).inputs() | {f"general {name}": value for name, value in inputs_of_general.items()}


def build_corpus(run: Run, folder: StageFolder) -> None:
    """Store the training corpus: RUN/corpus.

    Raises FileNotFoundError or ValueError if there is no corpus, it is empty, or too many of its records are unusable.
    """
    corpus, seed = run.settings.corpus, run.settings.seed
    if ranks.rank() != 0:
        folder.finish()
        return
    aside = SetAside()
    own, general = _own(corpus), _general(corpus)
    raw = own.read(corpus, aside)
    if corpus.lower_capitals:
        raw = _lower_capitals(raw, folder.name)
    if general:
        _store_general(folder, general, raw.passages, corpus, seed, aside)
    if not raw.qrels:
        raw = _hold_out(_sample(_worthwhile(raw.passages, own, corpus, aside), corpus, seed), corpus, seed)
    _store(folder, raw, aside, corpus.bad_record_limit)


def _store_general(
    folder: StageFolder, source: _Source, own: Sequence[Passage], corpus: CorpusSettings, seed: int, aside: SetAside
) -> None:
    """Store general text that the corpus does not have, in an order drawn by the seed."""
    raw = source.read(corpus, aside)
    if corpus.lower_capitals:
        raw = _lower_capitals(raw, source.setting)
    passages = _worthwhile(raw.passages, source, corpus, aside, beside=own)
    random.Random(f"{seed} general").shuffle(passages)
    write_general(folder.folder, passages, (passage.id for passage in own))
    say(f"{source.setting}: {len(passages)} passages to train on beside the corpus")


def build_windows(run: Run, folder: StageFolder, collection: str) -> None:
    """Store the texts to train on, general ones among them: RUN/windows, a collection without queries."""
    corpus, facts = run.settings.corpus, {}
    if ranks.rank() == 0:
        whole, general = open_collection(run.path(CORPUS)).passages, open_general(run.path(CORPUS))
        texts = windows(whole, corpus.window_words, corpus.window_step)
        if general is not None:
            others = windows(general, corpus.window_words, corpus.window_step)
            texts = with_general(texts, others, corpus.general_share)
        if run.settings.augment.brings_texts:
            texts = _with_triplets(texts, PassageTable.open(run.path(TRIPLETS) / "passages"))
        write_collection(folder.folder, texts, [], {})
        facts = {"passages": len(PassageTable.open(folder.folder / "passages"))}
        say(f"{folder.name}: {facts['passages']} texts to train on, of {len(whole)} passages")
    folder.finish(**facts)


def _with_triplets(texts: Iterable[Passage], triplets: PassageTable) -> Iterator[Passage]:
    """Behind the others, and as they are: examples name them by their ids."""
    for passage in texts:
        if triplets.find(passage.id) is not None:
            raise ValueError(f"corpus.path: a passage has the id {passage.id!r}, as one of a triplet has; rename it")
        yield passage
    yield from (triplets[position] for position in range(len(triplets)))


def collection_sections(settings: Settings, collection: str) -> dict[str, Any]:
    """The settings for reading another collection: like the training corpus, but complete and with its own queries; for
    making one.
    """
    if made := _made(settings, collection):
        read_as = {name: getattr(settings.encoder, name) for name in ("passage_prefix", "lower_case")}
        return {"made": asdict(made), "encoder": read_as}
    return {"corpus": how_to_read(_as_read(settings, collection))}


def _made(settings: Settings, collection: str) -> Made | None:
    """What is to be made, where a collection is not read."""
    return MADE.get(settings.evaluate.collection_labels[collection])


def how_to_read(corpus: CorpusSettings) -> dict[str, Any]:
    """The settings that what is read from a collection depends on."""
    return {name: value for name, value in as_dict(corpus).items() if name in _HOW_TO_READ}


def _as_read(settings: Settings, collection: str) -> CorpusSettings:
    """How a collection is read: one by name, or a member of a named suite, by the names of BEIR's columns; the latter
    in its language, too.
    """
    corpus, path = settings.corpus, settings.evaluate.collection_labels[collection]
    member = member_of(path)
    if member or is_named(path):
        plain = CorpusSettings(path=path, language=member.language if member else corpus.language)
        return replace(
            corpus, **{name: value for name, value in how_to_read(plain).items() if name != "lower_capitals"}
        )
    return corpus


def check_collection(settings: Settings, collection: str) -> None:
    """Raise what making it would, where a collection or its judgements are not there and cannot be fetched."""
    setting, path = _named(settings, collection)
    if _made(settings, collection):
        with named_by("llm", settings.llm):
            check_llama(settings.llm, settings.trust_remote_code)
    elif is_missing(path):
        check_named(setting, path, judged=True)
    elif member := _to_be_fetched(settings, path):
        check_fetchable(settings, member)
    elif not find_sources(_existing(setting, path), setting).judgements:
        raise _unjudged(setting, folder_of(path))


def collection_inputs(run: Run, collection: str) -> dict[str, str]:
    """Fingerprint of the files that are read, which are fetched first where they are not there; of what a collection is
    made with, the LLM for its tokenizer.
    """
    if made := _made(run.settings, collection):
        text = package_versions(NEEDLE_PACKAGES) if made.kind == "needle" else {}
        return {"llm": run.once(model_fingerprint, run.settings.llm), **text}
    setting, path = _named(run.settings, collection)

    def fetch_it() -> None:
        if is_missing(path):
            fetch_named(setting, path)
        elif member := _to_be_fetched(run.settings, path):
            fetch(run.settings, member, Path(path))

    ranks.by_rank_0(fetch_it)
    return {"source": fingerprint_of_files(find_sources(_existing(setting, path), setting).files)}


def _named(settings: Settings, collection: str) -> tuple[str, str]:
    """The setting that names a collection, and its path."""
    path = settings.evaluate.collection_labels[collection]
    return f"evaluate.{'collections' if path in settings.evaluate.collections else 'suite'}", path


def _to_be_fetched(settings: Settings, path: str) -> Member | None:
    """The member of the named suite that is looked for at a path, and is not there."""
    suite, root = settings.evaluate.suite, settings.evaluate.suite_path
    if suite not in SUITES or Path(path).exists():
        return None
    looked_for = {Path(each).absolute() for each in paths_of(suite, root)}
    return member_of(path) if Path(path).absolute() in looked_for else None


def build_collection(run: Run, folder: StageFolder, collection: str) -> None:
    """Store a collection of evaluate.collections or of the suite: RUN/collections/NAME.

    Raises as `build_corpus` does, and ValueError if the collection has no judged queries.
    """
    if ranks.rank() != 0:
        folder.finish()
        return
    corpus, (setting, path) = _as_read(run.settings, collection), _named(run.settings, collection)
    aside = SetAside()
    if made := _made(run.settings, collection):
        raw = make_collection(made, token_counter(run.settings))
    else:
        raw = read_collection(folder_of(path), corpus, aside, setting, folder.name)
    _store(folder, raw, aside, corpus.bad_record_limit)


def read_collection(path: Path, corpus: CorpusSettings, aside: SetAside, setting: str, name: str) -> RawCorpus:
    """Read a collection to evaluate on, as its stage stores it. setting: what names the path. name: in messages.

    Raises as `read_corpus` does, and ValueError if there are no judged queries.
    """
    raw = read_corpus(path, corpus, aside, setting)
    if not raw.qrels:
        raise _unjudged(setting, path)
    return _lower_capitals(raw, name) if corpus.lower_capitals else raw


def _unjudged(setting: str, path: Path) -> ValueError:
    return ValueError(f"{setting}: {path}: no judged queries: expected queries.jsonl and qrels/test.tsv")


def _store(folder: StageFolder, raw: RawCorpus, aside: SetAside, bad_record_limit: float) -> None:
    write_records(folder.folder / "set_aside.jsonl", aside.as_rows())
    aside.refuse_beyond(bad_record_limit, folder.folder / "set_aside.jsonl")
    write_collection(folder.folder, raw.passages, raw.queries, raw.qrels)
    _summarise(folder.name, raw, aside)
    folder.finish(passages=len(raw.passages), queries=len(raw.queries), set_aside=len(aside.records))


def _existing(setting: str, path: str) -> Path:
    place = folder_of(path)
    if not place.exists():
        if is_named(path):
            problem = f"rank {ranks.rank()} does not see {place}; set $DRAMA_CACHE to a folder that all machines share"
        elif setting == "evaluate.collections" and any(kind in path for kind in MADE_SUITES):
            problem = f"no such file or folder; those that are made are {', '.join(MADE)}"
        else:
            problem = f"no such file or folder; names of data sets begin with {HUB} or {IR_DATASETS}"
        raise FileNotFoundError(f"{setting}={path}: {problem}")
    return place


def _lower_capitals(raw: RawCorpus, name: str) -> RawCorpus:
    """Lower-case texts of several words that are all capitals: LLM tokenizers split those into fragments."""
    passages = [
        replace(passage, title=lower_if_capitals(passage.title), text=lower_if_capitals(passage.text))
        for passage in raw.passages
    ]
    queries = [replace(query, text=lower_if_capitals(query.text)) for query in raw.queries]
    changed = sum(old != new for old, new in zip(raw.passages, passages, strict=True))
    changed += sum(old != new for old, new in zip(raw.queries, queries, strict=True))
    if changed:
        say(f"{name}: lower-cased {changed} texts that were all capitals (corpus.lower_capitals)")
    return RawCorpus(passages, queries, raw.qrels)


def _worthwhile(
    passages: list[Passage], source: _Source, corpus: CorpusSettings, aside: SetAside, beside: Sequence[Passage] = ()
) -> list[Passage]:
    """Passages that are neither trivial nor, word for word, one before or in `beside`; the others are set aside."""
    first = {_words_of(passage): passage.id for passage in beside}
    kept: list[Passage] = []
    for line, passage in enumerate(passages, 1):
        words = _words_of(passage)
        if count_words(words) < corpus.min_words:
            reason = "trivial: fewer words than corpus.min_words"
            aside.unwanted.append(BadRecord(source.path, line, reason, passage.id))
        elif words in first:
            aside.unwanted.append(BadRecord(source.path, line, "duplicate", passage.id, f"of {first[words]}"))
        else:
            first[words] = passage.id
            kept.append(passage)
    if not kept and all(_words_of(passage) in first for passage in passages):
        raise ValueError(
            f"{source.setting}={source.path}: the corpus has all {len(passages)} passages; name other text"
        )
    if not kept:
        raise ValueError(
            f"{source.setting}={source.path}: all {len(passages)} passages are trivial; lower corpus.min_words"
        )
    return kept


def _words_of(passage: Passage) -> str:
    return " ".join(passage.content.casefold().split())


def _sample(passages: list[Passage], corpus: CorpusSettings, seed: int) -> list[Passage]:
    if corpus.max_passages is None or len(passages) <= corpus.max_passages:
        return passages
    positions = sorted(random.Random(f"{seed} passages").sample(range(len(passages)), corpus.max_passages))
    return [passages[position] for position in positions]


def _no_query(corpus: CorpusSettings) -> str:
    """Why there are no test queries, and what to do."""
    remedy = "or give the corpus queries.jsonl and qrels/test.tsv"
    if not corpus.held_out_queries:
        return f"to have some, set corpus.held_out_queries (it is 0), {remedy}"
    few, many = _QUERY_WORDS.start, _QUERY_WORDS.stop - 1
    return (
        f"passages to take them from begin with a sentence of {few} to {many} words and have {_REST_WORDS} more: give "
        f"longer passages, set corpus.language if {corpus.language!r} is wrong, {remedy}"
    )


@dataclass(frozen=True)
class _Candidate:
    query: str
    rest: str


def _hold_out(passages: list[Passage], corpus: CorpusSettings, seed: int) -> RawCorpus:
    """Make the first sentences of some passages test queries, and leave the rest as the passage."""
    split = [_candidate(passage, corpus) for passage in passages]
    occurrences = Counter(candidate.query.casefold() for candidate in split if candidate)
    unique = [i for i, candidate in enumerate(split) if candidate and occurrences[candidate.query.casefold()] == 1]
    count = min(corpus.held_out_queries, len(unique) // 2)
    if not count:
        say(f"corpus: no test queries: the run trains, exports and reports without an evaluation; {_no_query(corpus)}")
    elif count < corpus.held_out_queries:
        say(f"corpus: only {count} of corpus.held_out_queries={corpus.held_out_queries} test queries can be held out")
    queries, qrels, kept = [], {}, list(passages)
    for i in sorted(random.Random(f"{seed} held out").sample(unique, count)):
        candidate, passage = split[i], passages[i]
        assert candidate is not None
        queries.append(Query(f"q-{passage.id}", candidate.query, passage.language))
        kept[i] = replace(passage, text=candidate.rest)
        qrels[f"q-{passage.id}"] = {passage.id: 1}
    return RawCorpus(kept, queries, qrels)


def _candidate(passage: Passage, corpus: CorpusSettings) -> _Candidate | None:
    parts = sentences(passage.text, passage.language)
    if len(parts) < 2:
        return None
    query, rest = parts[0], passage.text.strip().removeprefix(parts[0]).strip()
    if corpus.path == PACKAGES_CORPUS:
        giveaways = name_words(passage.id)
        query = " ".join(word for word in query.split() if not giveaways & set(re.findall(r"[\w.]+", word.lower())))
    fits = count_words(query) in _QUERY_WORDS and count_words(rest) >= _REST_WORDS
    return _Candidate(query, rest) if fits else None


def _summarise(name: str, raw: RawCorpus, aside: SetAside) -> None:
    judgements = sum(len(judged) for judged in raw.qrels.values())
    say(f"{name}: {len(raw.passages)} passages, {len(raw.queries)} test queries, {judgements} judgements")
    aside.tell_mended(name)
    if aside.records:
        reasons = Counter(record.reason for record in aside.records)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        say(f"{name}: set aside {counts}; listed in {name}/set_aside.jsonl")

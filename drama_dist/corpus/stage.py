"""The corpus stage: read, clean, hold test queries out, store.

Where the corpus comes with judgements they are the test set, and every passage is kept. Elsewhere
the first sentences of some passages become test queries, and are taken out of those passages.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from drama_dist.corpus.collection import PassageTable, Qrels, write_qrels
from drama_dist.corpus.packages import own_words, package_passages, package_versions
from drama_dist.corpus.read import RawCorpus, SetAside, read_corpus
from drama_dist.corpus.split import count_words, sentences
from drama_dist.distributed import ranks
from drama_dist.records import BadRecord, Passage, Query, write_records
from drama_dist.run.folder import fingerprint, open_stage
from drama_dist.run.progress import say
from drama_dist.settings import PACKAGES_CORPUS, CorpusSettings, Settings, as_dict

_QUERY_WORDS = range(4, 41)
_REST_WORDS = 15
_CAPITAL_WORDS = 4  # fewer may be an abbreviation or a name


def build_corpus(settings: Settings) -> Path:
    """Run the stage; the artefact is RUN/corpus.

    Raises FileNotFoundError or ValueError where there is no corpus, it is empty, or too many of its
    records cannot be used.
    """
    choice = settings.corpus
    inputs = (
        package_versions(choice.packages)
        if choice.path == PACKAGES_CORPUS
        else {"source": fingerprint(_existing(choice.path))}
    )
    stage = open_stage(settings.run, "corpus", {"corpus": as_dict(choice), "seed": settings.seed}, inputs)
    if stage.done:
        return stage.final
    if ranks.rank() != 0:
        return stage.finish()
    aside = SetAside()
    raw = _read(choice, aside)
    if choice.lower_capitals:
        raw = _lower_capitals(raw)
    if not raw.qrels:
        raw = _hold_out(_sample(_worthwhile(raw.passages, choice, aside), choice, settings.seed), choice, settings.seed)
    write_records(stage.folder / "set_aside.jsonl", aside.as_rows())
    aside.refuse_beyond(choice.bad_record_limit, stage.folder / "set_aside.jsonl")
    PassageTable.write(stage.folder / "passages", raw.passages)
    write_records(stage.folder / "queries.jsonl", raw.queries)
    write_qrels(stage.folder / "qrels" / "test.tsv", raw.qrels)
    _summarise(raw, aside, stage.folder)
    return stage.finish(passages=len(raw.passages), queries=len(raw.queries), set_aside=len(aside.as_rows()))


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"corpus.path={path}: no such file or folder")
    return Path(path)


def _read(choice: CorpusSettings, aside: SetAside) -> RawCorpus:
    if choice.path != PACKAGES_CORPUS:
        return read_corpus(Path(choice.path), choice.language, aside)
    passages = package_passages(choice.packages, choice.language)
    aside.seen = len(passages)
    return RawCorpus(passages, [], {})


def _lower_capitals(raw: RawCorpus) -> RawCorpus:
    """Texts of several words, all in capitals, in small letters: to an LLM's tokenizer they are fragments."""
    passages = [replace(one, title=_lower(one.title), text=_lower(one.text)) for one in raw.passages]
    queries = [replace(one, text=_lower(one.text)) for one in raw.queries]
    changed = sum(one != other for one, other in zip(raw.passages, passages, strict=True))
    changed += sum(one != other for one, other in zip(raw.queries, queries, strict=True))
    if changed:
        say(f"corpus: {changed} texts in nothing but capitals became small letters (corpus.lower_capitals)")
    return RawCorpus(passages, queries, raw.qrels)


def _lower(text: str) -> str:
    return text.lower() if text.isupper() and count_words(text) >= _CAPITAL_WORDS else text


def _worthwhile(passages: list[Passage], choice: CorpusSettings, aside: SetAside) -> list[Passage]:
    """Without trivial passages and word-for-word duplicates, which are set aside."""
    kept: dict[str, Passage] = {}
    for number, passage in enumerate(passages, 1):
        key = " ".join(passage.content.casefold().split())
        if count_words(key) < choice.min_words:
            aside.unwanted.append(
                BadRecord(choice.path, number, "trivial: fewer words than corpus.min_words", passage.id)
            )
        elif key in kept:
            aside.unwanted.append(BadRecord(choice.path, number, f"duplicate of {kept[key].id}", passage.id))
        else:
            kept[key] = passage
    if not kept:
        raise ValueError(f"corpus.path={choice.path}: all {len(passages)} passages are trivial; lower corpus.min_words")
    return list(kept.values())


def _sample(passages: list[Passage], choice: CorpusSettings, seed: int) -> list[Passage]:
    if choice.max_passages is None or len(passages) <= choice.max_passages:
        return passages
    chosen = sorted(random.Random(f"{seed} passages").sample(range(len(passages)), choice.max_passages))
    return [passages[i] for i in chosen]


@dataclass(frozen=True)
class _Candidate:
    query: str
    rest: str


def _hold_out(passages: list[Passage], choice: CorpusSettings, seed: int) -> RawCorpus:
    """Take first sentences out as test queries; the passage is then the rest."""
    split = [_candidate(passage, choice) for passage in passages]
    occurs = Counter(candidate.query.casefold() for candidate in split if candidate)
    fit = [i for i, candidate in enumerate(split) if candidate and occurs[candidate.query.casefold()] == 1]
    count = min(choice.held_out_queries, len(fit) // 2)
    if count < choice.held_out_queries:
        say(f"corpus: only {count} of corpus.held_out_queries={choice.held_out_queries} test queries can be held out")
    queries, qrels, kept = [], {}, list(passages)
    for i in sorted(random.Random(f"{seed} held out").sample(fit, count)):
        candidate, passage = split[i], passages[i]
        assert candidate is not None
        queries.append(Query(f"q-{passage.id}", candidate.query, passage.language))
        kept[i] = replace(passage, text=candidate.rest)
        qrels[f"q-{passage.id}"] = {passage.id: 1}
    return RawCorpus(kept, queries, qrels)


def _candidate(passage: Passage, choice: CorpusSettings) -> _Candidate | None:
    parts = sentences(passage.text, passage.language)
    if len(parts) < 2:
        return None
    query, rest = parts[0], passage.text.strip().removeprefix(parts[0]).strip()
    if choice.path == PACKAGES_CORPUS:
        given_away = own_words(passage.id)
        query = " ".join(word for word in query.split() if not given_away & set(re.findall(r"[\w.]+", word.lower())))
    fits = count_words(query) in _QUERY_WORDS and count_words(rest) >= _REST_WORDS
    return _Candidate(query, rest) if fits else None


def _summarise(raw: RawCorpus, aside: SetAside, folder: Path) -> None:
    say(f"corpus: {len(raw.passages)} passages, {len(raw.queries)} test queries, {_judged(raw.qrels)} judgements")
    if aside.as_rows():
        reasons = Counter(row["reason"].split(":")[0].split(" of ")[0] for row in aside.as_rows())
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        say(f"corpus: set aside {said}; listed in {folder.name.removesuffix('.partial')}/set_aside.jsonl")


def _judged(qrels: Qrels) -> int:
    return sum(len(judged) for judged in qrels.values())

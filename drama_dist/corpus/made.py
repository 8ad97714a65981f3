"""Collections that are made, not read: a sentence hidden in a text of a given length, and a question about it.

passkey: somebody's number in sentences that repeat, as in E5-mistral (Wang et al. 2024, arXiv 2401.00368). needle: a
fact in running text, as in LongEmbed (Zhu et al. 2024, arXiv 2404.12096), whose text is essays. Here it is numpy's
docs: every machine has them, so that nothing is fetched, and runs of any corpus are compared on the same text. Which
lengths there are is in suites.py.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import TypeVar

from drama_dist.corpus.packages import package_passages
from drama_dist.corpus.read import RawCorpus
from drama_dist.encoder.contract import wire_tokenizer
from drama_dist.encoder.pretrained import read_llama_config, read_tokenizer
from drama_dist.encoder.sources import reachable, resolve
from drama_dist.encoder.texts import TextTokenizer
from drama_dist.records import Passage, Query
from drama_dist.settings import Settings
from drama_dist.suites import Made

First = TypeVar("First")
Second = TypeVar("Second")
NEEDLE_PACKAGES = ["numpy"]
PASSAGES = 100  # and as many queries
LANGUAGE = "en"
_KINDS = 20  # of first names, last names, places and facts
_REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FIRST = (
    "Amara Boris Chiara Dmitri Elena Farid Greta Hiro Ingrid Jamal Keiko Lars Mei Nadia Omar Priya Quentin Rosa Sven "
    "Tariq"
)
_LAST = (
    "Abbott Becker Castillo Dubois Eriksen Fischer Garcia Hoffman Ivanov Jensen Kowalski Larsen Moreau Nakamura Okafor "
    "Petrov Quinn Rossi Silva Turner"
)
_PLACES = (
    "Lisbon Oslo Nairobi Kyoto Lima Prague Havana Cairo Dublin Hanoi Boston Tbilisi Zagreb Quito Perth Riga Accra "
    "Cusco Naples Seville"
)
_FACTS = (
    (
        "The library of {} lends an umbrella to anyone who returns three books before noon.",
        "What can readers in {} borrow when they bring books back early?",
    ),
    (
        "The oldest bakery in {} puts roasted chestnuts into its rye bread every winter.",
        "Which ingredient does the old bakery of {} add to bread when it is cold?",
    ),
    (
        "The ferry across the harbour of {} is free for passengers who carry a cello.",
        "With which instrument does one travel on the ferry of {} without paying?",
    ),
    (
        "The clock on the town hall of {} runs seven minutes fast so that nobody misses the last tram.",
        "Why is the town hall clock in {} ahead of time?",
    ),
    (
        "The mayor of {} keeps a tame goose that opens every session of the council.",
        "What animal starts the meetings of the council in {}?",
    ),
    (
        "The best way to spend a Sunday in {} is to row to the island and fly a paper kite.",
        "What should one do in {} on a Sunday?",
    ),
    (
        "The football club of {} washes its shirts in sea water before each final.",
        "How does the football team of {} prepare its clothes for a final?",
    ),
    (
        "The botanical garden of {} grows a blue cactus that blooms once in nine years.",
        "How often does the cactus in the garden of {} have flowers?",
    ),
    (
        "The school in {} teaches arithmetic with walnuts instead of coins.",
        "What do pupils in {} count with in their lessons?",
    ),
    (
        "The night train to {} serves pickled plums and black tea at two in the morning.",
        "What do travellers eat on the train that goes to {} at night?",
    ),
    (
        "The lighthouse near {} was painted orange by a retired dentist.",
        "What was the job of the person who painted the lighthouse of {}?",
    ),
    (
        "The museum of {} hides its most valuable map inside a hollow broomstick.",
        "Where does the museum in {} keep its precious map?",
    ),
    (
        "The fire brigade of {} rides red bicycles with two bells.",
        "Which vehicles do the firefighters of {} use?",
    ),
    (
        "The post office of {} accepts seashells as postage on the first of May.",
        "With what can letters be paid for in {} on a day in May?",
    ),
    (
        "The orchestra of {} tunes its violins to the bell of the fish market.",
        "By which sound do the musicians of {} tune their instruments?",
    ),
    (
        "The winner of the chess festival in {} receives a wheel of goat cheese.",
        "What prize does the champion of chess get in {}?",
    ),
    (
        "The bridge in {} is closed every autumn so that hedgehogs can cross it.",
        "For which animals is the bridge of {} shut in autumn?",
    ),
    (
        "The tailors of {} sew a copper button into the lining of every wedding coat.",
        "What do tailors in {} hide in the clothes of a groom?",
    ),
    (
        "The weather station of {} predicts storms from the mood of an old donkey.",
        "How does one forecast bad weather in {}?",
    ),
    (
        "The swimming pool of {} is heated by the ovens of a pizzeria.",
        "Where does the warmth of the pool in {} come from?",
    ),
)
_SENTENCE_ENDS = (".", "!", "?")


def token_counter(settings: Settings) -> Callable[[str], int]:
    """How many tokens the LLM's tokenizer makes of a passage, as the encoder reads it: with prefix, BOS and EOS.

    Raises ValueError or FileNotFoundError where the tokenizer cannot be read.
    """
    source, trust = reachable(resolve(settings.llm)), settings.trust_remote_code
    whole = read_tokenizer(source, read_llama_config(source, trust), trust)
    tokenizer = TextTokenizer(wire_tokenizer(whole, settings.encoder.lower_case))
    prefix = settings.encoder.passage_prefix

    def count(text: str) -> int:
        (ids,) = tokenizer([prefix + text], limit=2**31)
        return len(ids)

    return count


def make_collection(made: Made, count: Callable[[str], int]) -> RawCorpus:
    """Passages of made.tokens tokens, or less by those of a word, and a query of each; always the same.

    count: tokens of a text as a passage. The sentence stands after 0, 1/99, ... or all of the other words, at the
    nearest beginning of a sentence. Other passages have its first or last name, its place or its kind of fact. Raises
    ValueError where the sentence alone is longer.
    """
    hidden, text = (_pass_keys(), _repeated(made.tokens)) if made.kind == "passkey" else (_facts(), _docs())
    alone = count("a")
    cost = cache(lambda word: count(f"a {word}") - alone)
    passages, queries, qrels = [], [], {}
    for number, (sentence, question) in enumerate(hidden):
        begin = 0 if made.kind == "passkey" else number * len(text) // PASSAGES
        # A word is a token at least; the text goes round where it is too short
        words = [text[(begin + word) % len(text)] for word in range(made.tokens)]
        content = _longest(words, sentence, number / (PASSAGES - 1), made.tokens, count, cost)
        passages.append(Passage(f"p{number}", content, "", LANGUAGE))
        queries.append(Query(f"q{number}", question, LANGUAGE))
        qrels[f"q{number}"] = {f"p{number}": 1}
    return RawCorpus(passages, queries, qrels)


def _pass_keys() -> list[tuple[str, str]]:
    """What is hidden, and the question that asks for it."""
    numbers = random.Random("pass keys").sample(range(10_000, 100_000), PASSAGES)
    names = [f"{first} {last}" for first, last in _pairs(_FIRST.split(), _LAST.split())]
    return [
        (
            f"{name}'s pass key is {number}. Remember it. {number} is the pass key for {name}.",
            f"What is the pass key for {name}?",
        )
        for name, number in zip(names, numbers, strict=True)
    ]


def _facts() -> list[tuple[str, str]]:
    return [(fact.format(place), question.format(place)) for (fact, question), place in _pairs(_FACTS, _PLACES.split())]


def _pairs(firsts: Sequence[First], seconds: Sequence[Second]) -> list[tuple[First, Second]]:
    """PASSAGES different pairs of _KINDS of either, each of which occurs equally often."""
    return [(firsts[number % _KINDS], seconds[(number // _KINDS + number) % _KINDS]) for number in range(PASSAGES)]


def _repeated(words: int) -> list[str]:
    once = _REPEATED.split()
    return once * (words // len(once) + 1)


@cache
def _docs() -> list[str]:
    return [word for passage in package_passages(NEEDLE_PACKAGES, LANGUAGE) for word in passage.text.split()]


def _longest(
    words: Sequence[str],
    sentence: str,
    depth: float,
    tokens: int,
    count: Callable[[str], int],
    cost: Callable[[str], int],
) -> str:
    """As many of the words as fit, with the sentence among them. cost: tokens of a word."""
    begins = [0, *(at for at, word in enumerate(words, 1) if word.endswith(_SENTENCE_ENDS))]
    costs = list(accumulate(map(cost, words), initial=count(sentence)))
    most = tokens
    while (size := bisect_right(costs, most) - 1) >= 0:
        places = [*begins[: bisect_left(begins, size)], size]
        place = min(places, key=lambda at: abs(at - depth * size))
        content = " ".join([*words[:place], sentence, *words[place:size]])
        beyond = count(content) - tokens  # more than 0 where words cost more together
        if beyond <= 0:
            return content
        most = costs[size] - beyond
    raise ValueError(f"{tokens} tokens are too few for {sentence!r}")

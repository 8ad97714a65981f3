"""Collections that are made: how long passages are, where the sentence stands, and that they are always the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.made import PASSAGES, make_collection, token_counter
from drama_dist.encoder.contract import wire_tokenizer
from drama_dist.evaluate.metrics import per_query
from drama_dist.records import Hit
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError
from drama_dist.suites import MADE, MADE_SUITES, Made, paths_of

Read = Callable[..., Settings]


def test_the_made_suites_have_six_lengths_each() -> None:
    assert MADE_SUITES == ("passkey", "needle")
    assert paths_of("needle", "elsewhere") == [
        f"needle/needle-{tokens}" for tokens in (256, 512, 1024, 2048, 4096, 8192)
    ]
    assert len(MADE) == 12


@pytest.mark.parametrize("kind", MADE_SUITES)
@pytest.mark.parametrize("prefix", ["", "Passage: "])
def test_passages_are_as_long_as_their_name_says_for_the_encoder_and_never_longer(
    kind: str, prefix: str, small_settings: Read, tokenizer: PreTrainedTokenizerFast
) -> None:
    raw = make_collection(Made(kind, 301), token_counter(small_settings(f"encoder.passage_prefix={prefix}")))  # type: ignore[arg-type]
    plain = wire_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>"),
        lower_case=True,
    )
    lengths = [len(plain(prefix + passage.content)["input_ids"]) for passage in raw.passages]
    assert len(lengths) == PASSAGES and max(lengths) <= 301
    longest_word = max(len(word) for passage in raw.passages for word in passage.text.split())
    assert min(lengths) > 301 - longest_word - 1


@pytest.mark.parametrize("kind", MADE_SUITES)
def test_each_query_asks_for_a_sentence_that_one_passage_has_further_down_each_time(
    kind: str, small_settings: Read
) -> None:
    raw = make_collection(Made(kind, 1500), token_counter(small_settings()))  # type: ignore[arg-type]
    questions = [query.text for query in raw.queries]
    assert len(set(questions)) == len(questions) == PASSAGES
    assert raw.qrels == {f"q{number}": {f"p{number}": 1} for number in range(PASSAGES)}
    depths = []
    for number, (query, passage) in enumerate(zip(raw.queries, raw.passages, strict=True)):
        asked = query.text.removeprefix("What is the pass key for ").rstrip("?")
        start = f"{asked}'s pass key is" if kind == "passkey" else None
        names = [word for word in query.text.rstrip("?").split()[1:] if word[0].isupper()]
        at = passage.text.find(start) if start else passage.text.find(names[-1])
        assert at >= 0, (number, query, passage)
        depths.append(at / len(passage.text))
        if start:
            assert sum(start in other.text for other in raw.passages) == 1
    assert depths[0] < 0.1 and depths[-1] > 0.75
    assert all(abs(depth - number / PASSAGES) < 0.25 for number, depth in enumerate(depths))
    assert all(query.language == "en" for query in raw.queries)


def test_needles_share_their_places_and_their_kinds_of_fact_so_that_one_word_does_not_tell(
    small_settings: Read,
) -> None:
    raw = make_collection(Made("needle", 200), token_counter(small_settings()))
    chess = [query for query in raw.queries if "champion of chess" in query.text]
    lisbon = [query for query in raw.queries if "Lisbon" in query.text]
    assert len(chess) == len(lisbon) == 5 and len({*chess} & {*lisbon}) <= 1


def test_a_sentence_that_does_not_fit_is_refused(small_settings: Read) -> None:
    with pytest.raises(ValueError, match=r"20 tokens are too few for \"Amara Abbott's pass key"):
        make_collection(Made("passkey", 20), token_counter(small_settings()))


def test_words_that_cost_more_together_than_alone_still_fit() -> None:
    def count(text: str) -> int:
        return 2 + len(text.split()) + len(text.split()) // 10

    raw = make_collection(Made("passkey", 500), count)
    assert all(490 <= count(passage.content) <= 500 for passage in raw.passages)


def test_pass_keys_are_the_same_in_every_process_and_on_every_machine() -> None:
    raw = make_collection(Made("passkey", 100), lambda text: len(text.split()))
    texts = "\n".join([*(passage.text for passage in raw.passages), *(query.text for query in raw.queries)])
    assert sha256(texts.encode()).hexdigest() == "e8ddf5f386be6fe2492b75460ae79260f02b0b9305e17b523266dade1a3afa5f"


def test_they_are_made_where_they_are_evaluated_and_are_no_folders(small_settings: Read, tmp_path: Path) -> None:
    settings = small_settings("evaluate.collections=[needle/needle-256]", "evaluate.systems=[bm25]")
    folder = make(settings, "corpus", collection="needle-256")
    stored, again = open_collection(folder), make_collection(MADE["needle/needle-256"], token_counter(settings))
    assert [stored.passages[number] for number in range(len(stored.passages))] == again.passages
    assert stored.queries == again.queries and stored.qrels == again.qrels
    assert not (tmp_path / "suites").exists() and not Path("needle").exists()
    inputs = json.loads((folder / "provenance.json").read_text("utf-8"))["inputs"]
    assert {"llm", "numpy"} <= set(inputs)


def test_another_tokenizer_or_prefix_makes_another_collection(small_settings: Read) -> None:
    changes = ("evaluate.collections=[passkey/passkey-256]", "evaluate.systems=[bm25]")
    make(small_settings(*changes), "corpus", collection="passkey-256")
    make(small_settings(*changes, "encode.shard_passages=8", "seed=2"), "corpus", collection="passkey-256")
    with pytest.raises(OtherSettings, match="passage_prefix"):
        make(small_settings(*changes, "encoder.passage_prefix=P "), "corpus", collection="passkey-256")


def test_an_llm_that_is_not_there_is_told_before_anything_is_made(small_settings: Read) -> None:
    settings = small_settings(
        "evaluate.collections=[passkey/passkey-256]", "evaluate.systems=[bm25]", "llm=/no/such/model"
    )
    with pytest.raises(SettingsError, match=r"llm=/no/such/model"):
        make(settings, "evaluate")
    assert not Path(settings.run).exists()


@pytest.mark.parametrize("name", ["needle-256", "needle/needle-300"])
def test_what_is_called_much_like_one_is_refused_with_the_names_that_there_are(name: str, small_settings: Read) -> None:
    settings = small_settings(f"evaluate.collections=[{name}]", "evaluate.systems=[bm25]")
    with pytest.raises(FileNotFoundError, match=rf"evaluate.collections={name}: .*made are passkey/passkey-256, "):
        make(settings, "evaluate")


def test_accuracy_at_1_is_where_ndcg_at_10_is_1() -> None:
    qrels = {f"q{rank}": {"right": 1} for rank in range(12)}
    run = {
        f"q{rank}": [Hit("right" if at == rank else f"wrong-{at}", 1 - at / 20) for at in range(11)]
        for rank in range(12)
    }
    values = per_query(qrels, run)
    assert [query for query, value in values.items() if value["ndcg@10"] == 1] == ["q0"]

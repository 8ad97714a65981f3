"""Vocabulary pruning: texts keep their tokens, what is gone comes in pieces, and vectors stay as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drama_dist.corpus.collection import open_collection
from drama_dist.encoder.backbone import load
from drama_dist.encoder.contract import save_tokenizer, wire_tokenizer
from drama_dist.encoder.superwords import add_superwords
from drama_dist.encoder.vocabulary import (
    is_prunable,
    keep_embeddings,
    reachable_tokens,
    used_tokens,
    with_tokens,
)
from drama_dist.prune.source import check
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError
from tests.conftest import passages, train_tokenizer, write_lines

TEXTS = [row["text"] for row in passages(12)]
OTHERS = ["An ENGINE's Piston, the RIVER; salt — SALT!", "İstanbul'da ÉCOLE Σίσυφος 東京都 नमस्ते", "😀 ǅ 7007\n\t x", ""]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: ▁ for blanks, and bytes to fall back on."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blanks)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are none of them
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def all_splits() -> PreTrainedTokenizerFast:
    """As Llama 3 has it: each token by every pair that makes it, whole words first, and special tokens at the end."""
    state = json.loads(train_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    made = sorted((left + right for left, right in state["model"]["merges"]), key=vocabulary.__getitem__)
    pairs = [(name[:cut], name[cut:]) for name in made for cut in range(1, len(name))]
    state["model"]["merges"] = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
    state["model"]["ignore_merges"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    tokenizer.add_special_tokens({"bos_token": "<BOS>", "eos_token": "<EOS>"})
    return tokenizer


@pytest.fixture(params=[train_tokenizer, sentencepiece, all_splits])
def folding(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return wire_tokenizer(request.param(), lower_case=True)


def names(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return list(tokenizer.backend_tokenizer.encode(text).tokens)


def smaller(tokenizer: PreTrainedTokenizerBase, wanted: set[int]) -> tuple[PreTrainedTokenizerBase, list[int]]:
    changed, old_ids = with_tokens(tokenizer, wanted)
    return wire_tokenizer(changed, lower_case=True), old_ids


def test_all_texts_keep_their_tokens_without_those_that_cannot_come(folding: PreTrainedTokenizerBase) -> None:
    small, old_ids = smaller(folding, reachable_tokens(folding))
    assert len(folding) - len(old_ids) == len(folding) - len(small) >= 1
    for text in [*TEXTS, *OTHERS]:
        assert names(small, text) == names(folding, text)
        ids = small.backend_tokenizer.encode(text).ids
        assert [old_ids[id] for id in ids] == folding.backend_tokenizer.encode(text).ids


@pytest.mark.parametrize("make_one", [train_tokenizer, sentencepiece])
def test_without_folding_something_is_lost(make_one: Callable[[], PreTrainedTokenizerFast]) -> None:
    """The negative control: where letters are not folded these tokens do come."""
    tokenizer = make_one()
    changed, _ = with_tokens(tokenizer, reachable_tokens(tokenizer))
    assert all(names(changed, text) != names(tokenizer, text) for text in TEXTS)


def test_the_corpus_keeps_its_tokens_and_other_texts_come_in_pieces(folding: PreTrainedTokenizerBase) -> None:
    some = TEXTS[:1]
    small, old_ids = smaller(folding, used_tokens(folding, some))
    assert len(old_ids) < len(folding) - 50
    words = some[0].split()
    for text in [*some, *words, *(f" {word}" for word in words), " ".join(words[3:9])]:
        assert names(small, text) == names(folding, text)
    longer = 0
    for text in [*TEXTS, *OTHERS]:
        ids, before = small.encode(text), folding.encode(text)
        assert small.decode(ids, skip_special_tokens=True) == folding.decode(before, skip_special_tokens=True)
        assert small.unk_token_id is None or small.unk_token_id not in ids
        longer += len(ids) > len(before)
    assert longer > 5


def test_what_is_saved_is_read_with_the_same_special_tokens(folding: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    small, old_ids = smaller(folding, used_tokens(folding, TEXTS[:1]))
    save_tokenizer(small, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [small(text)["input_ids"] for text in TEXTS]
    assert again.special_tokens_map == folding.special_tokens_map
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert old_ids[getattr(again, name)] == getattr(folding, name)
    assert len(again) == len(old_ids) and sorted(again.get_vocab().values()) == list(range(len(old_ids)))


def test_superwords_are_the_same_afterwards() -> None:
    whole = wire_tokenizer(train_tokenizer(), lower_case=True)
    small, old_ids = smaller(whole, reachable_tokens(whole))
    parts = [add_superwords(one, TEXTS, 100, len(one)) for one in (whole, small)]
    assert [[old_ids[id] for id in ids] for ids in parts[1]] == parts[0] and len(parts[0]) >= 10
    assert [names(small, text) for text in TEXTS] == [names(whole, text) for text in TEXTS]


def test_other_kinds_of_tokenizers_are_refused() -> None:
    backend = Tokenizer(models.WordPiece({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert not is_prunable(tokenizer)
    with pytest.raises(ValueError, match=r"not one of byte-pair encoding, .* set prune.vocabulary=whole"):
        with_tokens(tokenizer, {2})


def test_embeddings_move_with_their_tokens() -> None:
    torch.manual_seed(1)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    backbone = LlamaModel(LlamaConfig(vocab_size=9, **shape, bos_token_id=8, eos_token_id=[5, 2], pad_token_id=3))
    before = backbone.embed_tokens.weight.detach().clone()
    keep_embeddings(backbone, [1, 5, 8])
    assert torch.equal(backbone.embed_tokens.weight, before[[1, 5, 8]]) and backbone.embed_tokens.weight.requires_grad
    config = backbone.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 2, 1, None)


@pytest.mark.parametrize("choice", ["reachable", "used"])
def test_the_stage_gives_the_vectors_that_it_gave_with_all_tokens(
    choice: str, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    whole = make(small_settings("prune.vocabulary=whole", f"run={tmp_path / 'whole'}"), "prune")
    run = small_settings(f"prune.vocabulary={choice}", f"run={tmp_path / choice}")
    encoders = [load(folder) for folder in (whole, make(run, "prune"))]
    texts = list(open_collection(tmp_path / choice / "corpus").passages.texts())
    sizes = [len(encoder.tokenizer) for encoder in encoders]
    assert sizes[0] > sizes[1] == encoders[1].backbone.config.vocab_size
    for encode in ("encode_passages", "encode_queries"):
        some = [*texts, *OTHERS[: 3 * (choice == "reachable")]]
        vectors = [getattr(encoder, encode)(some) for encoder in encoders]
        np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-6)
    if choice == "used":
        assert encoders[1].encode_passages(OTHERS).shape == (4, 32)


def test_general_text_and_prefixes_count_as_used(small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    rows = passages()
    corpus = f"corpus.path={write_lines(tmp_path / 'bread.jsonl', rows[::4])}"
    general = f"corpus.general={write_lines(tmp_path / 'river.jsonl', rows[2::4])}"
    sizes = []
    for number, more in enumerate(([], [general], ["encoder.passage_prefix=piston gear belt"])):
        settings = small_settings("prune.vocabulary=used", f"run={tmp_path / str(number)}", corpus, *more)
        sizes.append(len(load(make(settings, "prune")).tokenizer))
    assert sizes[0] < min(sizes[1:])


def test_a_limit_of_the_tokenizer_hides_no_tokens() -> None:
    tokenizer = wire_tokenizer(train_tokenizer(), lower_case=True)
    before = used_tokens(tokenizer, TEXTS)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=400)
    assert used_tokens(tokenizer, TEXTS) == before and len(before) > 50


def test_what_may_still_become_capitals_stays() -> None:
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    wire_tokenizer(tokenizer, lower_case=True)
    small, _ = smaller(tokenizer, reachable_tokens(tokenizer))
    assert names(small, "\u2122 \u1d40he") == names(tokenizer, "\u2122 \u1d40he")
    assert "The" in names(tokenizer, "\u1d40he") and len(small) == len(tokenizer)
    tokenizer.backend_tokenizer.decoder = None
    assert len(reachable_tokens(tokenizer)) == len(tokenizer)


def test_a_tokenizer_of_another_kind_is_told_before_anything_is_made(
    small_settings: Callable[..., Settings], tmp_path: Path, llm: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llm, other)
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(other)
    with pytest.raises(SettingsError, match=r"^llm=.*: its tokenizer is not one of byte-pair encoding"):
        check(small_settings("prune.vocabulary=used", f"llm={other}"))
    check(small_settings(f"llm={other}"))

"""A language model of each type, whose norms have gains; a corpus of two languages, and an LLM that has learnt it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel, language_model_class
from drama_dist.encoder.pretrained import read_llama_config
from drama_dist.prune.importance import norms_in_order
from tests.conftest import TOPICS, write_lines


@pytest.fixture
def model(family: Path) -> LanguageModel:
    config = read_llama_config(str(family))
    kind = language_model_class(config)
    model = kind.from_pretrained(family, config=config, attn_implementation=attention.NAME).eval()
    torch.manual_seed(1)
    for norm in norms_in_order(model):
        norm.weight.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def two_languages(tmp_path_factory: pytest.TempPathFactory, llm: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Overrides of settings: a corpus of two languages, and the tiny Llama after it has learnt its texts."""
    folder = tmp_path_factory.mktemp("two-languages")
    rows = []
    for number in range(64):
        language, topic = (("en", "bread"), ("de", "river"))[number % 2]
        words = TOPICS[topic].split() * 6
        sentences = [f"so {' '.join(words[begin : begin + 9])}." for begin in range(number // 2, number // 2 + 54, 9)]
        rows.append({"_id": f"{number}", "title": "", "text": " ".join(sentences), "language": language})
    model = LlamaForCausalLM.from_pretrained(llm)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    chance = random.Random(1)
    for _ in range(100):
        ids = torch.tensor([[0, *tokenizer(row["text"])["input_ids"][:46], 1] for row in chance.sample(rows, 8)])
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return [f"llm={folder / 'llm'}", f"corpus.path={write_lines(folder / 'passages.jsonl', rows)}"]

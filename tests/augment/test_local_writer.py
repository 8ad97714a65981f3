"""The writer: a batch with a common prefix is answered as each conversation is by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drama_dist.augment.sources.prompts import Message
from drama_dist.augment.writers.local import LanguageModel
from drama_dist.settings import AugmentSettings

TEXTS = ["bread", "The matrix has a row and a column and a pivot.", "river bank"]


def conversation(text: str) -> list[Message]:
    return [{"role": "system", "content": "Answer me."}, {"role": "user", "content": f"About {text}"}]


@pytest.fixture
def model(llm: Path) -> LanguageModel:
    model = LanguageModel(str(llm), AugmentSettings(max_new_tokens=12, temperature=1.0, top_p=1e-6))  # greedy
    model.model.float()
    torch.manual_seed(4)
    for weight in model.model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)  # so that answers differ from text to text
    return model


@torch.no_grad()
def by_itself(model: LanguageModel, messages: list[Message]) -> str:
    unfinished = messages[-1]["role"] == "assistant"
    ids = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=not unfinished, continue_final_message=unfinished, return_dict=True
    )["input_ids"]
    tokens = list(ids)
    for _ in range(12):
        tokens.append(int(model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == model.tokenizer.eos_token_id:
            break
    return str(model.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True))


def test_a_batch_answers_as_each_conversation_by_itself(model: LanguageModel) -> None:
    conversations = [conversation(text) for text in TEXTS]
    expected = [by_itself(model, messages) for messages in conversations]
    assert model.answer(conversations, seed=1) == expected
    assert len(set(expected)) > 1


def test_an_unfinished_answer_is_continued(model: LanguageModel) -> None:
    unfinished = [[*conversation(text), {"role": "assistant", "content": "Task: x\nQuery:"}] for text in TEXTS]
    expected = [by_itself(model, messages) for messages in unfinished]
    assert model.answer(unfinished, seed=1) == expected
    assert expected != [by_itself(model, conversation(text)) for text in TEXTS]


def test_a_single_conversation_works(model: LanguageModel) -> None:
    assert model.answer([conversation("bread")], seed=1) == [by_itself(model, conversation("bread"))]


def test_answers_follow_the_seed_and_leave_other_randomness_alone(llm: Path) -> None:
    model = LanguageModel(str(llm), AugmentSettings(max_new_tokens=16))
    conversations = [conversation(text) for text in TEXTS]
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first, again, other = (model.answer(conversations, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_llm_without_a_chat_template_is_refused(llm: Path, tmp_path: Path) -> None:
    for path in llm.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"no chat template, .* set augment.synthetic_queries=0"):
        LanguageModel(str(tmp_path), AugmentSettings()).answer([conversation("x")], 1)


def test_cutting_keeps_the_beginning(llm: Path) -> None:
    model = LanguageModel(str(llm), AugmentSettings())
    assert model.cut("flour yeast", 100) == "flour yeast"
    cut = model.cut("flour yeast oven dough " * 20, 5)
    assert "flour yeast oven dough".startswith(cut.strip()) and cut

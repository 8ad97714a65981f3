"""The writer: a batch with a common prefix is answered as each conversation is by itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from drama_dist.augment.sources.prompts import Message, write_query_messages
from drama_dist.augment.writers import local
from drama_dist.augment.writers.local import LocalWriter
from drama_dist.augment.writers.writer import Sampling

GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=12, seed=1)
TEXTS = ["bread", "The matrix has a row and a column and a pivot.", "river bank"]


def conversation(text: str) -> list[Message]:
    return [{"role": "system", "content": "Answer me."}, {"role": "user", "content": f"About {text}"}]


@pytest.fixture(params=["decoded", "generated"])
def model(request: pytest.FixtureRequest, llm: Path, monkeypatch: pytest.MonkeyPatch) -> LocalWriter:
    """Answers come from our own steps, or from transformers' `generate`."""
    if request.param == "generated":
        monkeypatch.setattr(local, "can_decode", lambda model: False)
    model = LocalWriter(str(llm))
    model.model.float()
    torch.manual_seed(4)
    for weight in model.model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)  # so that answers differ from text to text
    return model


@torch.no_grad()
def by_itself(model: LocalWriter, messages: list[Message]) -> str:
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


def test_a_batch_answers_as_each_conversation_by_itself(model: LocalWriter) -> None:
    conversations = [conversation(text) for text in TEXTS]
    expected = [by_itself(model, messages) for messages in conversations]
    assert model.answer(conversations, GREEDY) == expected
    assert len(set(expected)) > 1


def test_an_unfinished_answer_is_continued(model: LocalWriter) -> None:
    unfinished = [[*conversation(text), {"role": "assistant", "content": "Task: x\nQuery:"}] for text in TEXTS]
    expected = [by_itself(model, messages) for messages in unfinished]
    assert model.answer(unfinished, GREEDY) == expected
    assert expected != [by_itself(model, conversation(text)) for text in TEXTS]


def test_a_single_conversation_works(model: LocalWriter) -> None:
    assert model.answer([conversation("bread")], GREEDY) == [by_itself(model, conversation("bread"))]


@torch.no_grad()
def test_scores_of_the_next_token_are_the_models(model: LocalWriter) -> None:
    opened = [[*conversation(text), {"role": "assistant", "content": "["}] for text in TEXTS]
    scores = model.next_token_scores(opened, "CAB")
    assert scores is not None
    for row, messages in zip(scores, opened, strict=True):
        prompt = model.tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=True)
        logits = model.model(torch.tensor([prompt["input_ids"]])).logits[0, -1]
        np.testing.assert_allclose(row, [logits[model.tokenizer.convert_tokens_to_ids(c)] for c in "CAB"], rtol=1e-5)
    assert model.next_token_scores(opened, ["no such token"]) is None


def test_answers_follow_the_seed_and_leave_other_randomness_alone(llm: Path) -> None:
    model = LocalWriter(str(llm))
    conversations = [conversation(text) for text in TEXTS]
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    first, again, other = (model.answer(conversations, Sampling(0.8, 0.9, 16, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_of_similar_conversations_are_drawn_apart(llm: Path) -> None:
    model, warm = LocalWriter(str(llm)), Sampling(1.0, 1.0, 16, 1)
    one, other = (model.answer([conversation(f"{text} {end}") for text in TEXTS], warm) for end in ("a", "b"))
    assert len({*one, *other}) == 2 * len(TEXTS)
    starts = [[answer[:8] for answer in answers] for answers in (one, other)]
    assert all(first != second for first, second in zip(*starts, strict=True))


def test_an_llm_without_a_chat_template_is_refused(llm: Path, tmp_path: Path) -> None:
    for path in llm.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"no chat template, .* augment.synthetic_queries, rerank and triplets"):
        LocalWriter(str(tmp_path)).answer([conversation("x")], GREEDY)


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
)
SILENT = "{% for m in messages if m['role'] != 'system' %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def writer(llm: Path, folder: Path, template: str) -> LocalWriter:
    shutil.copytree(llm, folder)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return LocalWriter(str(folder))


@pytest.mark.parametrize("template", [GEMMA, SILENT])
def test_without_a_system_role_the_instruction_opens_the_first_message(
    template: str, llm: Path, tmp_path: Path
) -> None:
    model = writer(llm, tmp_path / "model", template)
    model.check(GREEDY)
    messages = write_query_messages("A passage.")
    text = model.tokenizer.decode(model._token_ids(messages))
    assert text.startswith(f"<s>user {messages[0]['content']}\n\nPassage: Sourdough rises")
    assert text.count(messages[0]["content"]) == 1 and "system" not in text.split("Passage:")[0].removeprefix("<s>")
    assert len(model.answer([messages], GREEDY)) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "its chat template cannot be used: access to attribute"),
        ("{{ raise_exception('never') }}", "its chat template cannot be used: .*never"),
        ("{% for m in %}", "its chat template cannot be used"),
        ("{{ 1 / 0 }}", "its chat template cannot be used: .*division"),
        ("{{ messages[0]['content'][99999]['x'] }}", "its chat template cannot be used"),
        ("<s>hello</s>", "its chat template leaves out what the user says"),
        ("<s>{{ messages[-1]['content'] }}</s>", "its chat template leaves out what the assistant says"),
        (
            "{% for m in messages if m['role'] == 'user' %}<s>{{ m['content'] }}</s>{% endfor %}",
            "its chat template leaves out what the assistant says",
        ),
        (
            "{% for m in messages %}{% if loop.index0 != 1 %}<s>{{ m['content'] }}</s>{% endif %}{% endfor %}",
            "its chat template leaves out what the user says",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_said_in_one_sentence(
    template: str, message: str, llm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model: {message}") as failure:
        writer(llm, tmp_path / "model", template).check(GREEDY)
    assert len(str(failure.value).splitlines()) == 1


def test_where_no_message_can_be_left_open_nothing_is_added(llm: Path, tmp_path: Path) -> None:
    closing = "{% for m in messages %}<s>{{ m['content'] | replace('Query', '') }}{% endfor %}"
    model = writer(llm, tmp_path / "model", closing)
    model.check(GREEDY)
    opened = [[*conversation("x"), {"role": "assistant", "content": "Task: x\nQuery:"}]]
    assert model.answer(opened, GREEDY) == [""] and model.next_token_scores(opened, "AB") is None


def test_another_kind_of_model_is_refused(tmp_path: Path, llm: Path) -> None:
    shutil.copytree(llm, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}', "utf-8")
    with pytest.raises(ValueError, match=r"model: model type 'vit', which writes no text$"):
        LocalWriter(str(tmp_path / "model")).check(GREEDY)


def test_cutting_leaves_no_limit_behind(llm: Path) -> None:
    model = LocalWriter(str(llm))
    before = model.tokenizer.backend_tokenizer.to_str()
    model.cut("flour yeast oven dough " * 20, 5)
    assert model.tokenizer.backend_tokenizer.to_str() == before


def test_a_token_for_images_is_left_out_of_texts(llm: Path, tmp_path: Path) -> None:
    model = writer(llm, tmp_path / "model", GEMMA)
    rows = len(model.tokenizer)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model.tokenizer.save_pretrained(tmp_path / "model")
    again = LocalWriter(str(tmp_path / "model"))
    again.check(GREEDY)
    assert again.tokenizer.get_vocab()["<image>"] == rows
    cut = again.cut("flour <image>yeast", 50)
    assert cut == "flour yeast" and len(again.answer([write_query_messages(cut)], GREEDY)) == 1


def test_cutting_keeps_the_beginning(llm: Path) -> None:
    model = LocalWriter(str(llm))
    assert model.cut("flour yeast", 100) == "flour yeast"
    cut = model.cut("flour yeast oven dough " * 20, 5)
    assert "flour yeast oven dough".startswith(cut.strip()) and cut


def test_tokens_are_told_as_they_come_without_what_fills_up(model: LocalWriter) -> None:
    conversations = [conversation(text) for text in TEXTS]
    ends = [len(by_itself_ids(model, messages)) for messages in conversations]
    told: list[int] = []
    model.on_tokens = told.append
    model.answer(conversations, GREEDY)
    assert told == [sum(end > step for end in ends) for step in range(max(ends))]


@torch.no_grad()
def by_itself_ids(model: LocalWriter, messages: list[Message]) -> list[int]:
    """The tokens that are written, without the one that ends the answer, which fills up, too."""
    tokens = list(
        model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    begin = len(tokens)
    while len(tokens) < begin + 12:
        tokens.append(int(model.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == model.tokenizer.eos_token_id:
            return tokens[begin:-1]
    return tokens[begin:]

"""Decoding: scores of each text by itself, answers that end, and tokens drawn as transformers' warpers leave them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from drama_dist.augment.writers import decoding
from drama_dist.augment.writers.decoding import Decoding, can_decode, decode, draw
from drama_dist.augment.writers.writer import Sampling

OPENING = [0, 17, 300, 42, 8, 99]
PROMPTS = [[*OPENING, 11, 12, 13, 14, 15], [*OPENING, 5, 6], [*OPENING, 7]]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shared", "at_once"), [(0, 512), (0, 21), (4, 3), (6, 1), (6, 512)])
def test_scores_are_those_of_each_text_by_itself(
    shared: int, at_once: int, dtype: torch.dtype, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_READ_AT_ONCE", at_once)
    model = AutoModelForCausalLM.from_pretrained(family, dtype=dtype).eval()
    torch.manual_seed(4)
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    assert can_decode(model) == (family.name != "mistral")
    longest = max(map(len, PROMPTS))
    tokens, mask = torch.zeros(3, longest, dtype=torch.long), torch.ones(3, longest, dtype=torch.long)
    for row, ids in enumerate(PROMPTS):
        begin = longest - len(ids) + shared
        tokens[row, :shared], tokens[row, begin:] = torch.tensor(ids[:shared]), torch.tensor(ids[shared:])
        mask[row, shared:begin] = 0
    cache = DynamicCache(config=model.config) if shared else None
    if shared:
        model(tokens[:1, :shared], past_key_values=cache)
    precise, errors = copy.deepcopy(model).double(), torch.zeros(2, dtype=torch.float64)
    batch, texts = Decoding(model, cache, mask[:, shared:], most=3), [list(ids) for ids in PROMPTS]
    sizes = []
    read = batch._states
    monkeypatch.setattr(batch, "_states", lambda ids, *where: (sizes.append(tuple(ids.shape)), read(ids, *where))[1])
    states = batch.read_prompts(tokens[:, shared:])
    assert all(rows * columns <= at_once for rows, columns in sizes)
    if dtype == torch.float32:
        for row, ids in enumerate(PROMPTS):
            expected = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(model.lm_head(states[row]), expected, rtol=1e-4, atol=1e-5)
    going = [0, 1, 2]
    for step, newest in enumerate([[20, 21, 22], [30, 31, 32], [40, 42]]):
        if step == 2:
            going = [0, 2]
            batch.keep(torch.tensor(going))
        for number, token in zip(going, newest, strict=True):
            texts[number].append(token)
        scores = model.lm_head(batch.read(torch.tensor(newest))).float()
        for row, number in enumerate(going):
            expected = model(torch.tensor([texts[number]])).logits[0, -1]
            if dtype == torch.float32:
                torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-5)
            exact = precise(torch.tensor([texts[number]])).logits[0, -1]
            errors += torch.stack([(each.float() - exact).abs().mean() for each in (scores[row], expected)])
    assert errors[0] < 1.2 * errors[1]  # as far from float64 as the model's own rounding
    other = model(torch.tensor([[*PROMPTS[0][1:], 20, 30, 40]])).logits[0, -1]
    assert (scores[0] - other.float()).abs().max() > 0.1


@torch.no_grad()
def test_answers_end_where_generate_ends_them(family: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    torch.manual_seed(4)
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)
    tokens, mask = torch.tensor([ids[-6:] for ids in ([*OPENING], PROMPTS[0], PROMPTS[2])]), torch.ones(3, 6).long()
    greedy = Sampling(0.0, 1.0, 12, 0)

    def generated(most: int) -> list[list[int]]:
        options = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 499}
        rows = model.generate(tokens, attention_mask=mask, **options)[:, 6:].tolist()
        return [row[: next((n + 1 for n, token in enumerate(row) if token in ends), most)] for row in rows]

    ends: list[int] = []
    model.generation_config.eos_token_id = None
    free = generated(12)
    for ends in ([free[0][3], free[1][7]], [row[0] for row in free], [free[2][11]]):
        model.generation_config.eos_token_id = ends
        for most in (1, 12):
            told: list[int] = []
            found = decode(model, tokens, mask, None, replace(greedy, max_new_tokens=most), told.append)
            assert found == generated(most)
            assert told == [sum(len(row) > step for row in found) for step in range(max(map(len, found)))]
    assert len({len(row) for row in free}) == 1  # without ends all are as long as they may be


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 5, 0])
@pytest.mark.parametrize("spread", [0.2, 2.0])
def test_tokens_are_drawn_as_the_warpers_leave_them(top_p: float, top_k: int | None, spread: float) -> None:
    scores = torch.randn(1, 500, generator=torch.Generator().manual_seed(2)) * spread
    warped = scores / 0.8
    if top_k != 0:
        warped = TopKLogitsWarper(top_k or 50)(None, warped)  # as `generate` has it by itself
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(1)[0].numpy()
    torch.manual_seed(1)
    count = 8_000
    drawn = draw(scores.expand(count, -1), Sampling(0.8, top_p, 1, 0), top_k).numpy()
    found = np.bincount(drawn, minlength=500) / count
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=6 * np.sqrt(expected.max() / count))
    assert draw(scores, Sampling(0, top_p, 1, 0), top_k) == scores.argmax(1)


def test_what_is_not_known_is_left_to_transformers(llm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llm)
    assert can_decode(model)
    for name, value in (("repetition_penalty", 1.1), ("no_repeat_ngram_size", 3), ("num_beams", 2)):
        before = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
        assert not can_decode(model)
        setattr(model.generation_config, name, before)
    model.model.rotary_emb.rope_type = "dynamic"
    assert not can_decode(model)

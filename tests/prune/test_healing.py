"""Healing: its loss against a plain computation, and the prune stage as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drama_dist.encoder import attention
from drama_dist.encoder.backbone import load, random_twin
from drama_dist.export.stage import write_sentence_transformers
from drama_dist.prune import healing
from drama_dist.prune.language_batches import LanguageBatches
from drama_dist.prune.language_loss import Chunk
from drama_dist.run.runner import make
from drama_dist.settings import Settings
from tests.conftest import save_llama

SEQUENCES = [[0, 17, 300, 42, 1], [0, 5, 6, 7, 8, 9, 10, 1], [0, 99, 1]]


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_each_sequence_by_itself(llm: Path, kl_weight: float) -> None:
    source = LlamaForCausalLM.from_pretrained(llm, attn_implementation=attention.NAME).eval()
    student = LlamaForCausalLM.from_pretrained(llm, attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        student.model.norm.weight.mul_(30)
        chunk = Chunk(SEQUENCES, [1, 5, 11, 13], [""] * 3)
        loss, *losses = healing._chunk_loss(student, source, chunk, kl_weight)
        source.config._attn_implementation = student.config._attn_implementation = "eager"
        expected = torch.zeros(())
        entropies = torch.zeros(2, dtype=torch.float64)
        for ids, scored in zip(SEQUENCES, ([1], [0, 6], [0]), strict=True):
            taught = source(torch.tensor([ids])).logits[0, scored].double().log_softmax(-1)
            scores = student(torch.tensor([ids])).logits[0, scored].double()
            divergence = (taught.exp() * (taught - scores.log_softmax(-1))).sum()
            targets = torch.tensor(ids)[torch.tensor(scored) + 1]
            language_model = cross_entropy(scores, targets, reduction="sum")
            expected = expected + kl_weight * divergence + (1 - kl_weight) * language_model
            entropies += torch.stack([language_model, cross_entropy(taught, targets, reduction="sum")])
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert [float(each.sum()) for each in losses] == pytest.approx(entropies.tolist(), rel=1e-4)


def test_scored_positions_have_a_next_token_and_are_as_many_as_asked() -> None:
    batches = LanguageBatches(SEQUENCES, [""] * 3)
    (whole,) = batches.chunks(16, 1.0, "1 0")
    assert len(whole.scored) == sum(len(ids) - 1 for ids in whole.sequences)
    flat = [token for ids in whole.sequences for token in ids]
    assert all(flat[position] != 1 for position in whole.scored)  # 1 ends every sequence
    (first,), (again,), (later,) = (batches.chunks(16, 0.5, f"1 {step}") for step in (0, 0, 1))
    assert len(first.scored) == round(len(whole.scored) / 2) and set(first.scored) <= set(whole.scored)
    assert first == again != later


def test_the_stage_gives_a_bidirectional_encoder_and_lowers_the_loss(
    small_settings: Callable[..., Settings],
) -> None:
    settings = small_settings("prune.heal_steps=12", "prune.heal_learning_rate=0.005")
    folder = make(settings, "prune")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["perplexity"] < lines[0]["perplexity"] and all(line["source_perplexity"] > 1 for line in lines)
    encoder = load(folder)
    assert encoder.hidden_size == 32 and not encoder.backbone.config.is_causal
    assert encoder.contract == settings.encoder
    assert not (folder / "checkpoints").exists()


def test_the_random_twin_has_the_same_shape_and_other_weights(small_settings: Callable[..., Settings]) -> None:
    pruned = load(make(small_settings("prune.heal_steps=0"), "prune"))
    twin, again, other = (random_twin(pruned, seed) for seed in (1, 1, 2))
    shapes = {name: weight.shape for name, weight in pruned.named_parameters()}
    assert {name: weight.shape for name, weight in twin.named_parameters()} == shapes
    first = "backbone.layers.0.mlp.up_proj.weight"
    assert torch.equal(twin.state_dict()[first], again.state_dict()[first])
    assert not torch.equal(twin.state_dict()[first], other.state_dict()[first])
    assert not torch.equal(twin.state_dict()[first], pruned.state_dict()[first])


def test_an_llm_with_biases_becomes_an_encoder_of_the_same_vectors(
    small_settings: Callable[..., Settings], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    biased = save_llama(tmp_path / "biased", tokenizer, **shape, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM.from_pretrained(biased)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(biased)
    whole = ("prune.layers=4", "prune.hidden=48", "prune.heads=6", "prune.mlp=96", "prune.heal_steps=0")
    settings = small_settings(f"llm={biased}", *whole)
    texts = ["The river has water.", "dough"]
    expected = load(biased, contract=settings.encoder).encode_passages(texts)
    pruned = load(make(settings, "prune"))
    np.testing.assert_allclose(pruned.encode_passages(texts), expected, atol=1e-2)  # the LLM is read in auto's dtype
    write_sentence_transformers(pruned, tmp_path / "export")
    exported = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    np.testing.assert_allclose(exported.encode_document(texts), pruned.encode_passages(texts), atol=1e-5)

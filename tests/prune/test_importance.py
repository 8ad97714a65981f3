"""Importance against values from a plain Hugging Face forward pass, and against planted parts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from drama_dist.encoder import attention
from drama_dist.prune import importance as importance_module
from drama_dist.prune.importance import measure_importance, norms_in_order

SEQUENCES = [[0, 17, 300, 42, 1], [0, 5, 6, 7, 8, 9, 10, 1], [0, 99, 1]]


@pytest.fixture
def model(llm: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llm, attn_implementation=attention.NAME).eval()


def test_values_are_those_of_unpacked_sequences(
    model: LlamaForCausalLM, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance_module, "_CHUNK_TOKENS", 9)
    importance = measure_importance(model, SEQUENCES)
    plain = LlamaForCausalLM.from_pretrained(llm, attn_implementation="eager").eval()
    outputs: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def watch(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    for norm in norms_in_order(plain):
        norm.register_forward_hook(watch)
    influence = []
    with torch.no_grad():
        for ids in SEQUENCES:
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
            influence.append([1 - torch.cosine_similarity(a, b, dim=-1)[0] for a, b in itertools.pairwise(states)])
    tokens = sum(map(len, SEQUENCES))
    hidden = sum(output[0].abs().sum(0) for output in outputs) / tokens / len(norms_in_order(plain))
    torch.testing.assert_close(importance.hidden_H, hidden, rtol=1e-4, atol=1e-6)
    first_energy = sum(inputs[index * 9][0].square().sum(0) for index in range(3)) / tokens
    torch.testing.assert_close(importance.energy[0], first_energy, rtol=1e-4, atol=1e-9)
    first_block = sum(rows[0].sum() for rows in influence) / tokens
    torch.testing.assert_close(importance.layers_L[0], first_block, rtol=1e-3, atol=1e-6)


def test_a_silent_head_a_dead_neuron_and_an_idle_layer_come_last(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        size = model.config.head_dim
        model.model.layers[1].self_attn.v_proj.weight[:size] = 0  # serves query heads 0, 1, 2
        model.model.layers[2].mlp.up_proj.weight[31] = 0
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    importance = measure_importance(model, SEQUENCES)
    assert importance.heads_LA[1, :3].tolist() == [0, 0, 0] and (importance.heads_LA[1, 3:] > 0).all()
    assert importance.mlp_LF[2].argmin() == 31 and importance.mlp_LF[2, 31] == 0
    assert importance.layers_L.argmin() == 3 and abs(float(importance.layers_L[3])) < 1e-6

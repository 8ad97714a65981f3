"""The extractor: the masked full model and the small extracted model give the same outputs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel
from drama_dist.prune.extractor import Selection, select, shrink
from drama_dist.prune.importance import Importance, measure_importance, norms_in_order
from drama_dist.settings import PruneSettings, SettingsError

SHAPE = PruneSettings(layers=2, hidden=20, heads=4, mlp=33)
IDS = torch.tensor([[0, 17, 300, 42, 42, 8, 99, 1], [0, 5, 6, 7, 8, 9, 10, 1]])


@pytest.fixture(params=list(itertools.product([False, True], repeat=3)), ids=str)
def biased(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """Models with and without biases of attention and MLP, with tied and untied embeddings."""
    attention_bias, mlp_bias, tied = request.param
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        attn_implementation=attention.NAME,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    return model


@pytest.mark.parametrize("shape", [SHAPE, PruneSettings(layers=2, hidden=48, heads=6, mlp=96)], ids=["part", "whole"])
def test_biases_stay(biased: LlamaForCausalLM, shape: PruneSettings) -> None:
    selection = select(measure_importance(biased, [row.tolist() for row in IDS]), shape)
    small = shrink(biased, selection).eval()
    small.config._attn_implementation = "eager"
    expected = masked(biased, selection)
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
        if shape is not SHAPE:
            biased.config._attn_implementation = "eager"
            torch.testing.assert_close(small(IDS).logits, biased(IDS).logits, rtol=1e-5, atol=1e-5)
        biases = [weight for name, weight in small.named_parameters() if name.endswith("bias")]
        for bias in biases:
            assert bias.abs().sum() > 0
            bias.zero_()
        if biases:  # without them the comparison fails
            assert (small(IDS).logits - expected(IDS).logits).abs().max() > 1e-2


@pytest.fixture
def importance(model: LanguageModel) -> Importance:
    return measure_importance(model, [row.tolist() for row in IDS])


@torch.no_grad()
def masked(model: LanguageModel, selection: Selection) -> LanguageModel:
    """The full model with everything that is not kept set to zero, and the layers that are not kept taken out."""
    full = copy.deepcopy(model)
    full.config._attn_implementation = "eager"
    gone = torch.ones(full.config.hidden_size, dtype=torch.bool)
    gone[selection.hidden] = False
    full.model.embed_tokens.weight[:, gone] = 0
    for index, layer_index in enumerate(selection.layers):
        layer = full.model.layers[layer_index]
        heads = torch.ones(full.config.num_attention_heads, dtype=torch.bool)
        heads[selection.heads[index]] = False
        neurons = torch.ones(full.config.intermediate_size, dtype=torch.bool)
        neurons[selection.mlp[index]] = False
        layer.self_attn.o_proj.weight[:, heads.repeat_interleave(full.config.head_dim)] = 0
        layer.self_attn.o_proj.weight[gone] = 0
        for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if product.bias is not None:
                product.bias[gone] = 0
        layer.mlp.down_proj.weight[:, neurons] = 0
        layer.mlp.down_proj.weight[gone] = 0
    full.model.layers = torch.nn.ModuleList(full.model.layers[layer_index] for layer_index in selection.layers)
    for index, layer in enumerate(full.model.layers):
        layer.self_attn.layer_idx = index
    full.config.num_hidden_layers = len(selection.layers)
    for norm, gain in zip(norms_in_order(full), selection.norm_gains, strict=True):
        norm.weight *= gain
    return full.eval()


@pytest.mark.parametrize("layer_choice", ["even", "influence"])
def test_masked_and_extracted_models_agree(model: LanguageModel, importance: Importance, layer_choice: str) -> None:
    selection = select(importance, replace(SHAPE, layer_choice=layer_choice))
    small = shrink(model, selection).eval()
    small.config._attn_implementation = "eager"
    with torch.no_grad():
        logits, expected = small(IDS).logits, masked(model, selection)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_comparison_notices_another_selection(model: LanguageModel, importance: Importance) -> None:
    selection = select(importance, SHAPE)
    other = replace(selection, heads=[*selection.heads[:-1], (selection.heads[-1] + 1) % 6])
    small = shrink(model, selection).eval()
    small.config._attn_implementation = "eager"
    with torch.no_grad():
        assert (small(IDS).logits - masked(model, other)(IDS).logits).abs().max() > 1e-3


def test_the_comparison_notices_that_norms_are_corrected_twice(model: LanguageModel, importance: Importance) -> None:
    selection = select(importance, SHAPE)
    small, expected = shrink(model, selection).eval(), masked(model, selection)
    small.config._attn_implementation = "eager"
    for norm, gain in zip(norms_in_order(small), selection.norm_gains, strict=True):
        norm.weight.data *= gain
    with torch.no_grad():
        assert (small(IDS).logits - expected(IDS).logits).abs().max() > 1e-3


def test_keeping_everything_changes_nothing(model: LanguageModel, importance: Importance) -> None:
    whole = shrink(model, select(importance, PruneSettings(layers=4, hidden=48, heads=6, mlp=96))).eval()
    assert whole.config.num_key_value_heads == whole.config.num_attention_heads == 6
    whole.config._attn_implementation = model.config._attn_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_small_model_has_the_wanted_shape(model: LanguageModel, importance: Importance) -> None:
    small = shrink(model, select(importance, SHAPE))
    config = small.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 20, 33)
    assert (config.num_attention_heads, config.head_dim) == (4, model.config.head_dim)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == config.tie_word_embeddings


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 2), (2, 2), (3, 1), (1, 1), (4, 4)])
def test_groups_of_heads_can_be_kept(model: LanguageModel, importance: Importance, heads: int, kv_heads: int) -> None:
    shape = replace(SHAPE, hidden=24, heads=heads, kv_heads=kv_heads)
    selection = select(importance, shape)
    small = shrink(model, selection).eval()
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (heads, kv_heads)
    small.config._attn_implementation = "eager"
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, masked(model, selection)(IDS).logits, rtol=1e-5, atol=1e-5)
    for layer, chosen in zip(selection.layers, selection.heads, strict=True):
        scores = importance.heads_LA[layer]
        if kv_heads == heads:
            assert set(chosen.tolist()) == set(scores.topk(heads).indices.tolist())
        else:
            best = [scores[group * 3 : group * 3 + 3].topk(heads // kv_heads).values.sum() for group in range(2)]
            assert scores[chosen].sum() == pytest.approx(sum(sorted(map(float, best))[-kv_heads:]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "problem"),
    [
        (6, 3, r"prune\.kv_heads=3: the model has 2, for prune\.heads=6; ask for fewer"),
        (4, 1, r"prune\.heads=4 with prune\.kv_heads=1: .* at most 3 as in the model"),
        (3, 2, r"prune\.heads=3 with prune\.kv_heads=2: each key-value head serves equally many heads"),
    ],
)
def test_groups_that_the_model_has_not_are_refused(
    importance: Importance, heads: int, kv_heads: int, problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        select(importance, replace(SHAPE, hidden=24, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(("part", "size"), [("layers", 5), ("hidden", 49), ("heads", 7), ("mlp", 97)])
def test_a_shape_larger_than_the_model_is_refused(importance: Importance, part: str, size: int) -> None:
    with pytest.raises(SettingsError, match=rf"prune.{part}={size}: the model has only {size - 1}"):
        select(importance, replace(SHAPE, **{part: size}))

"""Fused layers against transformers' own in float64: results, gradients, and where they are not used."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from drama_dist.encoder import attention
from drama_dist.encoder.fused_layers import FusedLayer, fuse_layers
from drama_dist.encoder.packing import Packed, pack
from drama_dist.kernels import layers, libraries

LENGTHS = [1, 2, 7, 7, 7, 33]
Gradients = dict[str, torch.Tensor]


def backbone(**changes: object) -> LlamaModel:
    shape = {"vocab_size": 100, "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}
    torch.manual_seed(1)
    model = LlamaModel(LlamaConfig(**(shape | heads | changes)))
    model.config.is_causal = False
    model.config._attn_implementation = attention.NAME
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.3)
        elif "embed" not in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
    return model.train()


def texts() -> Packed:
    generator = torch.Generator().manual_seed(2)
    return pack([torch.randint(100, (length,), generator=generator).tolist() for length in LENGTHS])


def run(model: LlamaModel, packed: Packed) -> tuple[torch.Tensor, Gradients]:
    embedded = model.embed_tokens(packed.token_ids_T).detach().unsqueeze(0).requires_grad_()
    output = model(
        inputs_embeds=embedded, position_ids=packed.position_ids_T.unsqueeze(0), use_cache=False, packed=packed
    ).last_hidden_state
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    model.zero_grad()
    output.backward(upstream)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert embedded.grad is not None
    return output.detach(), gradients | {"input": embedded.grad}


def errors(found: tuple[torch.Tensor, Gradients], exact: tuple[torch.Tensor, Gradients]) -> dict[str, float]:
    pairs = {"output": (found[0], exact[0])} | {name: (found[1][name], exact[1][name]) for name in exact[1]}
    assert found[1].keys() == exact[1].keys()
    return {name: float((own.double() - its).norm() / its.norm()) for name, (own, its) in pairs.items()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "layers checkpointed"])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"num_key_value_heads": 1}], ids=["", "64", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_the_layers_of_transformers(
    dtype: torch.dtype, changes: dict[str, int], checkpointed: bool
) -> None:
    plain, packed = backbone(**changes).to(dtype), texts()
    exact = run(copy.deepcopy(plain).double(), packed)
    expected = errors(run(copy.deepcopy(plain), packed), exact)
    assert fuse_layers(plain)
    if checkpointed:
        plain.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    found = errors(run(plain, packed), exact)
    for name, error in found.items():
        assert error <= 1.5 * expected[name] + 4 * torch.finfo(dtype).eps, (name, error, expected[name])


def test_the_comparison_notices_attention_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = backbone(), texts()
    exact = run(copy.deepcopy(plain).double(), packed)
    assert fuse_layers(plain)
    monkeypatch.setattr(FusedLayer, "_attend", lambda self, rows, packed: rows[:, -96:])
    assert min(errors(run(plain, packed), exact).values()) > 1e-3


def test_the_results_are_the_same_every_time() -> None:
    model, packed = backbone(), texts()
    assert fuse_layers(model)
    first, again = run(model, packed), run(model, packed)
    assert torch.equal(first[0], again[0]) and all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_large_gates_neither_overflow_nor_lose_their_gradient() -> None:
    x = torch.zeros(3, 16).requires_grad_()
    gate = torch.eye(16)
    biased = torch.tensor([[-500.0], [0.0], [500.0]]) * torch.ones(16)
    result = layers.feed_forward(biased + x, torch.ones(16), 1e-6, 500 * gate, gate, gate)
    result.sum().backward()
    assert bool(result.isfinite().all()) and x.grad is not None and bool(x.grad[[0, 2]].isfinite().all())
    assert torch.allclose(result[2], torch.full((16,), 1000.0))  # x + 500 · silu → 500 + 500 · 1


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 72}, {"head_dim": 16}, {"intermediate_size": 100}, {"mlp_bias": True}, {"hidden_act": "gelu"}],
    ids=lambda changes: next(iter(changes)),
)
def test_layers_that_do_not_fit_stay_as_they_are(changes: dict[str, object]) -> None:
    model, packed = backbone(**changes), texts()
    before = run(model, packed)
    assert not fuse_layers(model)
    assert torch.equal(run(model, packed)[0], before[0])


def test_a_fused_model_in_another_precision_goes_on_as_before() -> None:
    model, packed = backbone(), texts()
    exact = run(copy.deepcopy(model).double(), packed)
    assert fuse_layers(model)
    assert torch.equal(run(model.double(), packed)[0], exact[0])


def test_causal_layers_stay_as_they_are() -> None:
    model = backbone()
    model.config.is_causal = True
    assert not fuse_layers(model)


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(name: str) -> str:
        raise RuntimeError("no g++")

    monkeypatch.setattr(libraries, "_build", no_compiler)
    libraries.library.cache_clear()
    model = backbone()
    with pytest.warns(UserWarning, match=r"layers.cpp was not compiled \(no g\+\+\): training goes on"):
        assert not fuse_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fuse_layers(model)
    libraries.library.cache_clear()

"""Fused layers against transformers' own in float64: results, gradients, and where they are not used."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from drama_dist.encoder import attention
from drama_dist.encoder.fused_layers import FusedLayer, fuse_layers
from drama_dist.encoder.packing import Packed, pack
from drama_dist.kernels import native
from drama_dist.kernels.llama_cpu import attention as kernel
from drama_dist.kernels.llama_cpu import layers

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


def errors(result: tuple[torch.Tensor, Gradients], exact: tuple[torch.Tensor, Gradients]) -> dict[str, float]:
    pairs = {"output": (result[0], exact[0])} | {name: (result[1][name], exact[1][name]) for name in exact[1]}
    assert result[1].keys() == exact[1].keys()
    return {name: float((ours.double() - truth).norm() / truth.norm()) for name, (ours, truth) in pairs.items()}


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
    for name, error in errors(run(plain, packed), exact).items():
        assert error <= 1.5 * expected[name] + torch.finfo(dtype).eps, (name, error, expected[name])


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


class Doubled(torch.nn.Linear):
    """Stands for an adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def causal(model: LlamaModel) -> None:
    model.config.is_causal = True


def adapted(model: LlamaModel) -> None:
    model.layers[1].mlp.down_proj.__class__ = Doubled


def hooked(model: LlamaModel) -> None:
    model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: -output)


@pytest.mark.parametrize("change", [causal, adapted, hooked])
def test_what_changes_after_fusing_counts(change: Callable[[LlamaModel], None]) -> None:
    model, packed = backbone(), texts()
    before = run(copy.deepcopy(model), packed)
    fused = copy.deepcopy(model)
    assert fuse_layers(fused)
    for each in (model, fused):
        change(each)
    expected, result = run(model, packed), run(fused, packed)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], before[0], rtol=1e-2)


def test_autocast_gives_what_it_gives_without_fusing() -> None:
    model, packed = backbone().eval(), texts()
    fused = copy.deepcopy(model)
    assert fuse_layers(fused)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(fused, packed)[0], run(model, packed)[0])


@pytest.mark.parametrize("wrong", ["dtype", "boundaries"])
def test_wrong_operands_are_refused(wrong: str) -> None:
    x, weight = torch.zeros(4, 192), torch.ones(192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"norm is torch\.bfloat16 on cpu|boundaries are torch\.int64 up to 4"):
        if wrong == "dtype":
            layers.feed_forward(x, weight, 1e-6, torch.zeros(16, 192), torch.zeros(16, 192), torch.zeros(192, 16))
        else:
            kernel.attend(x, torch.tensor([0, 4]), 1.0)


def test_operands_need_not_be_contiguous() -> None:
    generator = torch.Generator().manual_seed(1)
    x, gate, down = (torch.randn(*shape, generator=generator) for shape in ((32, 48), (16, 32), (32, 16)))
    rows, ends = torch.randn(192, 40, generator=generator), torch.tensor([0, 40], dtype=torch.int32)
    results = []
    for as_given in (lambda one: one, torch.Tensor.contiguous):
        wide, tall = x.T.clone(memory_format=torch.preserve_format), rows.T.clone(memory_format=torch.preserve_format)
        leaves = [as_given(wide).detach().requires_grad_(), as_given(tall).detach().requires_grad_()]
        layers.feed_forward(leaves[0], torch.ones(32), 1e-6, gate, gate, down).square().sum().backward()
        kernel.attend(leaves[1], ends, 0.1).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(source: Path, openmp: bool) -> Path:
        raise RuntimeError("no g++")

    monkeypatch.setattr(native, "_build", no_compiler)
    native.library.cache_clear()
    model = backbone()
    with pytest.warns(UserWarning, match=r"layers.cpp was not compiled \(no g\+\+\): transformer layers go on"):
        assert not fuse_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fuse_layers(model)
    native.library.cache_clear()

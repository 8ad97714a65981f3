"""The paper's shapes: what our settings make of Llama-3.2-1B, on the meta device, is what was published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drama_dist.prune.extractor import Selection, shrink
from drama_dist.prune.shape import requested_shape
from drama_dist.settings import read_settings

CONFIGS = Path(__file__).parents[2] / "configs"
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {  # meta-llama/Llama-3.2-1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "rope_parameters": ROPE,
}


@pytest.mark.parametrize(
    ("name", "published", "millions"),
    [
        # drama-base's is its config.json; both are called 0.1B and 0.3B by their weights without embeddings (arXiv
        # 2502.18460, table 1), which are counted here to the million
        ("drama-base", {"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "heads": 12}, 113.3),
        ("drama-large", {"hidden_size": 1024, "intermediate_size": 4096, "layers": 16, "heads": 16}, 268.5),
    ],
)
def test_the_pruned_llama_has_the_published_shape(name: str, published: dict[str, int], millions: float) -> None:
    settings = read_settings(CONFIGS / f"{name}.yaml", ["corpus.path=none"])
    with torch.device("meta"):
        source = LlamaForCausalLM(LlamaConfig(**LLAMA))
        shape = requested_shape(settings.prune, source.config)
        every = Selection(
            hidden=torch.arange(shape.hidden),
            layers=list(range(shape.layers)),
            heads=[torch.arange(shape.heads)] * shape.layers,
            mlp=[torch.arange(shape.mlp)] * shape.layers,
            kv_heads=shape.kv_heads,
            norm_gains=torch.ones(2 * shape.layers + 1),
        )
        small = shrink(source, every)
    config = small.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (published["layers"], published["heads"])
    assert (config.hidden_size, config.intermediate_size) == (published["hidden_size"], published["intermediate_size"])
    assert config.num_key_value_heads == published["heads"] and config.head_dim == 64
    assert config.vocab_size == 128256 and config.rms_norm_eps == 1e-05
    assert {**config.rope_parameters} == ROPE
    backbone = small.model
    embeddings = backbone.embed_tokens.weight.numel()
    assert embeddings == 128256 * published["hidden_size"]
    rest = sum(weight.numel() for weight in backbone.parameters()) - embeddings
    assert rest / 1e6 == pytest.approx(millions, abs=0.05)

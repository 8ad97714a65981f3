"""A language model of each type, whose norms have gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drama_dist.encoder import attention
from drama_dist.encoder.families import LanguageModel, language_model_class
from drama_dist.encoder.pretrained import read_llama_config
from drama_dist.prune.importance import norms_in_order


@pytest.fixture
def model(family: Path) -> LanguageModel:
    config = read_llama_config(str(family))
    kind = language_model_class(config)
    model = kind.from_pretrained(family, config=config, attn_implementation=attention.NAME).eval()
    torch.manual_seed(1)
    for norm in norms_in_order(model):
        norm.weight.data.uniform_(0.5, 1.5)
    return model

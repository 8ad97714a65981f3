"""A tiny Llama with a real tokenizer, a small corpus, and settings that fit them."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to the other worker

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # to be said before anything imports triton

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from drama_dist.distributed import ranks
from drama_dist.encoder.contract import save_tokenizer
from drama_dist.settings import Settings, read_settings

for name in (*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # of the shell that starts the tests

TOPICS = {
    "bread": "flour yeast oven dough crust rise bake salt water knead loaf sour starter crumb heat",
    "matrix": "row column inverse rank solve square product vector norm singular trace solve basis pivot scale",
    "river": "water bank flow bridge flood stream mouth delta boat source valley current dam lake rain",
    "engine": "piston fuel oil spark valve gear torque brake pump shaft heat coolant belt crank speed",
}
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


# Begun first, so that at the end no worker of pytest-xdist is alone with one of them.
LONGEST_FILES = (
    "test_whole_run.py",
    "train/test_ranks.py",
    "run/test_graph.py",
    "run/test_interrupts.py",
    "distributed/test_mpi.py",
    "test_damage.py",
    "train/test_learning.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in LONGEST_FILES come first, in its order; the others stay in theirs."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST_FILES)}
    assert all(path.is_file() for path in place), "a file of LONGEST_FILES is not there any more"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def gathering(own: threading.local, meeting: threading.Barrier) -> Callable[[int], list[int]]:
    """`ranks.on_every_rank` of threads that stand for ranks. own: has each thread's `rank`; meeting: of all of them."""
    told = [0] * meeting.parties

    def on_every_rank(number: int) -> list[int]:
        told[own.rank] = number
        meeting.wait()
        found = list(told)
        meeting.wait()
        return found

    return on_every_rank


def passages(count: int = 64) -> list[dict[str, str]]:
    """Passages of several sentences on four topics, the same at every call."""
    chance = random.Random(3)
    rows = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = TOPICS[topic].split()
        sentences = [
            f"The {topic} number {number} part {part} has {' '.join(chance.choices(words, k=7))}." for part in range(5)
        ]
        rows.append({"_id": f"{topic}-{number}", "title": "", "text": " ".join(sentences)})
    return rows


def write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus, with BOS and EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator((row["text"] for row in passages()), trainer)
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random Llama of 4 layers × 48, 6 query heads over 2 key-value heads, tied embeddings."""
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer, **shape)


@pytest.fixture(scope="session")
def fusing_llm(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random Llama of 4 layers × 64 and 2 heads of 64, which the CPU's fused layers take."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    return save_llama(tmp_path_factory.mktemp("models") / "fusing-llama", tokenizer, **shape)


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: Any = LlamaConfig, **shape: Any) -> Path:
    """A random language model, with the tokenizer beside it. kind: its configuration's class."""
    torch.manual_seed(0)
    config = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    made = kind(**{**config, **shape})
    model = AutoModelForCausalLM.from_config(made)
    if kind is not LlamaConfig:
        for name, weight in model.named_parameters():  # which are zeros and ones by themselves
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.5)
            elif "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama3": (
        LlamaConfig,
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
}


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with a random model of each type, of the shape of `llm`. Qwen's tokenizers have no BOS."""
    kind, changes = FAMILIES[request.param]
    if kind in (Qwen2Config, Qwen3Config):  # transformers gives every Qwen2 this token
        state = tokenizer.backend_tokenizer.to_str().replace("</s>", "<|endoftext|>")
        own = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), chat_template=CHAT, **own)
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, **changes}
    return save_llama(tmp_path_factory.mktemp("models") / request.param, tokenizer, kind, **shape)


def padded_vectors(folder: Path, sequences: Sequence[Sequence[int]], causal: bool = False) -> np.ndarray:
    """Mean-pooled unit vectors of token id sequences, by transformers' own padded model."""
    config = AutoConfig.from_pretrained(folder)
    config.is_causal = causal
    plain = AutoModel.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    longest = max(map(len, sequences))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences])
    with torch.no_grad():
        hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    vectors: np.ndarray = torch.nn.functional.normalize(pooled, dim=1).numpy()
    return vectors


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 passages as JSONL."""
    return write_lines(tmp_path_factory.mktemp("corpus") / "passages.jsonl", passages())


SMALL = """
seed: 1
corpus: {held_out_queries: 12}
encoder: {max_query_tokens: 32, max_passage_tokens: 64, dims: [32, 16]}
prune: {layers: 2, hidden: 32, heads: 4, mlp: 48, calibration_passages: 24, calibration_tokens: 48, heal_steps: 2,
        heal_tokens: 256}
teacher: {max_tokens: 64}
augment: {crops: 128, synthetic_queries: 4, bad_answer_limit: 1.0, max_new_tokens: 8, negatives: 4,
          negatives_from_rank: 5, negatives_to_rank: 40}
train: {steps: 4, batch_size: 12, dtype: float32, chunk_tokens: 256, checkpoint_every: 2}
encode: {shard_passages: 16, dtype: float32}
evaluate: {systems: [drama, bm25], depth: 20}
"""


@pytest.fixture(scope="session")
def small_settings_in(llm: Path, corpus_file: Path) -> Callable[..., Settings]:
    """Call it with a folder and overrides to read settings of a whole run on the tiny model."""

    def read(folder: Path, *overrides: str) -> Settings:
        path = folder / "small.yaml"
        path.write_text(f"run: {folder / 'run'}\nllm: {llm}\n{SMALL}", "utf-8")
        return read_settings(path, [f"corpus.path={corpus_file}", *overrides])

    return read


@pytest.fixture
def small_settings(tmp_path: Path, small_settings_in: Callable[..., Settings]) -> Callable[..., Settings]:
    """The same in the test's own folder."""
    return partial(small_settings_in, tmp_path)

"""Several ranks end where one plain process ends: every ZeRO stage, partition of the loss, and way to save memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from rank_steps import CLIPPING, DECAY, QUERIES, SAVED, STEPS, TEMPERATURE, TRAFFIC, contract, rate, texts

from drama_dist.distributed.ranks import _free_port
from drama_dist.encoder.backbone import load
from drama_dist.encoder.packing import pack
from drama_dist.kernels import info_nce

TRAVELS = ("passages", "queries")
NAMES = ["-".join(parts) for parts in itertools.product("0123", TRAVELS, ("kept", "twice"), ("plain", "checkpointed"))]
FEW = ["1-passages-twice-plain", "2-queries-kept-plain", "3-queries-twice-checkpointed", "0-passages-kept-plain"]
CLOSE = 1e-5  # relative: of each loss, and of the distance of all weights


def plain_steps(model: Path) -> dict[str, Any]:
    """The whole batch in one graph, the oracle's loss, torch's AdamW."""
    encoder = load(model)
    encoder.contract = contract(encoder.hidden_size)
    weights = list(encoder.parameters())
    matrices, vectors = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}])
    losses, norms = [], []
    for step in range(STEPS):
        queries, passages, positives, ids = texts(step)
        sequences = encoder.tokenize_queries(queries) + encoder.tokenize_passages(passages)
        embeddings = encoder(pack(sequences))
        loss = info_nce(
            embeddings[:QUERIES],
            embeddings[QUERIES:],
            torch.tensor(positives),
            temperature=TEMPERATURE,
            dims=encoder.contract.dims,
            passage_ids=torch.tensor(ids),
            backend="reference",
        ).loss
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights, CLIPPING)))
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        optimiser.step()
        losses.append(float(loss.detach()))
    found = {name: weight.detach() for name, weight in encoder.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": found}


def start_ranks(count: int, model: Path, out: Path, names: list[str], extra: dict[str, str] | None = None) -> None:
    program = Path(__file__).parent / "rank_steps.py"
    port = str(_free_port())
    running, logs = [], []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        command = [sys.executable, str(program), str(model), str(out), *names]
        environment = os.environ | {name: str(value) for name, value in variables.items()} | (extra or {})
        logs.append(out / f"log-{rank}")
        with open(logs[-1], "w", encoding="utf-8") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=60 + 20 * len(names)) for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(statuses), "\n".join(log.read_text("utf-8")[-3000:] for log in logs)


def compare(found: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    assert found["losses"] == pytest.approx(expected["losses"][first:], rel=CLOSE)
    assert found["norms"] == pytest.approx(expected["norms"][first:], rel=CLOSE)
    assert distance(found["weights"], expected["weights"]) <= CLOSE


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, of all weights together."""
    assert one.keys() == other.keys()
    apart = torch.stack([(one[name].double() - other[name].double()).norm() for name in other]).norm()
    return float(apart / torch.stack([weight.double().norm() for weight in other.values()]).norm())


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        pytest.param(2, FEW, id="2"),
        pytest.param(2, NAMES, id="2, all", marks=pytest.mark.slow),
        pytest.param(4, NAMES, id="4, all", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_where_one_process_ends(ranks: int, names: list[str], llm: Path, tmp_path: Path) -> None:
    expected = plain_steps(llm)
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]  # the steps do something
    start_ranks(ranks, llm, tmp_path, names)
    wrong = []
    for name in names:
        try:
            compare(torch.load(tmp_path / f"{name}.pt"), expected)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "2-passages-twice-plain"), (1, "0-passages-kept-plain")),
        pytest.param((4, "3-queries-kept-plain"), (2, "1-passages-twice-plain"), marks=pytest.mark.slow),
        pytest.param((1, "1-passages-kept-plain"), (2, "3-queries-twice-plain"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_goes_on_with_other_ranks_and_another_zero_stage(
    before: tuple[int, str], after: tuple[int, str], llm: Path, tmp_path: Path
) -> None:
    start_ranks(before[0], llm, tmp_path, [f"{before[1]}+save"])
    start_ranks(after[0], llm, tmp_path, [f"{after[1]}+resume"])
    compare(torch.load(tmp_path / f"{after[1]}+resume.pt"), plain_steps(llm), first=SAVED)


def test_bytes_equal_theory_and_queries_are_an_eighth_of_passages(llm: Path, tmp_path: Path) -> None:
    size = 2
    start_ranks(size, llm, tmp_path, ["traffic"])
    found = torch.load(tmp_path / "traffic.pt")
    dims, queries = TRAFFIC["dims"], TRAFFIC["queries"]
    passages, row = queries * (1 + TRAFFIC["negatives"]), 4 * dims[0]
    others = size - 1
    assert found["passages"].pop("passages") == others * (passages // size) * row
    assert found["passages"].pop("passage gradients") == (passages - passages // size) * row
    assert found["queries"].pop("queries") == others * (queries // size) * row
    assert found["queries"].pop("query gradients") == (queries - queries // size) * row
    merged = 2 * others * 4 * queries * (3 * len(dims) + 1) // size
    assert found["queries"].pop("merged rows") == merged
    moved = {
        "queries": 2 * others * (queries // size) * row + merged,
        "passages": 2 * others * (passages // size) * row,
    }
    assert moved["queries"] <= 0.15 * moved["passages"]
    assert set(found["passages"]) | set(found["queries"]) == {
        "figures"
    }  # counts, losses and margins: nothing by component


def test_without_the_scaling_by_ranks_the_comparison_fails(llm: Path, tmp_path: Path) -> None:
    name = "1-passages-kept-plain"
    start_ranks(2, llm, tmp_path, [name], {"DRAMA_TEST_UNSCALED": "1"})
    with pytest.raises(AssertionError):  # by the norms: clipping and AdamW hide a factor from the weights
        compare(torch.load(tmp_path / f"{name}.pt"), plain_steps(llm))

"""Several ranks end where one plain process ends: every ZeRO stage, partition of the loss, and means to save memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from rank_steps import (
    CLIPPING,
    DECAY,
    HEAD,
    REGRESSION,
    SAVED,
    STEPS,
    TEMPERATURE,
    TRAFFIC,
    add_head,
    batch_of,
    batches_of_examples,
    contract,
    examples,
    passages_of_examples,
    rate,
    run,
    targets,
)

from drama_dist.distributed.ranks import _free_port
from drama_dist.encoder.backbone import load
from drama_dist.encoder.packing import pack
from drama_dist.kernels import info_nce
from drama_dist.train.batches import TextBatch

PARTITIONS = ("passages", "queries")
NAMES = [
    "-".join(parts) for parts in itertools.product("0123", PARTITIONS, ("kept", "twice"), ("plain", "checkpointed"))
]
FEW = ["1-passages-twice-plain", "2-queries-kept-plain", "3-queries-twice-checkpointed", "0-passages-kept-plain"]
SEVERAL_POSITIVES = ["1-passages-kept-plain+positives", "2-queries-twice-plain+positives"]
REGRESSED = ["1-passages-kept-plain+regression", "3-queries-twice-plain+regression"]
ONE_PASSAGE = ["1-passages-kept-plain+regression+one-passage", "3-queries-twice-plain+regression+one-passage"]
NARROW = "1-queries-kept-plain+bfloat16"
UNSCALED = "1-passages-kept-plain+unscaled"
STOPPED = "2-passages-twice-plain+save"
CLOSE = 1e-5  # relative: of each loss, and of the distance of all weights


def plain_steps(
    model: Path, batches: list[TextBatch], positive_texts: list[list[set[str]]], regression: float = 0.0
) -> dict[str, Any]:
    """The whole batch in one graph, the reference backend in float64 with a dense mask, torch's AdamW.

    positive_texts: for each query of each batch the texts that are no negatives of it. regression: the term's weight;
    with any there is a head.
    """
    encoder = load(model)
    encoder.contract = contract(encoder.hidden_size)
    if regression:
        add_head(encoder)
    weights = list(encoder.parameters())
    matrices, vectors = [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0}])
    start = {name: weight.detach().clone() for name, weight in encoder.named_parameters()}
    losses, norms = [], []
    for step, (batch, positives) in enumerate(zip(batches, positive_texts, strict=True)):
        sequences = encoder.tokenize_queries(batch.queries) + encoder.tokenize_passages(batch.passages)
        embeddings = encoder(pack(sequences))
        masked_BN = torch.tensor([[text in texts for text in batch.passages] for texts in positives])
        columns = torch.arange(len(batch.passages))
        loss = info_nce(
            embeddings[: len(batch.queries)],
            embeddings[len(batch.queries) :],
            batch.relevance.positives_B,
            temperature=TEMPERATURE,
            dims=encoder.contract.dims,
            passage_ids=columns,
            excluded_ids=torch.where(masked_BN, columns, -1),
            backend="reference",
        ).loss
        if regression:
            loss = loss + regression * distance_of(batch, embeddings, encoder.contract.dims)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights, CLIPPING)))
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        optimiser.step()
        losses.append(float(loss.detach()))
    ends = {name: weight.detach() for name, weight in encoder.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": ends, "start": start}


def distance_of(batch: TextBatch, embeddings: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """The mean distance of queries, and that of passages, from their targets, in float64, over the dims; they
    share the loss as all training texts do, of which a passage weighs ten queries.
    """
    share = 10 * len(passages_of_examples()) / (len(examples()) + 10 * len(passages_of_examples()))
    of_queries, of_passages = targets().queries, targets().passages
    rows = [of_queries.rows(batch.examples), of_passages.rows(batch.positions)]
    target = torch.from_numpy(np.vstack(rows)).double()
    means = []
    for dim in dims:
        mine, its = embeddings[:, :dim].double(), target[:, :dim]
        apart = mine / mine.norm(dim=1, keepdim=True) - its / its.norm(dim=1, keepdim=True)
        apart_n = apart.square().sum(1).sqrt()
        of_queries_n, of_passages_n = apart_n.split([len(batch.queries), len(batch.passages)])
        means.append((1 - share) * of_queries_n.mean() + share * of_passages_n.mean())
    return torch.stack(means).mean()


def drawn_texts(batch: TextBatch) -> list[set[str]]:
    """Of each query the text of the positive that stands in the batch for it."""
    return [{batch.passages[column]} for column in batch.relevance.positives_B.tolist()]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the ranks' processes: in a tiny model threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(llm: Path) -> dict[str, Any]:
    batches = [batch_of(step) for step in range(STEPS)]
    return plain_steps(llm, batches, [drawn_texts(batch) for batch in batches])


@pytest.fixture(scope="module")
def two_ranks(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks write of all that the default suite asks them: one start, which takes longer than the steps."""
    out = tmp_path_factory.mktemp("two-ranks")
    start_ranks(2, llm, out, [*FEW, *SEVERAL_POSITIVES, *REGRESSED, *ONE_PASSAGE, NARROW, UNSCALED, STOPPED, "traffic"])
    return out


def start_ranks(
    count: int,
    model: Path,
    out: Path,
    names: list[str],
    extra: dict[str, str] | None = None,
    program: str = "rank_steps.py",
) -> None:
    """Run a program of this folder on so many ranks."""
    port = str(_free_port())
    running, logs = [], []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        command = [sys.executable, str(Path(__file__).parent / program), str(model), str(out), *names]
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


def compare(ended: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    assert ended["losses"] == pytest.approx(expected["losses"][first:], rel=CLOSE)
    assert ended["norms"] == pytest.approx(expected["norms"][first:], rel=CLOSE)
    assert distance(ended["weights"], expected["weights"]) <= CLOSE


def compare_all(out: Path, names: list[str], expected: dict[str, Any]) -> None:
    wrong = []
    for name in names:
        try:
            compare(torch.load(out / f"{name}.pt"), expected)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def distance(ended: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative, of all weights together."""
    assert ended.keys() == other.keys()
    apart = torch.stack([(ended[name].double() - other[name].double()).norm() for name in other]).norm()
    return float(apart / torch.stack([weight.double().norm() for weight in other.values()]).norm())


def test_two_ranks_end_where_one_process_ends(two_ranks: Path, expected: dict[str, Any]) -> None:
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]  # the steps do something
    compare_all(two_ranks, FEW, expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_combination_ends_where_one_process_ends(
    ranks: int, llm: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    start_ranks(ranks, llm, tmp_path, NAMES)
    compare_all(tmp_path, NAMES, expected)


def test_without_the_scaling_by_ranks_the_comparison_fails(two_ranks: Path, expected: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):  # by the norms: clipping and AdamW hide a factor from the weights
        compare(torch.load(two_ranks / f"{UNSCALED}.pt"), expected)


def test_bfloat16_over_two_ranks_is_as_good_as_in_one_process(
    two_ranks: Path, llm: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """No further from float32 than one process in bfloat16, but for one rounding."""
    two, one = torch.load(two_ranks / f"{NARROW}.pt"), run(llm, tmp_path, NARROW)
    rounding = torch.finfo(torch.bfloat16).eps
    assert errors(one, expected)["norms"] > rounding  # it is bfloat16
    assert all(error <= errors(one, expected)[name] + rounding for name, error in errors(two, expected).items())
    averaged = {**two, "norms": [norm / 2 for norm in two["norms"]]}
    assert errors(averaged, expected)["norms"] > errors(one, expected)["norms"] + rounding


def errors(ended: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative error of losses and norms, and how far weights are apart over how far they went."""
    worst = {
        name: max(abs(value / exact - 1) for value, exact in zip(ended[name], expected[name], strict=True))
        for name in ("losses", "norms")
    }
    went = distance(expected["start"], expected["weights"])
    return worst | {"weights": distance(ended["weights"], expected["weights"]) / went}


def test_other_positives_of_a_query_are_no_negatives_of_it(two_ranks: Path, llm: Path, tmp_path: Path) -> None:
    """On one process and two ranks, in both partitions; by text, so that a passage's twin under another id counts."""
    text_of = {passage.id: passage.text for passage in passages_of_examples()}
    texts_of = {example.query: {text_of[id] for id in example.positives} for example in examples()}
    batches = batches_of_examples(STEPS)
    expected = plain_steps(llm, batches, [[texts_of[query] for query in batch.queries] for batch in batches])
    drawn_alone = plain_steps(llm, batches, [drawn_texts(batch) for batch in batches])
    torch.save(run(llm, tmp_path, SEVERAL_POSITIVES[0]), two_ranks / "one process.pt")
    names = ["one process", *SEVERAL_POSITIVES]
    compare_all(two_ranks, names, expected)
    for name in names:
        with pytest.raises(AssertionError):
            compare(torch.load(two_ranks / f"{name}.pt"), drawn_alone)


def test_regression_is_that_of_one_process(two_ranks: Path, llm: Path, tmp_path: Path) -> None:
    """With the gradient cache on and off; the weights of the head are among those compared."""
    text_of = {passage.id: passage.text for passage in passages_of_examples()}
    texts_of = {example.query: {text_of[id] for id in example.positives} for example in examples()}
    batches = batches_of_examples(STEPS)
    positives = [[texts_of[query] for query in batch.queries] for batch in batches]
    expected = plain_steps(llm, batches, positives, REGRESSION)
    torch.save(run(llm, tmp_path, REGRESSED[0]), two_ranks / "one process.pt")
    names = ["one process", *REGRESSED]
    compare_all(two_ranks, names, expected)
    assert expected["weights"]["head.weight"].shape[0] == HEAD
    with pytest.raises(AssertionError):
        compare(torch.load(two_ranks / f"{REGRESSED[0]}.pt"), plain_steps(llm, batches, positives, 1.01 * REGRESSION))


def test_a_rank_without_a_passage_takes_part_in_regression(two_ranks: Path, llm: Path, tmp_path: Path) -> None:
    """Of each batch one passage stays, and token embeddings have a learning rate of their own."""
    expected = run(llm, tmp_path, ONE_PASSAGE[0])
    compare_all(two_ranks, ONE_PASSAGE, expected)
    for line in torch.load(two_ranks / f"{ONE_PASSAGE[0]}.pt")["figures"]:
        assert 0 < line["distance_of_passages"] < 2
    with pytest.raises(AssertionError):
        compare(torch.load(two_ranks / f"{REGRESSED[0]}.pt"), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((4, "3-queries-kept-plain"), (2, "1-passages-twice-plain"), marks=pytest.mark.slow),
        pytest.param((1, "1-passages-kept-plain"), (2, "3-queries-twice-plain"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_goes_on_with_other_ranks_and_another_zero_stage(
    before: tuple[int, str], after: tuple[int, str], llm: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    start_ranks(before[0], llm, tmp_path, [f"{before[1]}+save"])
    start_ranks(after[0], llm, tmp_path, [f"{after[1]}+resume"])
    compare(torch.load(tmp_path / f"{after[1]}+resume.pt"), expected, first=SAVED)


def test_one_process_goes_on_from_two_ranks(two_ranks: Path, llm: Path, expected: dict[str, Any]) -> None:
    assert len(torch.load(two_ranks / f"{STOPPED}.pt")["losses"]) == SAVED
    compare(run(llm, two_ranks, "0-passages-kept-plain+resume"), expected, first=SAVED)


def test_bytes_equal_theory_and_queries_are_an_eighth_of_passages(two_ranks: Path) -> None:
    size, sent = 2, torch.load(two_ranks / "traffic.pt")
    dims, queries = TRAFFIC["dims"], TRAFFIC["queries"]
    passages, row = queries * (1 + TRAFFIC["negatives"]), 4 * dims[0]
    others = size - 1
    assert sent["passages"].pop("passages") == others * (passages // size) * row
    assert sent["passages"].pop("passage gradients") == (passages - passages // size) * row
    assert sent["queries"].pop("queries") == others * (queries // size) * row
    assert sent["queries"].pop("query gradients") == (queries - queries // size) * row
    merged = 2 * others * 4 * queries * (3 * len(dims) + 1) // size
    assert sent["queries"].pop("merged rows") == merged
    moved = {
        "queries": 2 * others * (queries // size) * row + merged,
        "passages": 2 * others * (passages // size) * row,
    }
    assert moved["queries"] <= 0.15 * moved["passages"]
    assert set(sent["passages"]) | set(sent["queries"]) == {
        "figures"
    }  # counts, losses and margins: nothing by component

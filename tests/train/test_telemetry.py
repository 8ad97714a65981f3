"""What a step costs: counted operations, the figures of a step, event files, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.cut_texts import CutTexts
from drama_dist.encoder.flops import training_flops
from drama_dist.encoder.packing import pack
from drama_dist.settings import EncoderSettings
from drama_dist.train import memory, telemetry
from drama_dist.train.step import StepResult
from drama_dist.train.telemetry import Telemetry
from drama_dist.train.term import TermResult

CUT = CutTexts(2, 30, 1, 5), CutTexts(3, 70, 2, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(llm: Path) -> Encoder:
    return load(llm, contract=EncoderSettings(dims=[48]))


def step_with(margins: list[float]) -> StepResult:
    empty, figures = torch.zeros(0), {"per_dim": {48: 1.5}, "accuracy": 0.5, "margin": 0.1, "masked": 0}
    return StepResult(TermResult(1.5, empty, empty, figures, {"margins": margins}), 2.0, [10, 30], 0.25, *CUT)


def test_operations_are_those_that_pytorch_counts(encoder: Encoder) -> None:
    """Of the forward pass, times three; the flash kernel of the CPU is not counted by PyTorch, so added by hand."""
    lengths = [7, 20, 20]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pack([[3] * length for length in lengths]))
    config = encoder.backbone.config
    attention = 4 * config.num_hidden_layers * 48 * sum(length**2 for length in lengths)
    counted = counter.get_total_flops()
    seen = {name: value for name, value in counter.get_flop_counts()["Global"].items() if "attention" in str(name)}
    expected = 3 * (counted - sum(seen.values()) + attention)
    assert training_flops(config, lengths) == pytest.approx(expected, rel=1e-6)


def test_figures_of_a_step_and_its_events(encoder: Encoder, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(encoder, tmp_path, first_step=0)
    values = [-2.0, -1.0, 0.5, 3.0]
    step, figures = step_with(values), telemetry.figures(step_with(values), seconds=2.0)
    assert figures["tokens"] == 40 and figures["tokens_per_second"] == 20.0 and figures["recomputed_share"] == 0.25
    assert figures["padding_avoided"] == pytest.approx(1 - 40 / 60, abs=1e-4)
    operations = training_flops(encoder.backbone.config, [10, 30])
    assert figures["peak_share"] == pytest.approx(operations / 2.0 / telemetry.peak, abs=1e-4)
    counts, edges = np.histogram(values, bins=20)
    assert figures["margins"] == {"counts": counts.tolist(), "edges": edges.tolist()}
    telemetry.write(1, step.objective.figures | figures, step.objective)
    telemetry.write(2, step.objective.figures | figures, step_with([]).objective)  # no query had a negative
    telemetry.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/tokens_per_second")] == [20.0, 20.0]
    assert [event.step for event in events.Scalars("per_dim/48")] == [1, 2]
    assert [event.step for event in events.Histograms("train/margins")] == [1]


def test_what_is_cut_is_the_sum_over_ranks(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "sum_over_ranks", lambda values: 3 * values)
    figures = Telemetry(encoder, None, first_step=0).figures(step_with([]), seconds=2.0)
    assert figures["queries_cut"] == {"texts": 6, "tokens": 90, "cut_texts": 3, "cut_tokens": 15}
    assert figures["passages_cut"] == {"texts": 9, "tokens": 210, "cut_texts": 6, "cut_tokens": 24}


def test_an_objective_without_info_nce_is_logged(encoder: Encoder, tmp_path: Path) -> None:
    telemetry, empty = Telemetry(encoder, tmp_path, first_step=0), torch.zeros(0)
    telemetry.write(1, {"loss": 1.0, "distilled": 0.5}, TermResult(1.0, empty, empty, {"distilled": 0.5}))
    telemetry.close()


def test_measuring_the_peak_draws_nothing_from_the_global_generator(encoder: Encoder) -> None:
    before = torch.get_rng_state()
    Telemetry(encoder, None, first_step=0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_peak_counts_from_its_reset() -> None:
    filled = np.ones(2**26)  # 512 MiB
    assert memory.peak_bytes(CPU) > filled.nbytes
    del filled
    memory.reset_peak(CPU)
    before = memory.peak_bytes(CPU)
    again = np.ones(2**25)
    assert 0.9 * again.nbytes < memory.peak_bytes(CPU) - before < 1.5 * again.nbytes


def test_without_the_systems_counter_the_peak_is_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "absent")
    memory.reset_peak(CPU)
    assert memory.peak_bytes(CPU) > 2**26


def test_a_control_groups_limit_counts_without_cached_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for name, value in (("memory.max", "max"), ("memory.current", "7")):
        (inner / name).write_text(value)
    for name, value in (
        ("memory.max", "1000"),
        ("memory.current", "900"),
        ("memory.stat", "anon 5\ninactive_file 300\n"),
    ):
        (inner.parent / name).write_text(value)
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_control_group", lambda: inner)
    assert memory.free_bytes(CPU) == 400.0


def test_the_peak_of_products_is_the_best_size_and_ends_at_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {256: 1e-3, 512: 4e-3, 1024: 0.064}
    monkeypatch.setattr(telemetry, "_product_seconds", lambda size, dtype, device: seconds[size])
    assert telemetry.matrix_product_peak(torch.float32, torch.device("cpu")) == pytest.approx(2 * 512**3 / 4e-3)

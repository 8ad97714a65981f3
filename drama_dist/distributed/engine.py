"""The optimiser step, over any number of ranks: a DeepSpeed engine behind a small interface.

Covers building the engine (ZeRO 0 to 3, bf16 with float32 master weights, AdamW, clipping), the
learning-rate schedule, and what a checkpoint holds, whatever the ranks or ZeRO stage. Does not know
what is trained: the encoder (train/) and the language model being healed (prune/) use it alike.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints, Piece, Reader, read_state
from drama_dist.distributed.zero_state import MOMENTS, set_steps, zero_state
from drama_dist.run.progress import say

_WEIGHTS = "weights"
BUCKET = 5_000_000  # elements that go over the network together: 10 MB in bfloat16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt


@dataclass(frozen=True)
class OptimiserSettings:
    """What a stage's settings say about its optimiser."""

    dtype: str
    zero_stage: int
    weight_decay: float
    gradient_clipping: float
    offload: bool = False  # master weights and moments in the machine's memory, not the GPU's
    embedding_rate: float = 1.0  # the learning rate of embeddings, as a multiple of the others'


def learning_rate_at(done: int, units: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up, then half a cosine down to 0 (Loshchilov and Hutter 2017).

    done: how many of the training's units, steps or whole seconds, are over when a step begins. For the first one that
    is 0, and the rate is the peak's share of one unit of the warm-up.
    """
    warmup = max(1, round(units * warmup_share))
    if done < warmup:
        return peak * (done + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, units - warmup)))


class Engine:
    """One module under training.

    After `backward` of the last piece of a step, `step` reduces, clips and updates. Gradients of
    several ranks are summed, not averaged: each rank's loss is its share of the global one.
    """

    def __init__(self, module: nn.Module, settings: OptimiserSettings):
        ranks.start()
        if settings.zero_stage == 3 and ranks.device().type == "cpu":
            _map_large_blocks()
        self.module = module
        self._engine = _deepspeed_engine(module, settings)
        self._state = zero_state(self._engine, settings.zero_stage)
        self._state.initialise()

    @property
    def lockstep(self) -> bool:
        """Whether all ranks must run the module equally often: ZeRO 3 collects weights from all of them each time."""
        return self._engine.zero_optimization_stage() == 3 and ranks.world_size() > 1

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add a piece's gradients; `last` says that the step's final piece is here.

        All ranks must call it equally often in a step.
        """
        if self._engine.zero_optimization_stage() == 3:
            self._engine.optimizer.clear_backward_seen_flag()  # DeepSpeed's forward does it; pieces would not add up
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * ranks.world_size())

    def step(self, learning_rate: float) -> float:
        """Update the weights; returns the global gradient norm before clipping.

        Raises FloatingPointError where that is not finite: DeepSpeed would skip the step, or spoil all weights.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        measured = self._gradient_norm() if self._engine.zero_optimization_stage() == 0 else None
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if measured is None else measured)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm}: lower the learning rate, or train in float32; "
                "the last checkpoint is from before it"
            )
        return norm

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The float32 master weights by name, on the CPU; every rank must call it."""
        return {name: self._state.read(weight).cpu() for name, weight in self._weights()}

    def save(self, checkpoints: Checkpoints, step: int, **facts: Any) -> None:
        """Start writing checkpoint `step`; returns before it is whole."""
        pieces = {
            f"{kind or _WEIGHTS}/{name}": piece
            for kind in (None, *MOMENTS)
            for name, weight in self._weights()
            if (piece := self._state.local_piece(weight, kind)) is not None
        }
        checkpoints.save(step, pieces | _random_state(), **facts)

    def resume(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Load the newest whole checkpoint; return its step and the facts it was saved with. Step 0: there is none."""
        checkpoints.clear_unfinished()
        newest = checkpoints.newest()
        if newest is None:
            return {"step": 0}
        reader = Reader(newest)
        for kind in (None, *MOMENTS):
            for name, weight in self._weights():
                self._state.replace(weight, kind, reader.read(f"{kind or _WEIGHTS}/{name}"))
        _restore_random_state(reader)
        state = read_state(newest)
        set_steps(self._engine, state["step"])
        say(f"resuming from step {state['step']} ({newest})")
        return state

    def _gradient_norm(self) -> torch.Tensor:
        """Of gradients that are the same on all ranks, as without ZeRO, where DeepSpeed does not tell it."""
        gradients = [weight.grad for _, weight in self._weights() if weight.grad is not None]
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()


def _map_large_blocks() -> None:
    """Let glibc give blocks of 64 KiB and more back to the system when they are freed; other systems are left alone.

    With ZeRO 3 layers are not fused on the CPU, and holes between their many blocks take half as much again as what is
    in use (benchmarks/results/plan-cpu-bfloat16.md). A chunk's rows, and the weights that are gathered and let go, are
    larger than that. The heap's free end would go back at every turn once a threshold is fixed: 256 MiB of it may stay.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 2**16)
        mallopt(_M_TRIM_THRESHOLD, 2**28)


def _random_state() -> dict[str, Piece]:
    """This rank's generators, for dropout."""
    states = {f"random/cpu/{ranks.rank()}": torch.get_rng_state()}
    if ranks.device().type == "cuda":
        states[f"random/cuda/{ranks.rank()}"] = torch.cuda.get_rng_state()
    return {name: Piece(state, 0, tuple(state.shape)) for name, state in states.items()}


def _restore_random_state(reader: Reader) -> None:
    """A rank that the checkpoint did not have keeps its own."""
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        name = f"random/{kind}/{ranks.rank()}"
        if name in reader and kind in ("cpu", ranks.device().type):
            restore(reader.read(name))


def _deepspeed_engine(module: nn.Module, settings: OptimiserSettings) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.pin_memory  # its engine's finalizer would do it, inside whatever import it interrupts

    # It would compile what ranks on a CPU could use for inference: a process killed meanwhile leaves a lock file for
    # which every later start waits without end. To find out what it could compile takes it a compiler, too.
    deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(_parameter_groups(module, settings), lr=0.0, fused=True),
        config=_deepspeed_config(settings),
        dist_init_required=False,
    )
    return engine


def _parameter_groups(module: nn.Module, settings: OptimiserSettings) -> list[dict[str, Any]]:
    """Embeddings, other matrices, and the rest, which does not decay; rate: a multiple of the step's learning rate.

    Parameters with a `learning_rate_factor`, such a multiple, are groups of their own, and do not decay.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    kinds: list[list[nn.Parameter]] = [[], [], []]
    others: dict[float, list[nn.Parameter]] = {}
    for weight in module.parameters():
        if (factor := getattr(weight, "learning_rate_factor", None)) is not None:
            others.setdefault(factor, []).append(weight)
        else:
            kinds[0 if id(weight) in embeddings else 1 if weight.ndim > 1 else 2].append(weight)
    rates, decays = (settings.embedding_rate, 1.0, 1.0), (settings.weight_decay, settings.weight_decay, 0.0)
    groups = [*zip(kinds, rates, decays, strict=True), *((kind, factor, 0.0) for factor, kind in others.items())]
    return [{"params": kind, "rate": rate, "weight_decay": decay} for kind, rate, decay in groups if kind]


def _deepspeed_config(settings: OptimiserSettings) -> dict[str, Any]:
    if settings.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype {settings.dtype!r}: expected bfloat16 or float32")
    return {
        "train_batch_size": ranks.world_size(),  # DeepSpeed only checks it: batches are cut in train/batches.py
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "zero_optimization": _zero_config(settings),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _zero_config(settings: OptimiserSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if ranks.world_size() == 1:
        config["contiguous_gradients"] = False  # a copy of all gradients, of no use to one rank
    if settings.offload:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config

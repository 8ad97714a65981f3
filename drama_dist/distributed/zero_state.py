"""Full weights and optimiser moments, whichever ZeRO stage partitions them: read, replaced, initialised.

Covers the float32 master weights and AdamW's two moments of a DeepSpeed engine, by parameter. Every rank calls every
function, with the same values. Does not cover files: checkpoints.py does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState(Protocol):
    """moment: one of MOMENTS, or None for the master weight."""

    def initialise(self) -> None:
        """Create zero moments before the first step: DeepSpeed creates them during it, too late for resuming."""
        ...

    def read(self, weight: nn.Parameter) -> torch.Tensor:
        """The master weight: float32, in its full shape."""
        ...

    def local_piece(self, weight: nn.Parameter, moment: str | None) -> Piece | None:
        """The piece that this rank is the first to hold, not copied; None if there is none."""
        ...

    def replace(self, weight: nn.Parameter, moment: str | None, value: torch.Tensor) -> None: ...


def zero_state(engine: Any, stage: int) -> ZeroState:
    """The state of a DeepSpeed engine with a torch.optim.AdamW."""
    kinds: tuple[type[Whole | SplitOptimiser | SplitWeights], ...] = Whole, SplitOptimiser, SplitOptimiser, SplitWeights
    return kinds[stage](engine)


def set_steps(engine: Any, step: int) -> None:
    """Make AdamW's bias correction continue from `step`."""
    for state in _adamw(engine).state.values():
        state["step"].fill_(float(step))


class Whole:
    """ZeRO 0: see ZeroState."""

    def __init__(self, engine: Any):
        self._adamw = _adamw(engine)

    def initialise(self) -> None:
        for group in self._adamw.param_groups:
            for weight in group["params"]:
                self._adamw.state[weight] = _zero_moments(weight)

    def read(self, weight: nn.Parameter) -> torch.Tensor:
        return weight.data.clone()

    def local_piece(self, weight: Any, moment: str | None) -> Piece | None:
        if ranks.rank():
            return None
        values = self._adamw.state[weight][moment] if moment else weight.data
        return Piece(values.flatten(), 0, tuple(weight.shape))

    def replace(self, weight: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        (self._adamw.state[weight][moment] if moment else weight.data).copy_(value)


class SplitOptimiser:
    """ZeRO 1 and 2: see ZeroState."""

    def __init__(self, engine: Any):
        self._zero, self._adamw = engine.optimizer, _adamw(engine)

    def initialise(self) -> None:
        for partition in self._zero.single_partition_of_fp32_groups:
            self._adamw.state[partition] = _zero_moments(partition)
        self._zero._lazy_init_hp_params_optimizer_state()  # DeepSpeed calls it after the first group's first step

    def read(self, weight: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full: torch.Tensor = safe_get_full_fp32_param(weight)
        return full

    def local_piece(self, weight: Any, moment: str | None) -> Piece | None:
        mapping = weight._hp_mapping
        if mapping is None:
            return None
        values = mapping.optim_fragment[moment] if moment else mapping.hp_fragment
        return Piece(values, mapping.lp_fragment_address.start, tuple(weight.shape))

    def replace(self, weight: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment:
            safe_set_full_optimizer_state(weight, value, moment)
            return
        safe_set_full_fp32_param(weight, value)
        weight.data.copy_(value)


class SplitWeights:
    """ZeRO 3: see ZeroState."""

    def __init__(self, engine: Any):
        self._zero, self._adamw = engine.optimizer, _adamw(engine)

    def initialise(self) -> None:
        for partition in self._zero.fp32_partitioned_groups_flat:
            self._adamw.state[partition] = _zero_moments(partition)

    def read(self, weight: Any) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full: torch.Tensor = safe_get_full_fp32_param(weight)
        return full.view(weight.ds_shape)

    def local_piece(self, weight: Any, moment: str | None) -> Piece | None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        begin = ranks.rank() * weight.ds_tensor.ds_numel
        if begin >= weight.ds_numel:
            return None
        values = safe_get_local_optimizer_state(weight, moment) if moment else safe_get_local_fp32_param(weight)
        return Piece(values.flatten()[: weight.ds_numel - begin], begin, tuple(weight.ds_shape))

    def replace(self, weight: Any, moment: str | None, value: torch.Tensor) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = weight.ds_tensor.ds_numel  # DeepSpeed's setter for full weights fails if the ranks do not divide them
        begin = ranks.rank() * size
        partition = pad(value.flatten(), (0, size * ranks.world_size() - value.numel()))[begin : begin + size]
        if moment:
            safe_set_local_optimizer_state(weight, partition, moment)
            return
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if ranks.rank() == 0:
                weight.data.copy_(value)
        safe_set_local_fp32_param(weight, partition)


def _adamw(engine: Any) -> torch.optim.AdamW:
    adamw: torch.optim.AdamW = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return adamw


def _zero_moments(like: torch.Tensor) -> dict[str, torch.Tensor]:
    step = torch.zeros((), device=like.device)  # the fused optimiser expects it there
    return {"step": step, **{name: torch.zeros_like(like, requires_grad=False) for name in MOMENTS}}

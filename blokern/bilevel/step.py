"""What one training step takes and gives, whichever method makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blokern.attack import checks
from blokern.distributed import Processes

__all__ = [
    "Batch",
    "DistributedRule",
    "ScoreRule",
    "StatefulRule",
    "StepResult",
    "StepRule",
    "TwoBatchRule",
    "check_batch",
    "check_optimizer",
    "check_types",
]

#: x [N, ...] float32 or float64, y [N] int64.
Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step's outcome, detached; reading a value on the host is the caller's choice.

    loss: scalar, the mean loss that was descended. logits: [N, K], at the point the model was trained on.
    metrics: further scalars by name. All are of this process's part of the batch, where there are several.
    """

    loss: Tensor
    logits: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class StepRule(Protocol):
    """A training method: owns no loop, no schedule and no data; usable in anyone's."""

    model: nn.Module
    optimizer: Optimizer

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Updates the model once on the batch x [N, C, H, W] in [clip_min, clip_max], y [N] int64."""
        ...


@runtime_checkable
class TwoBatchRule(Protocol):
    """A `StepRule` whose two levels learn from different batches; it says so by having `takes_two`."""

    model: nn.Module
    optimizer: Optimizer
    takes_two: ClassVar[Literal[True]]

    def step(self, lower: Batch, upper: Batch) -> StepResult:
        """Updates the model once."""
        ...


@runtime_checkable
class ScoreRule(Protocol):
    """A rule that trains scores besides the weights, at a rate of their own that its owner may set at any time."""

    score_lr: float
    settings: Any  # whose score_lr is the rate at first


@runtime_checkable
class DistributedRule(Protocol):
    """A rule that several processes train one model by, each on its part of the batch."""

    processes: Processes


@runtime_checkable
class StatefulRule(Protocol):
    """A rule with state beyond the model's and the optimizer's: tensors, numbers, strings, and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def check_types(**wanted: tuple[object, type]) -> None:
    """Raises TypeError for an argument, given with its type by name, that is not of its type."""
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")


def check_batch(x: Tensor, y: Tensor, of: str = "") -> None:
    """Raises TypeError or ValueError unless x, y are a `Batch`; `of` begins the message. Reads no value."""
    if isinstance(x, Tensor) and x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{of}x must be torch.float32 or torch.float64, got {x.dtype}")
    checks.check_batch(x, y, of)
    if x.shape[0] == 0:
        raise ValueError(f"{of}x must be a batch, [N, ...] with N >= 1, got shape {tuple(x.shape)}")


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer that holds none of the model's parameters: it would train another."""
    own = {id(p) for p in model.parameters()}
    if own and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer must hold parameters of the model, got one that holds none of them: was it made for another "
            "model, or before the model was copied?"
        )

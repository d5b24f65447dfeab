"""What one training step takes and gives, whichever method makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["StepResult", "StepRule"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step's outcome, detached; reading a value on the host is the caller's choice.

    loss: scalar, the mean loss that was descended. logits: [N, K], at the point the model was trained on.
    metrics: further scalars by name.
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

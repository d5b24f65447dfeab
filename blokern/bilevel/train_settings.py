"""What a training run is made of, besides its method, model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD

from blokern._names import unknown_name
from blokern.bilevel import schedule

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made of besides its method, model and data. The defaults are Fast-BAT's.

    Args:
        epochs: passes over the training images.
        batch_size: images a step, of all processes together.
        lr: peak learning rate.
        schedule: learning rate over the run: cyclic (0 → lr → 0), multistep (a tenth from 50 % on, a
            hundredth from 75 % on), cosine (lr → 0) or constant.
        momentum: of SGD.
        cycle_momentum: lower the momentum by up to 0.1 where the learning rate peaks, as Fast-BAT's released
            code does.
        weight_decay: of SGD.
        augment: random crops, and mirror images where the data allow it.
        channels_last: keep images and weights in channels-last memory order.
        sync_batch_norm: of several processes, give BatchNorm the statistics of the whole batch instead of each part's.
        seed: of the order of the images, of augmentation, and of all that the method draws.
        eps: L∞ budget of the validation attack, and on the command line of the method's, for pixels in [0, 1].
        val_steps: PGD steps of the validation attack, each eps / 4; 0 validates without an attack, and the best
            model is that of the highest standard accuracy.
        val_restarts: random restarts of the validation attack.
        val_samples: validate on at most so many images, the first of the validation split.
        val_batch_size: images a validation batch.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.

    >>> settings = TrainSettings(epochs=10, lr=0.1, eps=0.1)
    >>> optimizer = settings.optimizer(model)
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.2
    schedule: str = "cyclic"
    momentum: float = 0.9
    cycle_momentum: bool = False
    weight_decay: float = 5e-4
    augment: bool = True
    channels_last: bool = False
    sync_batch_norm: bool = False
    seed: int = 0
    eps: float = 8 / 255
    val_steps: int = 10
    val_restarts: int = 1
    val_samples: int = 1000
    val_batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_steps", "val_restarts", "val_samples", "val_batch_size"):
            value, least = getattr(self, name), 0 if name == "val_steps" else 1
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.schedule not in schedule.SCHEDULES:
            raise unknown_name("schedule", self.schedule, schedule.SCHEDULES)
        lowest = schedule.MOMENTUM_DIP if self.cycle_momentum else 0.0
        for name, expected, fits in (
            ("lr", "positive and finite", 0 < self.lr < math.inf),
            ("momentum", f"in [{lowest}, 1)", lowest <= self.momentum < 1),
            ("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf),
            ("eps", f"in (0, 1]{_unit_hint(self.eps)}", 0 < self.eps <= 1),
            ("seed", "in [0, 2**63)", 0 <= self.seed < 2**63),
        ):
            if not fits:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def optimizer(self, model: nn.Module) -> SGD:
        """SGD over the model's parameters with these settings."""
        return SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def _unit_hint(eps: float) -> str:
    """For a budget that is given in 255ths."""
    return f" (do you mean {eps:g}/255?)" if 1 < eps <= 255 else ""

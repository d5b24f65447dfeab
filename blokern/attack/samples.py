"""Samples on their way: those under attack, where they stand, what the model said, the worst that was found."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from blokern.ops.types import PerSample

__all__ = ["Batch", "Look", "Samples", "Walk", "Worst", "loss_dtype", "rows"]


class Samples:
    """Base of dataclasses: their tensors have a row a sample, and all samples share the rest."""

    def take(self, index: Tensor) -> Self:
        """The samples at `index`, [n] int64."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        kept = {name: v[index] if isinstance(v, Tensor) else v for name, v in kept.items()}
        return replace(self, **kept)  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(Samples):
    """The samples under attack. `index` is their place in the batch that the attack was called on."""

    index: Tensor
    x: Tensor
    y: Tensor
    eps: PerSample
    step_size: PerSample  # the first step's, where it adapts
    largest_label: int
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Walk(Samples):
    """Where an attack stands; `x_adv` [N, ...] is stepped in place."""

    x_adv: Tensor


@dataclass(frozen=True)
class Look(Samples):
    """What the model said at a point: the climbed loss [N], its gradient [N, ...], who is fooled [N] bool."""

    grad: Tensor
    loss: Tensor
    fooled: Tensor

    def still(self) -> Tensor:
        """[N] bool: who is not fooled and has no gradient to follow, as it is zero everywhere or has a NaN."""
        size: Tensor = torch.linalg.vector_norm(self.grad, torch.inf, dim=tuple(range(1, self.grad.dim())))
        return (size > 0).logical_or(self.fooled).logical_not()


class Worst:
    """Each sample's worst perturbation so far: one that fools beats one that does not, then the higher
    loss."""

    def __init__(self, everyone: Batch) -> None:
        x = everyone.x
        self.x_adv = x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = torch.full((len(x),), -torch.inf, dtype=loss_dtype(x), device=x.device)

    def update(self, batch: Batch, x_adv: Tensor, loss: Tensor, fooled: Tensor) -> None:
        """Takes the points `x_adv` of the samples in `batch` where they are worse than what was known."""
        everyone = len(batch) == len(self.loss)
        here = slice(None) if everyone else batch.index  # views of everyone's, copies of some's
        x_known, loss_known, fooled_known = self.x_adv[here], self.loss[here], self.fooled[here]
        worse = torch.where(fooled == fooled_known, loss > loss_known, fooled)
        torch.where(rows(worse, x_adv), x_adv, x_known, out=x_known)
        torch.where(worse, loss, loss_known, out=loss_known)
        torch.logical_or(fooled, fooled_known, out=fooled_known)
        if not everyone:
            self.x_adv[here], self.loss[here], self.fooled[here] = x_known, loss_known, fooled_known


def loss_dtype(x: Tensor) -> torch.dtype:
    """What a sample's losses and step sizes are kept in: float64 for float64 images, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows(values: Tensor, like: Tensor) -> Tensor:
    """[N] values, shaped to broadcast over the samples of `like` [N, ...]."""
    return values.view(-1, *([1] * (like.dim() - 1)))

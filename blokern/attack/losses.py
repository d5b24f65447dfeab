"""What an attack climbs: a loss a sample, and who counts as correctly classified.

Every loss takes logits [N, K] and labels [N] int64 and returns [N], in at least float32. A NaN in a sample's
logits makes that sample's loss NaN and no other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from blokern._names import one_of

__all__ = [
    "LOSSES",
    "Loss",
    "LossName",
    "correct",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "margin",
    "named_loss",
]

#: logits [N, K], labels [N] -> loss [N], higher where the labels fit worse.
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
LossName: TypeAlias = Literal["ce", "dlr", "margin", "cw"]

_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(logits)[y] of each sample; logits [N, K] and y [N] int64 to [N].

    Where the logits of a correctly classified sample lie some 100 apart its gradient is exactly zero in float32:
    :func:`dlr` and :func:`margin` have one there::

        loss = cross_entropy(model(x), y)
        assert loss.shape == y.shape
    """
    return F.cross_entropy(_wide(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i − z_y, positive exactly where another class leads; logits [N, K] and y [N] int64 to [N].

    Carlini & Wagner, IEEE S&P 2017, without its bound; for "cw" as well. ValueError with fewer than 2 classes::

        loss = margin(model(x), y)
        fooled = loss > 0
    """
    return _rival(_leading(logits, 2, "margin"), y) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3), π the descending order.

    Logits [N, K] and y [N] int64 to [N]. Invariant to the logits' scale and shift, so that a scaled model
    cannot hide its gradient; positive exactly where another class leads. Croce & Hein, ICML 2020.
    ValueError with fewer than 3 classes::

        loss = dlr(model(x), y)
        fooled = loss > 0
    """
    top = _leading(logits, 3, "dlr")
    z = top.values
    return _ratio(_rival(top, y) - _at(logits, y), z[:, 0] - z[:, 2])


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference-of-logits ratio −(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2), climbed towards t =
    target.

    Logits [N, K], y and target [N] int64, to [N]. Croce & Hein, ICML 2020. ValueError with fewer
    than 4 classes::

        second = model(x).topk(2, dim=1).indices[:, 1]
        loss = dlr_targeted(model(x), y, second)
    """
    z = _leading(logits, 4, "dlr_targeted").values
    return _ratio(_at(logits, target) - _at(logits, y), z[:, 0] - 0.5 * (z[:, 2] + z[:, 3]))


#: The losses that have a name.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin, "cw": margin}


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """[N] bool: argmax is y, the lowest class among ties; a sample with a NaN is never correct."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def named_loss(loss: LossName | Loss) -> Loss:
    """The loss of that name; a callable is its own."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be {one_of(loss, LOSSES)} or a callable (logits, y) -> [N]")
    return LOSSES[loss]


def _wide(logits: Tensor) -> Tensor:
    """At least float32: under autocast logits come in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _ratio(lead: Tensor, span: Tensor) -> Tensor:
    """lead / (span + 1e-12), as released: finite where the leading logits tie. Beside a span that is smaller than 1e-6
    the constant shrinks, too: it would be all that is left."""
    tiny = torch.where(span > 0, (1e-6 * span.detach()).clamp(max=_TINY), _TINY)
    return lead / (span + tiny)


def _leading(logits: Tensor, k: int, loss: str) -> torch.return_types.topk:
    if logits.shape[1] < k:
        raise ValueError(f"loss {loss} needs at least {k} classes, got logits of shape {tuple(logits.shape)}")
    return _wide(logits).topk(k, dim=1)


def _rival(top: torch.return_types.topk, y: Tensor) -> Tensor:
    """The largest logit but y's."""
    return torch.where(top.indices[:, 0] == y, top.values[:, 1], top.values[:, 0])


def _at(logits: Tensor, y: Tensor) -> Tensor:
    return _wide(logits).gather(1, y.unsqueeze(1)).squeeze(1)

"""Steps of pruning over all layers in one call: one pass over memory, where eager PyTorch takes five to ten.

Every list has one tensor a layer, [out, ...] of at least two dimensions and any strides, float64 or float32, all of a
layer of one shape and dtype; masks are SparseMasks, which save what a bool tensor costs at every call, or bool tensors.
Momentum and decay are those of torch.optim.SGD: `momentum_buffers`, zeros at first, take the running sums in place, and
are needed unless momentum is 0. The bits do not depend on threads or instruction set. There is no derivative: a tensor
that requires grad outside ``torch.no_grad()`` is a ValueError.

Every function raises ValueError for a value, shape, device or number of tensors that does not fit and TypeError for a
type that does not, naming the argument, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blokern.ops.mask import SparseMask, as_mask, check_mask

__all__ = ["bip_released_step_", "bip_score_step_", "masked_sgd_step_"]


def bip_score_step_(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | SparseMask],
    *,
    lr: float,
    gamma: float = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    """BiP's upper level: a step of SGD on the scores, in place, along (θ − m ⊙ g / γ) ⊙ g.

    weights: θ; grads: g, the loss's gradient by w = m ⊙ θ, dense; masks: m; gamma: γ > 0, inf for no implicit term.
    Lists of one tensor a layer, [out, ...], float64 or float32; momentum_buffers likewise, zeros at first, needed
    unless momentum is 0. Raises ValueError for values, shapes, devices or lengths that do not fit, or a tensor that
    requires grad outside torch.no_grad(), TypeError for types, naming the argument, before anything is written.
    Source: Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu, "Advancing Model Pruning via Bi-level Optimization", NeurIPS
    2022.

    >>> scores, weights, grads = ([torch.full((1, 2), v)] for v in (1.0, 3.0, 2.0))
    >>> bip_score_step_(scores, weights, grads, [torch.tensor([[True, False]])], lr=0.1); scores
    [tensor([[0.8000, 0.4000]])]
    """
    _check_lists(scores=scores, weights=weights, grads=grads, masks=masks)
    buffers = _buffers(momentum_buffers)
    words = _words(masks, scores, "scores")
    torch.ops.blokern.bip_score_step_(
        scores, weights, grads, words, buffers, lr, gamma, momentum, weight_decay
    )


def bip_released_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    gamma: float = 1e4,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    """What BiP's released code does for :func:`bip_score_step_`, to reproduce it: its scores are the weights.

    A step of SGD on the weights, in place, along |θ| ⊙ g − (θ ⊙ g)² / γ; 1/γ is that code's lr2. Lists and errors as
    there.

    >>> weights, grads = [torch.tensor([[-2.0]])], [torch.tensor([[1.0]])]
    >>> bip_released_step_(weights, grads, lr=0.1, gamma=float("inf")); weights
    [tensor([[-2.2000]])]
    """
    _check_lists(weights=weights, grads=grads)
    buffers = _buffers(momentum_buffers)
    torch.ops.blokern.bip_released_step_(weights, grads, buffers, lr, gamma, momentum, weight_decay)


def masked_sgd_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | SparseMask],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffers: Sequence[Tensor] | None = None,
) -> None:
    """torch.optim.SGD's step on the weights, in place, for the gradient m ⊙ g; where m is 0, g may be NaN.

    Weights whose mask is 0 keep moving by decay and momentum, as they do with torch's optimizer. Lists and errors as in
    :func:`bip_score_step_`.

    >>> weights, grads = [torch.ones(1, 2)], [torch.ones(1, 2)]
    >>> masked_sgd_step_(weights, grads, [torch.tensor([[True, False]])], lr=0.5); weights
    [tensor([[0.5000, 1.0000]])]
    """
    _check_lists(weights=weights, grads=grads, masks=masks)
    buffers = _buffers(momentum_buffers)
    words = _words(masks, weights, "weights")
    torch.ops.blokern.masked_sgd_step_(weights, grads, words, buffers, lr, momentum, weight_decay)


def _check_lists(**lists: object) -> None:
    for name, layers in lists.items():
        if not isinstance(layers, list | tuple):
            raise TypeError(f"{name} must be a list, got {type(layers).__name__}")
        if not layers:
            raise ValueError(f"{name} must hold at least one layer, got an empty list")
        kinds = (Tensor, SparseMask) if name == "masks" else (Tensor,)
        for i, layer in enumerate(layers):
            if not isinstance(layer, kinds):
                raise TypeError(
                    f"{name}[{i}] must be a {' or '.join(k.__name__ for k in kinds)}, got {type(layer).__name__}"
                )


def _buffers(momentum_buffers: Sequence[Tensor] | None) -> Sequence[Tensor]:
    if momentum_buffers is None:
        return []
    _check_lists(momentum_buffers=momentum_buffers)
    return momentum_buffers


def _words(masks: Sequence[Tensor | SparseMask], like: Sequence[Tensor], name: str) -> list[Tensor]:
    """The masks' bits, of masks that fit."""
    if len(masks) != len(like):
        raise ValueError(f"masks must have as many masks as {name}, {len(like)}, got {len(masks)}")
    found = [as_mask(mask) for mask in masks]
    for i, mask in enumerate(found):
        check_mask(mask, like[i], f"{name}[{i}]")
    return [mask.words for mask in found]


def _nothing(*_: object) -> None:
    return None


for _name in __all__:
    torch.library.register_fake(f"blokern::{_name}", _nothing)

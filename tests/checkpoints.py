"""What is in the checkpoints of small pruned networks, made without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from blokern import models, ops
from blokern.bilevel.masking import prunable
from blokern.sparse import sparsify

NETWORK = {"name": "small_cnn", "num_classes": 3, "in_channels": 1, "width": 8}


def pruned(
    masking: Callable[[Tensor], Tensor] | None,
    network: Mapping[str, Any] = NETWORK,
    data: str | None = "digits",
) -> dict[str, Any]:
    """The payload of a network whose layers but the last are pruned by `masking`; its BatchNorms have seen images."""
    torch.manual_seed(0)
    model = models.build(**network)
    model(torch.rand(8, network["in_channels"], 8, 8))
    *names, _ = weights = prunable(model)
    sparsify(model, {name: masking(weights[name]) for name in names} if masking else {})
    recipe = {"model": dict(network), **({} if data is None else {"data": {"name": data}})}
    return {"recipe": recipe, "model": model.state_dict()}


def half_of_the_filters(weight: Tensor) -> Tensor:
    return ops.filter_mask(weight, 0.5)


def half_of_the_channels(weight: Tensor) -> Tensor:
    return ops.channel_mask(weight, 0.5) if weight.shape[1] > 3 else torch.ones_like(weight).bool()


def filters_and_weights(weight: Tensor) -> Tensor:
    """Masks remain in the compacted layers."""
    return ops.filter_mask(weight, 0.5) & ops.topk_mask(weight.abs(), 0.6)


def single_weights(weight: Tensor) -> Tensor:
    return ops.topk_mask(weight.abs(), 0.3)

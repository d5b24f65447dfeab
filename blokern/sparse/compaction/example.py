"""An input for a network, where the caller gave none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from blokern.sparse.compaction.cut import copied

__all__ = ["checked_example", "find_example"]

_BATCH = 2
# Pixels a side: a network that flattens its maps takes one of them alone. The usual ones are also tried for forwards
# that need values, which have to compute.
_USUAL = (32, 64, 224, 8, 16, 28)
_SIDES = (*_USUAL, 96, 128, 160, 192, 256, 299, 384, *(n for n in range(1, 65) if n not in _USUAL))
_FIRST = (_ConvNd, nn.Linear, nn.Embedding)


def checked_example(example: Any) -> tuple[Any, ...]:
    """The arguments of the forward; raises TypeError for what holds no tensor."""
    arguments = (example,) if isinstance(example, Tensor) else example
    if not isinstance(arguments, (tuple, list)) or not any(isinstance(a, Tensor) for a in arguments):
        raise TypeError(
            f"example must be a tensor or a tuple of the forward's arguments, got {type(example).__name__}"
        )
    return tuple(arguments)


def find_example(model: nn.Module) -> tuple[Tensor, ...]:
    """Two samples that the model takes, by its first layer; raises ValueError if none are found."""
    layer = next((module for module in model.modules() if isinstance(module, _FIRST)), None)
    reason = "it has no convolution, linear layer or embedding to tell by"
    if layer is not None:
        shapes = list(_shapes(layer))
        for device, tried in (
            ("meta", shapes),
            (layer.weight.device, shapes[: len(_USUAL)]),
        ):  # some forwards read values
            trial = copied(model).to(device)
            for shape, kinds in tried:
                try:
                    with torch.no_grad():
                        trial(_input(shape, kinds, device, layer.weight.dtype))
                except Exception as error:
                    reason = f"last tried: {list(shape)}, {error}".splitlines()[0]
                    continue
                return (_input(shape, kinds, layer.weight.device, layer.weight.dtype),)
    raise ValueError(
        "example: compact runs the model to see its channels, and found no input that it takes; give one, such as "
        f"compact(model, example=torch.randn(2, 3, 224, 224)) ({reason})"
    )


def _shapes(layer: Any) -> Iterator[tuple[tuple[int, ...], int]]:
    if isinstance(layer, nn.Linear):
        yield (_BATCH, layer.in_features), 0
        yield (_BATCH, 4, layer.in_features), 0
    elif isinstance(layer, nn.Embedding):
        yield (_BATCH, 8), layer.num_embeddings
    else:
        taps = layer.weight.dim() - 2
        for side in _SIDES if taps < 3 else (16, 32, 64):
            yield (_BATCH, layer.in_channels, *[side] * taps), 0


def _input(shape: tuple[int, ...], kinds: int, device: Any, dtype: torch.dtype) -> Tensor:
    if str(device) == "meta":
        return torch.empty(shape, dtype=torch.int64 if kinds else dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    if kinds:
        return torch.randint(kinds, shape, generator=generator).to(device)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

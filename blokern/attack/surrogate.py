"""A cheaper copy of a network for an attack to find its way on."""

from __future__ import annotations

import copy
import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from blokern._names import unknown_name

__all__ = ["SURROGATES", "Surrogate", "SurrogateName", "check_surrogate"]

#: The type that the copy computes in.
SurrogateName: TypeAlias = Literal["fp32", "bf16"]

SURROGATES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: ‖logits − the model's‖ / ‖the model's‖ on the images attacked, above which the copy is another network.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


def check_surrogate(name: object) -> None:
    if name is not None and name not in SURROGATES:
        raise unknown_name("surrogate", name, SURROGATES)


class Surrogate(nn.Module):
    """`model` in eval mode as it is now, BatchNorm folded into convolutions, channels_last, in the type `name`.

    Takes and returns float32, without parameter gradients. `x` [N, ...] are images to try it on: where it does not
    compute what the model does (up to rounding; tracing a forward in Python can miss some of it), it is the model
    itself, with a warning::

        guide = Surrogate(model, x, "bf16")
        assert (guide(x).argmax(1) == model(x).argmax(1)).float().mean() > 0.9
    """

    def __init__(self, model: nn.Module, x: Tensor, name: SurrogateName) -> None:
        super().__init__()
        self.dtype = SURROGATES[name]
        self.format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        self.network = _folded(model).to(self.dtype).requires_grad_(False)
        self.network.to(memory_format=self.format)  # type: ignore[call-overload]  # missing in torch's stub
        with torch.no_grad():
            logits = model(x)
            error = (self(x) - logits).norm() / logits.norm().clamp(min=1e-12)
        if not error <= _TOLERANCE[name]:
            warnings.warn(
                f"surrogate={name!r}: the copy's logits are {error:.1%} off, so the model itself is attacked",
                stacklevel=2,
            )
            self.dtype, self.format, self.network = x.dtype, torch.preserve_format, model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(self.dtype, memory_format=self.format))
        return logits.float()


def _folded(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    try:
        return fuse(twin)
    except Exception:  # tracing runs the model's own Python on proxies, which may raise anything
        return twin

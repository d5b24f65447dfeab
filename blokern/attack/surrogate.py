"""A cheaper copy of a network for an attack to find its way on."""

from __future__ import annotations

import copy
import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from blokern._names import unknown_name
from blokern.attack.outputs import logits_of

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

    Takes and returns float32, without parameter gradients. `x` [N, ...] are images to try it on: where it cannot be
    made or run, or does not compute what the model does (up to rounding; tracing a forward in Python can miss some of
    it), it is the model itself, with a warning::

        guide = Surrogate(model, x, "bf16")
        assert (guide(x).argmax(1) == model(x).argmax(1)).float().mean() > 0.9
    """

    def __init__(self, model: nn.Module, x: Tensor, name: SurrogateName) -> None:
        super().__init__()
        with torch.no_grad():
            logits = logits_of(model(x.clone()))
        try:
            self.dtype = SURROGATES[name]
            self.format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
            self.network = _folded(model).to(self.dtype).requires_grad_(False)
            self.network.to(memory_format=self.format)  # type: ignore[call-overload]  # missing in torch's stub
            wrong = self._error(logits, x, name)
        except (
            Exception
        ) as error:  # copying, tracing and running call the model's own code, which may raise anything
            wrong = f" cannot be made or run ({type(error).__name__}: {error})"
        if wrong is not None:
            warnings.warn(
                f"surrogate={name!r}: the copy{wrong}, so the model itself is attacked", stacklevel=2
            )
            self.dtype, self.format, self.network = x.dtype, torch.preserve_format, model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.network(x.to(self.dtype, memory_format=self.format))).float()

    def _error(self, logits: Tensor, x: Tensor, name: SurrogateName) -> str | None:
        """What is wrong with the copy's logits for x, where the model's are these; raises what the copy raises."""
        with torch.no_grad():
            logits, ours = logits.double(), self(x.clone()).double()  # whose squares do not underflow
        some = x[:1].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(self(some.clone()).sum(), some)
        error = (ours - logits).norm() / logits.norm().clamp(min=torch.finfo(torch.float64).tiny)
        return None if error <= _TOLERANCE[name] else f"'s logits are {error:.1%} off"


def _folded(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse  # warns of what torch deprecates: not at import

    twin = copy.deepcopy(model).eval()
    try:
        return fuse(twin)
    except Exception:  # tracing runs the model's own Python on proxies, which may raise anything
        return twin

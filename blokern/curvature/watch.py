"""What has to be seen above autograd while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from blokern.curvature.recorder import Recorder
from blokern.ops.masked_weight import GradientMask

__all__ = ["Watch", "as_in_forward"]


class Watch(TorchFunctionMode):
    """Tells the recorder, if there is one, what the dispatcher does not see, and takes ops apart that torch has no
    right second derivatives of."""

    def __init__(self, recorder: Recorder | None) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        func = _ELEMENTARY.get(func, func)
        if self._recorder is not None:
            if func == _SET_DATA:
                self._recorder.preserve(args[0])
            if func is Tensor.register_hook and isinstance(args[1], GradientMask):
                self._recorder.mask(args[0])
                return func(*args)
            why = _REFUSED.get(func)
            if why is not None and (func is Tensor.register_hook or not args[0].is_leaf):
                self._recorder.refuse(why)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_in_forward(recorder: Recorder | None = None) -> Iterator[None]:
    """What a model runs under, and where a checkpoint runs it again: eagerly, and attention in its elementary form, as
    its fused forms have no second derivative."""
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), Watch(recorder):
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm, whose own second derivative lacks a term."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__

#: What only autograd would follow: hooks, and of activations also hooks on nodes, as modules' old ones are.
_REFUSED: dict[Any, str] = {
    Tensor.register_hook: "a hook on a gradient",
    vars(torch._C.TensorBase)["grad_fn"].__get__: "a look at autograd's graph, where hooks may be put",
    _SET_DATA: "an activation whose data was replaced",
}

#: What torch has no right second derivative of, and its elementary form.
_ELEMENTARY: dict[Any, Callable[..., Any]] = {torch._weight_norm: _weight_norm}

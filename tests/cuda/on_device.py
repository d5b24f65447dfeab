""":mod:`blokern.ops` as tests of CPU tensors call it, run on another device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blokern import ops


class OnDevice:
    """Arguments go to the device in their layout, those in lists too, results and what is written in place come back.
    The host never waits for the device in between: where that is CUDA, an op that does so raises, unless it `waits`."""

    curvature = ops.curvature

    def __init__(self, device: torch.device, *, waits: bool = False) -> None:
        self.device, self.waits = device, waits

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            moved: dict[int, tuple[Tensor, Tensor]] = {}

            def there(value: Any) -> Any:
                if isinstance(value, ops.SparseMask):
                    return ops.SparseMask.of_words(value.words.to(self.device), value.shape)
                if not isinstance(value, Tensor):
                    return value
                if id(value) not in moved:
                    moved[id(value)] = value, moved_to(value, self.device)
                return moved[id(value)][1]

            args, kwargs = torch.utils._pytree.tree_map(there, (args, kwargs))
            run = partial(op, *args, **kwargs)
            result = run() if self.waits else asynchronous(self.device, run)
            if name.endswith("_"):
                for here, at in moved.values():
                    here.copy_(at)
            return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, result)

        return call


def moved_to(t: Tensor, device: torch.device) -> Tensor:
    """A copy with t's strides, and as far past a boundary of 16 bytes."""
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    shift = t.data_ptr() % 16 // t.element_size()
    memory = t.new_zeros(shift + max(span, 0), device=device)
    return memory.as_strided(t.shape, t.stride(), shift).copy_(t)


def asynchronous(device: torch.device, run: Callable[[], Any]) -> Any:
    if device.type != "cuda":
        return run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")

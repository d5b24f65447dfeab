"""A whole attack loop as one CUDA graph: one launch for all of its steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GraphedLoop"]

#: Before a capture, so that libraries have chosen their algorithms and torch's allocator has its blocks.
WARM_UPS = 3


class GraphedLoop:
    """run(x, y, start), which moves `start` in place and reads nothing back from the device, kept as a CUDA graph.

    A call with other shapes, or after anything that the graph has fixed has changed (settings; the model's modes; where
    its parameters and buffers lie), captures anew. New values of the parameters are seen.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(
        self,
        run: Callable[[Tensor, Tensor, Tensor], Any],
        model: nn.Module,
        settings: Hashable,
        *inputs: Tensor,
    ) -> Tensor:
        """run's last argument, where the loop ends."""
        key = (settings, _fixed(model), *(_layout(t) for t in inputs))
        with torch.cuda.device(inputs[0].device):
            if key != self._key:
                self._capture(run, inputs)
                self._key = key
            for static, t in zip(self._inputs, inputs, strict=True):
                static.copy_(t)
            assert self._graph is not None
            self._graph.replay()
        return self._inputs[-1].clone()

    def _capture(self, run: Callable[[Tensor, Tensor, Tensor], Any], inputs: tuple[Tensor, ...]) -> None:
        self._key, self._graph = None, None  # also where the capture fails
        self._inputs = tuple(t.clone() for t in inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(*self._inputs)
        self._graph = graph


def _layout(t: Tensor) -> Hashable:
    return t.device, t.dtype, t.shape, t.stride()


def _fixed(model: nn.Module) -> Hashable:
    """What a graph of the model has fixed."""
    tensors = [*model.parameters(), *model.buffers()]
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (
        tuple(t.data_ptr() for t in tensors),
        tuple(module.training for module in model.modules()),
        autocast,
    )

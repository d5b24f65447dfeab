"""Layers in torch.fx.symbolic_trace: one node each, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["node_of"]


def node_of(layer: nn.Module, input: object) -> Any:
    """What a layer returns for what is no tensor: a node that calls it, of a stand-in in a torch.fx trace.

    Raises TypeError for anything else.

    >>> graph = torch.fx.symbolic_trace(nn.Sequential(MaskedLinear(8, 4))).graph
    >>> [node.op for node in graph.nodes]
    ['placeholder', 'call_module', 'output']
    """
    if isinstance(input, fx.Proxy):
        tracer: Any = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})
    raise TypeError(f"input must be a Tensor, got {type(input).__name__}")

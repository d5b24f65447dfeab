"""The products by autograd's own graph of the forward pass: where there is no tape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from blokern.curvature.op import Maybe
from blokern.curvature.outputs import is_number
from blokern.curvature.watch import as_in_forward

__all__ = ["DoubleBackward", "Output", "outputs_of"]

Node: TypeAlias = torch.autograd.graph.Node
Place: TypeAlias = Tensor | GradientEdge


class Output(NamedTuple):
    """A place in autograd's graph that a model's output had when it was returned, and a tensor like it."""

    edge: GradientEdge
    like: Tensor

    @property
    def place(self) -> tuple[Node, int]:
        return self.edge.node, self.edge.output_nr


def outputs_of(tensors: Iterable[Tensor]) -> list[Output]:
    """Of those that require a gradient; each place once, as several tensors may have one."""
    found = [Output(get_gradient_edge(t), t.detach()) for t in tensors if t.requires_grad]
    return [*{output.place: output for output in found}.values()]


class DoubleBackward:
    """`TapeProducts` by differentiating twice.

    Several vectors are one product each; nothing is freed before the last. RuntimeError from a product if a custom
    Function has a gradient that cannot be differentiated.
    """

    def __init__(
        self, loss: Tensor, outputs: Sequence[Output], parameters: dict[str, Tensor], x: Maybe
    ) -> None:
        self._loss = loss
        self._outputs = outputs
        self._parameters = parameters
        self._x = x
        self._gradients: dict[str, tuple[Maybe, ...]] = {}

    def input_gradient(self) -> Maybe:
        if self._x is None:
            return None
        (grad,) = self._gradient("x", [self._x])
        return None if grad is None else grad.detach()

    def hvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        gradient = self._gradient("parameters", self._leaves())
        return self._named(_products(gradient, self._leaves(), self._along(v), stack))

    def mixed_hvp(self, u: Tensor, keep: bool, stack: bool) -> dict[str, Tensor]:
        assert self._x is not None
        return self._named(_products(self._gradient("x", [self._x]), self._leaves(), [u], stack))

    def mixed_hvp_transpose(self, v: dict[str, Tensor], keep: bool, stack: bool) -> Maybe:
        assert self._x is not None
        gradient = self._gradient("parameters", self._leaves())
        (found,) = _products(gradient, [self._x], self._along(v), stack)
        return found

    def ggnvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        if not self._outputs:
            return {}
        edges = [output.edge for output in self._outputs]
        # Jw is linear in w, so its derivative along v is Jᵀ's transpose: the product J v.
        probes = [torch.ones_like(output.like, requires_grad=True) for output in self._outputs]
        pulled = self._differentiable(edges, self._leaves(), probes)
        pushed = _products(pulled, probes, self._along(v), stack)
        with self._cut():
            curved = _products(self._by_outputs(), edges, pushed, stack)
        pairs = [(edge, u) for edge, u in zip(edges, curved, strict=True) if u is not None]
        if not pairs:
            return {}

        def back(*each: Tensor) -> tuple[Maybe, ...]:
            return _grad([edge for edge, _ in pairs], self._leaves(), each)

        return self._named(_each(back, [u for _, u in pairs], stack))

    def past_outputs(self) -> list[str]:
        return self._names(_nodes(self._loss, {output.place for output in self._outputs}))

    def returns_loss(self) -> bool:
        if not any(is_number(output.like.shape) for output in self._outputs):
            return False
        edges = [output.edge for output in self._outputs]
        with self._cut():
            for output, grad in zip(self._outputs, self._by_outputs(), strict=True):
                if not is_number(output.like.shape) or grad is None:
                    continue
                if not grad.requires_grad or all(
                    t is None for t in _grad([grad], edges, [torch.ones_like(grad)])
                ):
                    return True
        return False

    def _by_outputs(self) -> tuple[Maybe, ...]:
        """The loss's gradient by the outputs, inside `_cut`."""
        if not self._loss.requires_grad:
            return (None,) * len(self._outputs)
        edges = [output.edge for output in self._outputs]
        return _grad([self._loss], edges, [torch.ones_like(self._loss)], create_graph=True)

    @contextmanager
    def _cut(self) -> Iterator[None]:
        """Inside, no gradient goes on from an output to what it was computed from: of which another may be one."""
        handles = []
        for output in self._outputs:
            node, place = output.place
            if node.next_functions:  # no leaf
                handles.append(node.register_prehook(_without(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leaves(self) -> list[Tensor]:
        return [*self._parameters.values()]

    def _along(self, v: dict[str, Tensor]) -> list[Tensor]:
        return [v[name] for name in self._parameters]

    def _gradient(self, name: str, leaves: Sequence[Tensor]) -> tuple[Maybe, ...]:
        if name not in self._gradients:
            if self._loss.requires_grad:
                # A seed that requires a gradient, as then every gradient does that can be differentiated.
                seed = torch.ones_like(self._loss, requires_grad=True)
                self._gradients[name] = self._differentiable([self._loss], leaves, [seed])
            else:
                self._gradients[name] = (None,) * len(leaves)
        return self._gradients[name]

    def _differentiable(
        self, of: Sequence[Place], by: Sequence[Tensor], along: Sequence[Tensor]
    ) -> tuple[Maybe, ...]:
        """Gradients that can be differentiated; RuntimeError, naming what they go through, if they cannot."""
        final: dict[str, Node] = {}
        handles: list[Any] = []
        for node in _nodes(self._loss):
            if isinstance(node, torch.autograd.function.BackwardCFunction):

                def look(grads: Sequence[Maybe], given: Sequence[Maybe], node: Any = node) -> None:
                    edges = zip(grads, node.next_functions, strict=False)
                    if any(g is not None and edge[0] and _is_final(g, given) for g, edge in edges):
                        final[node.name()] = node

                handles.append(node.register_hook(look))
        try:
            gradient = _grad(of, by, along, create_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        if final:
            raise RuntimeError(self._not_twice(final))
        return gradient

    def _not_twice(self, final: dict[str, Node]) -> str:
        names = self._names(_behind([(node, 0) for node in final.values()]))
        return (
            f"{', '.join(final)} in the model or loss_fn has a backward that cannot be differentiated again "
            "(once_differentiable, under no_grad, or of detached tensors), and second derivatives by "
            f"{', '.join(names) or 'x'} go through it: write it with differentiable ops of ctx.saved_tensors"
        )

    def _names(self, nodes: Iterable[Node]) -> list[str]:
        """Of the parameters among the leaves that are there."""
        leaves = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        return [name for name, p in self._parameters.items() if id(p) in leaves]

    def _named(self, found: Sequence[Maybe]) -> dict[str, Tensor]:
        """By name, and dense: an embedding with sparse=True has sparse gradients."""
        pairs = zip(self._parameters, found, strict=True)
        return {name: t if t.layout == torch.strided else t.to_dense() for name, t in pairs if t is not None}


def _nodes(t: Tensor, stop: Collection[tuple[Node, int]] = ()) -> list[Node]:
    """The nodes of t's graph, but for what lies behind the places to stop at."""
    return _behind([(t.grad_fn, t.output_nr)], stop)


def _behind(places: Sequence[tuple[Node | None, int]], stop: Collection[tuple[Node, int]] = ()) -> list[Node]:
    """The nodes at these places, and all that their gradients go on to."""
    seen: dict[Node, None] = {}
    left = [*places]
    while left:
        node, place = left.pop()
        if node is not None and (node, place) not in stop and node not in seen:
            seen[node] = None
            left.extend(node.next_functions)
    return [*seen]


def _is_final(grad: Tensor, given: Sequence[Maybe]) -> bool:
    """Whether a Function's gradient has lost its dependence on what was given to its backward.

    A zero is a constant, unless it comes of zeros.
    """
    if grad.grad_fn is not None:
        return grad.grad_fn.name() == "torch::autograd::Error"  # once_differentiable
    return not grad.requires_grad and (bool(grad.any()) or not any(g is not None and g.any() for g in given))


def _without(place: int) -> Callable[[Sequence[Maybe]], tuple[Maybe, ...]]:
    return lambda grads: tuple(None if i == place else grad for i, grad in enumerate(grads))


def _grad(
    of: Sequence[Place], by: Sequence[Place], along: Sequence[Tensor], create_graph: bool = False
) -> tuple[Maybe, ...]:
    """torch.autograd.grad that takes nothing for granted and frees nothing.

    A checkpoint runs its part of the model again: under what the forward pass ran under. For that the graph's edges are
    given, as of tensors autograd would be called by a mode, which it switches off.
    """
    with torch.enable_grad(), as_in_forward():
        return torch.autograd.grad(
            _edges(of), _edges(by), along, create_graph=create_graph, retain_graph=True, allow_unused=True
        )


def _edges(places: Sequence[Place]) -> list[GradientEdge]:
    return [place if isinstance(place, GradientEdge) else get_gradient_edge(place) for place in places]


def _products(of: Sequence[Maybe], by: Sequence[Place], along: Sequence[Maybe], stack: bool) -> list[Maybe]:
    """The gradients by `by` of ⟨of, along⟩, for each element of a stack if it is one."""
    pairs = [
        (t, a) for t, a in zip(of, along, strict=True) if t is not None and a is not None and t.requires_grad
    ]
    if not pairs or not by:
        return [None] * len(by)

    def product(*each: Tensor) -> tuple[Maybe, ...]:
        return _grad(
            [t for t, _ in pairs], by, [a.to(t.dtype) for (t, _), a in zip(pairs, each, strict=True)]
        )

    return _each(product, [a for _, a in pairs], stack)


def _each(f: Callable[..., tuple[Maybe, ...]], given: Sequence[Tensor], stack: bool) -> list[Maybe]:
    """f(*given), or that for each element of the leading dimension."""
    if not stack:
        return [*f(*given)]
    parts = zip(*(f(*each) for each in zip(*given, strict=True)), strict=True)
    found = [[t for t in slot if t is not None] for slot in parts]
    return [torch.stack(slot) if slot else None for slot in found]

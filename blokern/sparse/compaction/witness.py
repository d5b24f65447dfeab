"""A second reading: that of a copy, against that of the network that it is a copy of."""

from __future__ import annotations

import torch
from torch import Tensor

from blokern.sparse.compaction.channels import Axis, Channels
from blokern.sparse.compaction.record import Call, Node, Recorder, Rule, Value
from blokern.sparse.compaction.rules import rule_of

__all__ = ["Disagreement", "Rereading"]


class Disagreement(Exception):
    """The copy computes otherwise than expected. place: the op's."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place, self.why = place, why


class _Settled(Channels):
    """Channels whose sameness is known, by root. -1: a channel that the forward makes, and may be any."""

    def same(self, axis: Axis, other: Axis) -> Axis:
        if axis is None or other is None:
            return axis if other is None else other
        if axis.shape != other.shape or not _equal(axis, other):
            raise _Unlike("channels meet that are not the same ones")
        return axis

    def new(self, size: int) -> Tensor:
        return torch.full((size,), -1)

    def pin(self, axis: Axis) -> None:
        pass


class _Unlike(Exception):
    pass


def _equal(axis: Tensor, other: Tensor) -> bool:
    return bool(((axis == other) | (axis == -1) | (other == -1)).all())


class Rereading(Recorder):  # type: ignore[no-untyped-call]
    """Reads a copy's forward pass by the same rules, and raises Disagreement at the first op whose channels differ.

    nodes: the network's; live: bool, by number.
    """

    def __init__(self, nodes: list[Node], roots: Tensor, live: Tensor) -> None:
        super().__init__(_Settled(), self._rule)
        self._expected, self._roots, self._live = nodes, roots, live

    def axes(self, axes: list[Axis]) -> list[Axis]:
        """What stays of axes, by root."""
        return [None if axis is None else self._roots[axis][self._live[axis]] for axis in axes]

    def _rule(self, call: Call) -> Rule:
        place = len(self.nodes)
        if place >= len(self._expected) or self._expected[place].name != call.name:
            raise Disagreement(place, f"{call.name} takes place that is not in the network's forward")
        node = self._expected[place]
        if node.numbers != call.numbers:
            raise Disagreement(place, f"{call.name} takes {call.numbers} for {node.numbers}")

        def checked(call: Call) -> list[Value]:
            try:
                found = rule_of(call)(call)
            except _Unlike as error:
                raise Disagreement(place, f"{call.name}: {error}") from error
            values = [found] if isinstance(found, Value) else found
            for tensor, value, axes, shape in zip(
                call.results, values, node.outputs, node.shapes, strict=True
            ):
                expected = self.axes(axes)
                for d, (ours, theirs) in enumerate(zip(value.axes, expected, strict=True)):
                    size = shape[d] if theirs is None else len(theirs)
                    if tensor.shape[d] != size:
                        raise Disagreement(place, f"{call.name} has {tensor.shape[d]} channels for {size}")
                    if ours is not None and theirs is not None and not _equal(ours, theirs):
                        raise Disagreement(place, f"{call.name} takes other channels")
                value.axes = expected
            return values

        return checked

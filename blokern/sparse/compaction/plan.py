"""What goes of a network, found by reading it and then reading its copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from blokern.sparse.compaction.channels import Axis, Channels, Product
from blokern.sparse.compaction.comparison import check_outputs
from blokern.sparse.compaction.cut import copied, cut
from blokern.sparse.compaction.record import (
    Node,
    Recorder,
    Refusal,
    Value,
    record,
    said,
    tensors_in,
    undisturbed,
)
from blokern.sparse.compaction.rules import rule_of
from blokern.sparse.compaction.witness import Disagreement, Rereading

__all__ = ["ForwardFails", "Plan", "find_plan"]

ModelT = TypeVar("ModelT", bound=nn.Module)

# How often a copy's forward may disagree before all ops of the kind that did are left as they are, not that op alone.
_PATIENCE = 8


class ForwardFails(Refusal):
    """The network does not run on the example."""


@dataclass
class Plan:
    """axes: by parameter's and buffer's name. live: bool, by number, which channels stay. eps: of the coarsest numbers
    that the network computes in. compared: whether a copy's outputs were; not those of a network that draws numbers."""

    axes: dict[str, list[Axis]]
    live: Tensor
    products: list[Product]
    eps: float
    compared: bool = False

    def carried_out(self, dense: ModelT) -> ModelT:
        """A copy of the network without what goes."""
        return cut(dense, self.axes, self.live, self.products)


def find_plan(dense: nn.Module, kept: Mapping[str, Tensor], example: tuple[Any, ...]) -> Plan:
    """What can go of a network without masked layers. kept: bool, which weights count, by parameter name.

    The forward of a copy may say otherwise than expected, for it has sizes as numbers: then what the op touches that
    said so stays, and another copy is made. Its outputs are compared then. Raises Refusal for what cannot be read.
    """
    network = _Network(dense, kept, example)
    patience = _PATIENCE
    while True:
        plan = Plan(network.axes, network.channels.live(), network.channels.products, network.eps)
        small = plan.carried_out(dense)
        if plan.live.all() or (wrong := network.disagreement(small, plan)) is None:
            plan.compared = check_outputs(network.scratch, small, example, plan.eps)
            return plan
        own, error = wrong
        patience -= 1
        if not network.keep(own, error.place, plan.live, all_alike=patience < 0):
            raise Refusal(f"without the channels that could go, its forward fails: {error.why}")


class _Network:
    """A network as it was read, in both modes: the one that it is in, and the other, which must work too."""

    def __init__(self, dense: nn.Module, kept: Mapping[str, Tensor], example: tuple[Any, ...]) -> None:
        self.scratch, self._example = copied(dense), example
        tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
        self.channels = Channels()
        self.axes: dict[str, list[Axis]] = {
            name: [self.channels.new(size) for size in t.shape] for name, t in tensors.items()
        }
        own = self._read(True, kept)
        self._passes: dict[bool, list[Node]] = {True: own.nodes}
        self.channels.products += own.products
        self.eps = own.eps
        used = set(own.uses)
        try:
            other = self._read(False, kept)
        except ForwardFails as error:
            unused = next((name for name in dict(dense.named_parameters()) if name not in used), None)
            if unused is not None:
                mode = "eval" if dense.training else "train"
                raise Refusal(
                    f"in {mode} mode, which may use {unused!r}, {error}; give an example that both modes take, such "
                    "as two samples or more, and larger ones"
                ) from error
        else:
            self._passes[False] = other.nodes
            self._add_products(other, used)
            used |= set(other.uses)
        for name in self.axes.keys() - used:
            for axis in self.axes[name]:
                self.channels.pin(axis)

    def _add_products(self, other: Recorder, used: set[str]) -> None:
        """Those of layers that only the other mode uses. What the others read is for the own mode to say."""
        for product in other.products:
            if product.weight_name is None:  # it may be the same layer's
                product.bias_name, product.movable = None, False
            if product.weight_name not in used:
                self.channels.products.append(product)

    def _read(self, own: bool, kept: Mapping[str, Tensor]) -> Recorder:
        recorder = Recorder(self.channels, rule_of)
        try:
            out = self._run(self.scratch, recorder, own, self.axes, kept)
        except Refusal:
            raise
        except Exception as error:
            raise ForwardFails(f"its forward fails on the example: {said(error)}") from error
        for tensor in out:
            for axis in recorder.value(tensor).axes:
                self.channels.pin(axis)
        return recorder

    def _run(
        self,
        model: nn.Module,
        recorder: Recorder,
        own: bool,
        axes: Mapping[str, list[Axis]],
        kept: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Run the model under the recorder; returns the outputs' tensors."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            recorder.give(tensor, Value(axes[name], known=True, name=name, kept=kept.get(name)))
        with undisturbed(model):
            if not own:
                model.train(not model.training)
            out = list(tensors_in(record(recorder, model, self._example)))
        if not out:
            raise Refusal("its forward returns no tensors, alone or in tuples, lists, dicts or objects")
        return out

    def disagreement(self, small: nn.Module, plan: Plan) -> tuple[bool, Disagreement] | None:
        """Where a copy's forward is not that of the network without what goes, and whether in the own mode."""
        roots = self.channels.roots()
        for own, nodes in self._passes.items():
            witness = Rereading(nodes, roots, plan.live)
            axes = {name: witness.axes(whole) for name, whole in self.axes.items()}
            try:
                self._run(small, witness, own, axes, {})
            except Disagreement as error:
                return own, error
            except Exception as error:
                return own, Disagreement(len(witness.nodes), said(error))
            if len(witness.nodes) != len(nodes):
                return own, Disagreement(len(witness.nodes), "it ends early")
        return None

    def keep(self, own: bool, place: int, live: Tensor, *, all_alike: bool) -> bool:
        """Let what an op touches stay or, if it all does, what the last op before it touches; False: all stays."""
        nodes = self._passes[own]
        for node in reversed(nodes[: place + 1]):
            if all(live[axis].all() for axis in _axes(node)):
                continue
            for other in nodes if all_alike else [node]:
                if other.name == node.name:
                    for axis in _axes(other):
                        self.channels.pin(axis)
            return True
        return False


def _axes(node: Node) -> list[Tensor]:
    return [axis for axes in (*node.outputs, *node.inputs) for axis in axes if axis is not None]

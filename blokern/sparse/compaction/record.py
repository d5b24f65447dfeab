"""One forward pass, read op by op.

The pass runs on real tensors under a dispatch mode, below autograd and whatever Python does: each op is elementary, and
control flow, hooks, parametrizations and shared modules are what they do. An axis belongs to a place in memory, so that
a view and its base, and what an op in place has left of the old value, have the same channels; what was constant is
forgotten wherever memory is written through another view.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from blokern.sparse.compaction.channels import Axis, Channels, Product

__all__ = [
    "Call",
    "Node",
    "Recorder",
    "Refusal",
    "Rule",
    "Value",
    "record",
    "said",
    "tensors_in",
    "undisturbed",
]


class Refusal(ValueError):
    """Why a network cannot be read."""


@dataclass(eq=False)
class Value:
    """What is known of a tensor.

    axes: one a dimension. constant: float64, along dimension `dim`, NaN where the tensor is not the same number
    everywhere; None where it is nowhere. known: it depends on no input of the network. name: it is this parameter or
    buffer, up to its shape. kept: the parameter's mask, in its shape. blank: nothing has been written to it.
    """

    axes: list[Axis]
    dim: int | None = None
    constant: Tensor | None = None
    known: bool = False
    name: str | None = None
    kept: Tensor | None = None
    blank: bool = False

    def along(self, dim: int, size: int) -> Tensor:
        """The constants of a dimension's channels, float64 [size]."""
        if self.constant is None or self.dim != dim:
            return torch.full((size,), torch.nan, dtype=torch.float64)
        return self.constant


@dataclass(eq=False)
class Node:
    """An op that ran: its name, its numbers if they count for what they are, the shapes and axes of its results and the
    axes of what it read."""

    name: str
    numbers: list[Any]
    shapes: list[tuple[int, ...]]
    outputs: list[list[Axis]]
    inputs: list[list[Axis]]


Rule = Callable[["Call"], "Value | list[Value]"]


class Call:
    """An op's call: arguments by their names in the schema, tensors with what is known of them, and results."""

    def __init__(
        self, recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func.overloadpacket.__name__
        self.channels = recorder.channels
        self._recorder = recorder
        self._arguments = {
            a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
            for i, a in enumerate(func._schema.arguments)
        }
        self.written = list(
            tensors_in(
                [
                    self._arguments[a.name]
                    for a in func._schema.arguments
                    if a.alias_info is not None and a.alias_info.is_write
                ]
            )
        )
        self.operands: list[Tensor] = list(tensors_in([args, dict(kwargs)]))
        self.shapes = [tuple(tensor.shape) for tensor in self.operands]  # before the op, which may change one
        self.values = [recorder.value(tensor) for tensor in self.operands]
        self.known = all(value.known for value in self.values)
        self.results: list[Tensor] = []

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._arguments.get(name, default)

    def value(self, name: str) -> Value | None:
        tensor = self._arguments.get(name)
        return self._recorder.value(tensor) if isinstance(tensor, Tensor) else None

    @property
    def first(self) -> Value:
        return self.values[0]

    @property
    def result(self) -> Tensor:
        return self.results[0]

    @property
    def numbers(self) -> list[Any]:
        """The arguments that are numbers, of an op to which they are values and not sizes or places."""
        if torch.Tag.pointwise not in self.func.tags and self.name.removeprefix("new_") not in (
            "full",
            "fill_",
        ):
            return []
        return [argument for argument in self._arguments.values() if isinstance(argument, (int, float))]

    def note(self, product: Product) -> None:
        """Say that the op is this product."""
        self._recorder.products.append(product)

    def pin_all(self) -> None:
        for value in self.values:
            for axis in value.axes:
                self.channels.pin(axis)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reads the ops that run under it by a rule each; `rules` finds it."""

    def __init__(self, channels: Channels, rules: Callable[[Call], Rule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channels = channels
        self.nodes: list[Node] = []
        self.products: list[Product] = []
        self.uses: dict[str, int] = {}
        self.eps = 0.0  # of the coarsest numbers that ops have returned
        self._rules = rules
        self._values: Any = WeakIdKeyDictionary()
        self._memory: dict[int, list[weakref.ref[Tensor]]] = {}

    def give(self, tensor: Tensor, value: Value) -> None:
        """Say what is known of a tensor."""
        self._values[tensor] = dataclasses.replace(value)  # which writes may change
        self.channels.note(value.axes)
        sharing = self._memory.setdefault(tensor.untyped_storage()._cdata, [])
        sharing[:] = [ref for ref in sharing if ref() is not None and ref() is not tensor]
        sharing.append(weakref.ref(tensor))

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; of one that no op has made, that it is a constant."""
        value: Value | None = self._values.get(tensor)
        if value is None:
            value = Value([None] * tensor.dim(), known=True)
            for other in self._sharing(tensor):  # such as x.data
                theirs = self._values[other]
                if _same_view(tensor, other):
                    value = theirs
                    break
                for axis in theirs.axes:
                    self.channels.pin(axis)
                value.known = value.known and theirs.known
            self.give(tensor, value)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = Call(self, func, args, kwargs or {})
        if torch.Tag.data_dependent_output in func.tags and not call.known:
            raise Refusal(
                f"its forward reads a number from a tensor that depends on the input ({func}, as in `if tensor:` "
                "or `tensor.item()`), so that other inputs may take another way"
            )
        inputs = [list(value.axes) for value in call.values]
        for value in call.values:
            if value.name is not None:
                self.uses[value.name] = self.uses.get(value.name, 0) + 1
        out = func(*args, **(kwargs or {}))
        call.results = list(tensors_in([out]))
        found = self._rules(call)(call)
        moved = torch.Tag.inplace_view in func.tags  # such as squeeze_: the same memory in another shape
        for tensor, value in zip(call.results, [found] if isinstance(found, Value) else found, strict=True):
            if not moved and _among(tensor, call.written):
                self._write(tensor, value)
            else:
                self.give(tensor, value)
        for tensor in call.written:
            if not _among(tensor, call.results):  # such as those of torch._foreach_add_
                self._write(tensor, Value(self.value(tensor).axes, known=call.known))
        self._node(call, inputs)
        return out

    def _node(self, call: Call, inputs: list[list[Axis]]) -> None:
        shapes = [tuple(tensor.shape) for tensor in call.results]
        axes = [self.value(tensor).axes for tensor in call.results]
        for tensor in call.results:
            if tensor.is_floating_point():
                self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        self.nodes.append(Node(call.name, call.numbers, shapes, axes, inputs))

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """The other tensors in the same memory."""
        sharing = self._memory.get(tensor.untyped_storage()._cdata, ())
        return [other for ref in sharing if (other := ref()) is not None and other is not tensor]

    def _write(self, tensor: Tensor, value: Value) -> None:
        """Let a tensor that was written to, and what shares its memory, be as the op has left it."""
        old = self.value(tensor)
        for ours, theirs in zip(old.axes, value.axes, strict=True):
            self.channels.same(ours, theirs)
        for other in self._sharing(tensor):
            known = self._values[other]
            if known is old or _same_view(tensor, other):
                continue
            known.constant = _after(known, old, value)
            known.dim, known.blank = value.dim, False
            known.known = known.known and value.known
            known.name = known.kept = None
        for same in (old, *(self._values[o] for o in self._sharing(tensor) if _same_view(tensor, o))):
            same.dim, same.constant, same.known = value.dim, value.constant, value.known
            same.name, same.kept, same.blank = None, None, False


def _among(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def _same_view(tensor: Tensor, other: Tensor) -> bool:
    return (
        tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.storage_offset() == other.storage_offset()
        and tensor.dtype == other.dtype
    )


def _after(other: Value, view: Value, written: Value) -> Tensor | None:
    """What is constant of a tensor some of whose memory, a view, was written."""
    dim = written.dim
    if dim is None or written.constant is None or len(other.axes) != len(view.axes):
        return None
    ours, theirs = other.axes[dim], view.axes[dim]
    if ours is None or theirs is None or not ours.equal(theirs):
        return None
    if other.blank:
        return written.constant
    if other.dim != dim or other.constant is None:
        return None
    return other.constant.where(other.constant == written.constant, torch.nan)


class _Unseen(TorchFunctionMode):
    """Refuses what takes values out of torch where the dispatcher does not see it."""

    _NAMES = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._NAMES and isinstance(args[0], Tensor) and not self._recorder.value(args[0]).known:
            raise Refusal(
                f"its forward takes values that depend on the input out of torch, by Tensor.{name}, where what is "
                "done to them is not seen"
            )
        return func(*args, **(kwargs or {}))


def record(recorder: Recorder, model: nn.Module, example: tuple[Any, ...]) -> Any:
    """Run the model on the example under the recorder."""
    arguments = pytree.tree_map_only(Tensor, Tensor.clone, example)  # which the forward may change
    for tensor in tensors_in(arguments):
        recorder.give(tensor, Value([None] * tensor.dim()))
    with undisturbed(model), _Unseen(recorder), recorder:
        out = model(*arguments)
    for product in recorder.products:
        product.movable = product.bias_name is not None and recorder.uses[product.bias_name] == 1
    return out


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without derivatives, and with the buffers, modes and random generators of before, after."""
    buffers = [
        (m, key, b, b.clone()) for m in model.modules() for key, b in m._buffers.items() if b is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            yield
        finally:
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer.copy_(before)
            for module, mode in modes:
                module.training = mode


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and objects with attributes."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from tensors_in(part)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield from tensors_in(vars(tree))


def said(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]

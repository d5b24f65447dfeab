"""Recording a forward pass as a tape of ops.

The model runs as it is, once, and autograd records it as ever; below autograd, where every op arrives in its elementary
form, a dispatch mode writes the tape. Python has run by then: hooks, control flow, tied weights and whatever a module
does need no care. Autograd is the witness of what is differentiable, and of what comes from what. A tensor that
requires grad must be known to the tape as the result of an op with rules, and have the node in autograd's graph that
this very op got; one that has not (of an op outside the table, of a custom autograd.Function, of a view whose base was
changed in place) refuses the tape, and autograd's graph of this same pass is used instead. A tensor that does not
require grad is a constant, however it was made: detached, or under no_grad.

What an op reads is what it was when the op ran: before memory is written, what ops have saved of it is copied, and
before a tensor becomes another view of memory they get an alias of what it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blokern.curvature.op import Call, Meta, Op
from blokern.curvature.rules import RULES
from blokern.curvature.tape import Tape
from blokern.ops.masked_weight import GradientMask

__all__ = ["Recorder"]

aten = torch.ops.aten


class _ByTensor:
    """What is known of tensors, which it keeps alive as little as torch's WeakTensorKeyDictionary does; in a tenth of
    its time, as keys are only ever looked up by tensors at hand. A tensor is the key, not its storage."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int | str]] = {}

    def get(self, t: Tensor) -> int | str | None:
        entry = self._entries.get(id(t))  # or a dead tensor's with the same id
        return entry[1] if entry is not None and entry[0]() is t else None

    def __setitem__(self, t: Tensor, known: int | str) -> None:
        self._entries[id(t)] = weakref.ref(t), known

    def tensors(self) -> list[Tensor]:
        """Those that are alive."""
        found = [t for ref, _ in self._entries.values() if (t := ref()) is not None]
        for t in found:
            if hasattr(t, "_fix_weakref"):  # autograd may have been the only one to hold it: torch.utils.weak
                t._fix_weakref()
        return found


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes the tape of what runs inside it. `refusal` says why there can be none, None while there can."""

    def __init__(self, parameters: dict[str, Tensor], x: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self._ops: list[Op] = []
        # A tensor's value, or why it has none. A view is a value of its own.
        self._values = _ByTensor()
        # Which ops have saved a tensor of a storage, and in which place.
        self._savers: dict[int, list[tuple[Op, int]]] = {}
        # Of each value: the number of its node in autograd's graph, None for a leaf, and what it looks like.
        self._origins: list[tuple[int | None, Meta]] = []
        # The node of the last clone.
        self._clone = -1
        # Values of views that were changed in place.
        self._written_views: set[int] = set()
        # Values of our own ops inside a Function: torch.library's, which the witness has to confirm.
        self._own: set[int] = set()
        self._parameters = {
            name: self._new_value(p, None, Meta(p.shape, p.dtype)) for name, p in parameters.items()
        }
        self._x = None if x is None else self._new_value(x, None, Meta(x.shape, x.dtype))
        for name, p in parameters.items():
            if _is_hooked(p):
                self.refuse(f"a hook on the gradient of {name}")
        # A masked layer's weight: masked products have the derivatives that its hook makes, others have not.
        self._masked = {self._parameters[name] for name, p in parameters.items() if p._backward_hooks}

    def refuse(self, why: str) -> None:
        """Give up the tape, for the first reason given, and free what it holds."""
        if self.refusal is None:
            self.refusal = why
            self._ops.clear()
            self._savers.clear()

    def mask(self, p: Tensor) -> None:
        """The parameter's gradient is masked from now on."""
        value = self._values.get(p)
        if isinstance(value, int):
            self._masked.add(value)

    def mark(self) -> int:
        """A place on the tape: how many ops it has."""
        return len(self._ops)

    def value(self, t: Tensor) -> int | None:
        """The value that a tensor stands for, None for a constant; refuses the tape if t is neither."""
        if not t.requires_grad:
            return None
        value, node = self._values.get(t), t.grad_fn
        if isinstance(value, int):
            self._confirm(value, t, node)
            return value
        if value is not None:
            self.refuse(value)
        elif node is not None:  # a leaf that is not known is somebody else's parameter: a constant here
            self.refuse(node.name())
        return None

    def _confirm(self, value: int, t: Tensor, node: Any) -> None:
        """Refuse the tape unless t is still what it was, and what the op on the tape made of its arguments."""
        number, meta = self._origins[value]
        if value in self._written_views and node is not None:
            node = node.next_functions[0][0]
        if number != (None if node is None else node._sequence_nr()):
            self.refuse(str(node and node.name()))
        elif meta.shape != t.shape or meta.dtype != t.dtype:
            self.refuse(f"a tensor of shape {tuple(meta.shape)} that became one of {tuple(t.shape)} unseen")
        elif value in self._own and "_blokern_" not in node.name():
            self.refuse(node.name())

    def finish(self, split: int, loss: Tensor, outputs: Sequence[int | None]) -> Tape | None:
        """The tape from leaves to loss, None if it was refused."""
        loss_value = self.value(loss)
        if self.refusal is not None:
            return None
        known = [value for value in outputs if value is not None]
        return Tape(self._ops, split, (loss_value, loss.detach()), known, self._parameters, self._x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.refusal is not None:
            return func(*args, **kwargs)
        if _mutable_arguments(func):
            return self._in_place(func, args, kwargs)
        out = func(*args, **kwargs)
        if _recorded(func):
            self._record(Call(func, args, kwargs, out))
        return out

    def _record(self, call: Call) -> None:
        """Put an op with a differentiable argument on the tape."""
        given = _tensors((*call.args, *call.kwargs.values()))
        if not _differentiable(given):
            return
        outs = [out for out in _tensors((call.out,)) if out.is_floating_point()]
        if not outs:
            return
        rule = RULES.get(call.func)
        dense = all(map(_is_dense, given))  # as the rules are
        made = rule(call) if rule is not None and dense else None
        if made is None:
            for out in outs:
                self._values[out] = f"{call.func}{'' if dense else ' of sparse tensors'}"
            return
        ops = [made] if isinstance(made, Op) else made
        for op, out in zip(ops, outs, strict=False):
            if self._connect(op, call, given):
                self._push(op, out, _last_node())
        if call.func is aten.clone.default:
            self._clone = _last_node()

    def _connect(self, op: Op, call: Call, given: Sequence[Tensor]) -> bool:
        """Find the op's inputs; False, and the tape refused, if its rules lack a derivative that is wanted.

        given: the call's tensors.
        """
        slots = op.slots(call.args)
        op.inputs = tuple(self.value(a) if isinstance(a, Tensor) else None for a in slots)
        if call.func.namespace != "blokern" and not self._masked.isdisjoint(op.inputs):
            self.refuse("a masked layer's weight that another module reads")
        known = range(len(slots)) if op.differentiable is None else op.differentiable
        differentiable = {id(slots[slot]) for slot in known if slot < len(slots)}
        for t in given:
            if id(t) not in differentiable and self.value(t) is not None:
                self.refuse(
                    f"{call.func} with a derivative by an argument that its rules take for a constant"
                )
        if self.refusal is None:
            op.settle()
        return self.refusal is None

    def _push(self, op: Op, out: Tensor, node: int) -> None:
        op.output = self._new_value(out, node, op.meta)
        if not torch.is_grad_enabled():
            self._own.add(op.output)
        self._ops.append(op)
        for place, t in enumerate(op.saved):
            self._savers.setdefault(_storage(t), []).append((op, place))

    def _new_value(self, t: Tensor, number: int | None, meta: Meta) -> int:
        value = len(self._origins)
        self._values[t] = value
        self._origins.append((number, meta))
        return value

    def _in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op in place is its out-of-place twin, after which the tensor stands for another value.

        Tensors that ops have saved of the memory at hand are copied first; other tensors that see it have lost their
        values. The twin's rules get the old value as an alias, copied if they save it. An op that changes how a tensor
        sees its memory, and not what is there, needs no copies.
        """
        written = _tensors([_argument(args, kwargs, where) for where in _mutable_arguments(func)])
        target = args[0] if args else None
        op, given = None, _tensors((*args, *kwargs.values()))
        if _recorded(func) and len(written) == 1 and written[0] is target and _differentiable(given):
            op = self._twin(func, args, kwargs, written[0])
        if op is not None and self._connect(op, Call(func, args, kwargs, target), given):
            for place, t in enumerate(op.saved):
                if t is not target and _storage(t) == _storage(written[0]):
                    op.saved[place] = t.clone()
        for t in written:
            if _changes_view(func):
                self.preserve(t)
            else:
                self._before_write(t)
            if op is None and (torch.is_grad_enabled() or _changes_view(func)):
                self._values[t] = str(func)
        if op is not None:
            last = _last_node()
            if written[0]._is_view() and not _changes_view(func):
                # Autograd writes it into the base, by a node to come, and takes the view from there anew.
                self._push(op, written[0], last + 1)
                self._written_views.add(op.output)
            else:
                # Where autograd needs the old value, it clones that when the op has its node already.
                self._push(op, written[0], last - 1 if last == self._clone else last)
        return func(*args, **kwargs)

    def _twin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor) -> Op | None:
        """The op in place as one out of place, its old value an alias of the target and its result the target."""
        twin = _out_of_place(func)
        rule = RULES.get(twin)
        if rule is None:
            return None
        old = target.detach()
        given = tuple(old if a is target else a for a in args)
        # Of a view, only the twin's result tells its shape.
        out = twin(*given, **kwargs) if _changes_view(func) else target
        made = rule(Call(twin, given, kwargs, out))
        return made if isinstance(made, Op) else None

    def preserve(self, t: Tensor) -> None:
        """Called before t comes to see other memory, or the same otherwise: ops that saved t keep what it was."""
        for op, place in self._savers.get(_storage(t), ()):
            if op.saved[place] is t:
                op.saved[place] = _alias(t)

    def _before_write(self, t: Tensor) -> None:
        storage = _storage(t)
        for op, place in self._savers.pop(storage, ()):
            op.saved[place] = op.saved[place].clone()
        for other in self._values.tensors():
            # A leaf stays one, with new values: a parameter that its module clamps by `.data`, or under no_grad.
            leaf = other.is_leaf and other.requires_grad
            if other is not t and not leaf and _storage(other) == storage:
                self._values[other] = "a change in place of a tensor with views"


def _last_node() -> int:
    """The number of the node that autograd made last: that of the op which now arrives, whose result will get it."""
    return torch._C._autograd._get_sequence_nr() - 1


def _is_hooked(p: Tensor) -> bool:
    """Whether somebody but a masked layer changes the gradient of a parameter, which only autograd would ask."""
    return not all(isinstance(hook, GradientMask) for hook in (p._backward_hooks or {}).values())


def _alias(t: Tensor) -> Tensor:
    """t as it is now, with its version counter: `detach`, which below autograd has one of its own."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return t.detach()


def _recorded(func: Any) -> bool:
    """Whether autograd takes note of what runs now.

    Not under no_grad, nor inside a custom Function. Our own ops' derivatives are such a Function, made by
    torch.library, whose forward is the op itself.
    """
    return torch.is_grad_enabled() or func.namespace == "blokern"


def _differentiable(tensors: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


def _is_dense(t: Tensor) -> bool:
    return t.layout is torch.strided


def _storage(t: Tensor) -> int:
    """Which memory it is; sparse tensors have several, and pass for one."""
    storage: int = t.untyped_storage()._cdata if _is_dense(t) else 0
    return storage


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested arguments."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    found: list[Tensor] = []
    for item in tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list | dict):
            found += _tensors(item)
    return found


@cache
def _mutable_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an op writes."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: tuple[int, str]) -> Any:
    place, name = where
    return args[place] if place < len(args) else kwargs.get(name)


@cache
def _changes_view(func: Any) -> bool:
    """Whether an op in place changes what a tensor sees of memory, instead of the memory."""
    return torch.Tag.inplace_view in func.tags


@cache
def _out_of_place(func: Any) -> Any:
    """relu for relu_; None where there is no such op."""
    if func is aten.transpose_.default:
        return aten.transpose.int
    namespace, name = func._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None)

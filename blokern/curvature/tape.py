"""Recording a forward pass as a tape of ops.

The model runs as it is, once, and autograd records it as ever; below autograd, where every op arrives in its elementary
form, a dispatch mode writes the tape. Python has run by then: hooks, control flow, tied weights and whatever a module
does need no care. Autograd is the witness of what is differentiable. A tensor that requires grad must be known to the
tape as the result of an op with rules; one that is not (of an op outside the table, of a custom autograd.Function, of
a view whose base was changed in place) refuses the tape, and autograd's graph of this same pass is used instead. A
tensor that does not require grad is a constant, however it was made: detached, or under no_grad.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blokern.curvature.op import Call, Op
from blokern.curvature.rules import RULES

__all__ = ["INPUT", "PARAMETER", "Recorder", "Tape"]

aten = torch.ops.aten

#: What a value depends on, as bits.
PARAMETER, INPUT = 1, 2


class Tape:
    """A scalar loss as a list of ops, each with its saved tensors, of which none is idle: all reach the loss.

    Values are numbered; those of `parameters` (name to value; of the ones that the loss depends on) and `x` are the
    leaves. ops[:split] are the model's, the rest the loss function's, and `outputs` the values between.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        split: int,
        loss: tuple[int | None, Tensor],
        outputs: Iterable[int],
        parameters: dict[str, int],
        x: int | None,
    ) -> None:
        self.loss, self.loss_value = loss
        needed = {self.loss}
        for op in reversed(ops):
            if op.output in needed:
                needed.update(op.inputs)
        self.outputs = [value for value in outputs if value in needed]
        self.parameters = {name: value for name, value in parameters.items() if value in needed}
        self.x = x if x in needed else None
        live = [op for op in ops if op.output in needed]
        reads = Counter([*self.outputs, *(value for op in live for value in op.inputs)])
        model = _fused([op for op in ops[:split] if op.output in needed], reads)
        self.ops = model + _fused([op for op in ops[split:] if op.output in needed], reads)
        self.split = len(model)
        #: Of each value, what it depends on.
        self.depends: dict[int, int] = dict.fromkeys(parameters.values(), PARAMETER)
        if x is not None:
            self.depends[x] = INPUT
        #: The values that a curved op lies before: products read their adjoints, or need them on the way.
        self.bent: set[int] = set()
        #: The values that curved ops read: products read their tangents.
        self.read: set[int] = set()
        #: The values whose adjoints come from sweeps: worth keeping between products. The others' are recomputed.
        self.swept: set[int] = set()
        #: Of each op, the values that no later one reads.
        self.last: list[list[int]] = []
        for op in self.ops:
            inputs = [value for value in op.inputs if value is not None]
            bits = 0
            for value in inputs:
                bits |= self.depends[value]
            self.depends[op.output] = bits
            if op.curved or not self.bent.isdisjoint(inputs):
                self.bent.add(op.output)
            if op.curved:
                self.read.update(inputs)
            if op.sweeps:
                self.swept.update(self.bent.intersection(inputs))
            # Off the graph, which lives no longer, but with its version counter.
            op.saved = [t.detach() for t in op.saved]
        seen: set[int] = set()
        for op in reversed(self.ops):
            read = {value for value in op.inputs if value is not None}
            self.last.append([*(read - seen)])
            seen |= read
        self.last.reverse()
        self._versions = [[t._version for t in op.saved] for op in self.ops]

    def check_unchanged(self) -> None:
        """RuntimeError if a tensor that the rules read was changed in place since."""
        for op, versions in zip(self.ops, self._versions, strict=True):
            for t, version in zip(op.saved, versions, strict=False):
                if t._version != version:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(t.shape)} that {op.func} read or made was changed in place since "
                        "the forward pass (a parameter, by an optimizer's step?): linearize again"
                    )


def _fused(ops: Sequence[Op], reads: Counter[int | None]) -> list[Op]:
    """The ops, with one for two where there is such a one and nobody else reads what lies between."""
    made: dict[int | None, Op] = {}
    for op in ops:
        for slot, between in enumerate(op.inputs):
            alone = between in made and reads[between] == 1
            both = made[between].followed_by(op, slot) if alone else None
            if both is not None:
                inputs = (*op.inputs[:slot], *made.pop(between).inputs, *op.inputs[slot + 1 :])
                both.inputs, both.output = inputs, op.output
                op = both
                break
        made[op.output] = op
    return [*made.values()]


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
        # Values of our own ops inside a Function: torch.library's, which the witness has to confirm.
        self._own: set[int] = set()
        self._count = 0
        self._parameters = {name: self._new_value(p) for name, p in parameters.items()}
        self._x = None if x is None else self._new_value(x)
        for name, p in parameters.items():
            if p._backward_hooks:
                self.refuse(f"a hook on the gradient of {name}")

    def refuse(self, why: str) -> None:
        """Give up the tape, for the first reason given, and free what it holds."""
        if self.refusal is None:
            self.refusal = why
            self._ops.clear()
            self._savers.clear()

    def mark(self) -> int:
        """A place on the tape: how many ops it has."""
        return len(self._ops)

    def value(self, t: Tensor) -> int | None:
        """The value that a tensor stands for, None for a constant; refuses the tape if t is neither."""
        if not t.requires_grad:
            return None
        value = self._values.get(t)
        if isinstance(value, int):
            if value in self._own and "_blokern_" not in t.grad_fn.name():  # type: ignore[union-attr]
                self.refuse(t.grad_fn.name())  # type: ignore[union-attr]
            return value
        if not t.is_leaf:  # a leaf is somebody else's parameter: a constant here
            self.refuse(value or str(t.grad_fn and t.grad_fn.name()))
        return None

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
        made = None if rule is None else rule(call)
        if made is None:
            for out in outs:
                self._values[out] = str(call.func)
            return
        ops = [made] if isinstance(made, Op) else made
        for op, out in zip(ops, outs, strict=False):
            if self._connect(op, call, given):
                self._push(op, out)

    def _connect(self, op: Op, call: Call, given: Sequence[Tensor]) -> bool:
        """Find the op's inputs; False, and the tape refused, if its rules lack a derivative that is wanted.

        given: the call's tensors.
        """
        slots = op.slots(call.args)
        op.inputs = tuple(self.value(a) if isinstance(a, Tensor) else None for a in slots)
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

    def _push(self, op: Op, out: Tensor) -> None:
        op.output = self._new_value(out)
        if not torch.is_grad_enabled():
            self._own.add(op.output)
        self._ops.append(op)
        for place, t in enumerate(op.saved):
            self._savers.setdefault(_storage(t), []).append((op, place))

    def _new_value(self, t: Tensor) -> int:
        self._values[t] = self._count
        self._count += 1
        return self._count - 1

    def _in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op in place is its out-of-place twin, after which the tensor stands for another value.

        Tensors that ops have saved of the memory at hand are copied first; other tensors that see it have lost their
        values. The twin's rules get the old value as an alias, copied if they save it.
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
            self._before_write(t)
            if op is None and torch.is_grad_enabled():
                self._values[t] = str(func)
        if op is not None:
            self._push(op, written[0])
        return func(*args, **kwargs)

    def _twin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor) -> Op | None:
        """The op in place as one out of place, its old value an alias of the target and its result the target."""
        twin = _out_of_place(func)
        rule = RULES.get(twin)
        if rule is None:
            return None
        old = target.detach()
        made = rule(Call(twin, tuple(old if a is target else a for a in args), kwargs, target))
        return made if isinstance(made, Op) else None

    def _before_write(self, t: Tensor) -> None:
        storage = _storage(t)
        for op, place in self._savers.pop(storage, ()):
            op.saved[place] = op.saved[place].clone()
        for other in self._values.tensors():
            if other is not t and _storage(other) == storage:
                self._values[other] = "a change in place of a tensor with views"


class HookWatch(TorchFunctionMode):
    """Refuses the tape where the model hooks the gradient of an activation, which only autograd would call."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.register_hook:
            self._refuse("a hook on the gradient of an activation")
        return func(*args, **(kwargs or {}))


def _recorded(func: Any) -> bool:
    """Whether autograd takes note of what runs now.

    Not under no_grad, nor inside a custom Function. Our own ops' derivatives are such a Function, made by
    torch.library, whose forward is the op itself.
    """
    return torch.is_grad_enabled() or func.namespace == "blokern"


def _differentiable(tensors: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


def _storage(t: Tensor) -> int:
    storage: int = t.untyped_storage()._cdata
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
def _out_of_place(func: Any) -> Any:
    """relu for relu_; None where there is no such op."""
    namespace, name = func._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, func._overloadname, None)

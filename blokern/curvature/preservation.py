"""Forward passes that leave no trace: in a model's state, and in torch's random numbers."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import eq, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Held", "ModelState", "RandomState"]

#: Containers whose entries are restored.
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})
#: What most attributes are.
_ATOMS = frozenset({bool, int, float, str, type(None)})
#: Of every module, what holds no tensors whose values are restored.
_NO_TENSORS = frozenset({"_parameters", "_modules", "_non_persistent_buffers_set"})
#: Hooks stay as the model, or its user, leaves them.
_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)


class Held(NamedTuple):
    """An object that a module holds under a name."""

    holder: dict[str, Any]
    name: str
    value: Any

    @property
    def there(self) -> bool:
        """Whether it is that object still."""
        return self.holder.get(self.name) is self.value


class ModelState:
    """What a model's modules hold now, to be put back after forward passes.

    That is every attribute of every module, buffer or not: which object it is, the entries of a list, dict, set or
    deque, and the values of tensors, also of those within such a container or a tuple. So a pass may write buffers,
    assign, register or delete them, let them grow, or count in Python. Nothing is written that did not change, and
    tensors get their versions back with their values, so that graphs that saved them stay good. Not restored: hooks,
    the values of parameters and of tensors that require grad, and what lies in objects of other kinds, or deeper.

    >>> from blokern.curvature.preservation import ModelState
    >>> state = ModelState(model)
    >>> with state.kept():
    ...     loss = F.cross_entropy(model(x), y)
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), vars(module).copy()) for module in model.modules()]
        containers: dict[int, Any] = {}
        tensors: dict[int, Tensor] = {}
        for attributes, _ in self._attributes:
            for name, value in attributes.items():
                kind = type(value)
                if kind in _ATOMS or name in _HOOKS:
                    continue
                if kind in _CONTAINERS:
                    containers[id(value)] = value
                    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
                else:
                    parts = value if kind is tuple else (value,)
                if name not in _NO_TENSORS:
                    for part in parts:
                        if isinstance(part, Tensor):
                            tensors[id(part)] = part
        self._containers = [(container, container.copy()) for container in containers.values()]
        self._values = [_Value(t) for t in tensors.values() if _restorable(t)]
        self._lent: list[tuple[Held, Tensor]] = []

    @contextmanager
    def kept(self, *, lending: bool = False) -> Iterator[None]:
        """Inside, the model may change; afterwards, whatever happened, it is as it was.

        lending: passes work on copies of floating-point buffers and attributes, so that graphs that outlive this own
        what they have read.
        """
        try:
            if lending:
                self._lend()
            yield
        finally:
            for now, before in (*self._attributes, *self._containers):
                _refill(now, before)
            with torch.no_grad():
                for value in self._values:
                    value.restore(version=not lending)

    def constants(self) -> list[Held]:
        """Inside `kept(lending=True)`, after a pass: the buffers that it left alone."""
        return [
            held for held, copy in self._lent if copy._version == 0 and held.holder.get(held.name) is copy
        ]

    def _lend(self) -> None:
        lent = [value for value in self._values if value.tensor.is_floating_point()]
        copies = dict(zip((id(value.tensor) for value in lent), _copies(lent), strict=True))
        self._lent = [
            (Held(holder, name, t), copies[id(t)])
            for attributes, _ in self._attributes
            for holder in (attributes, attributes.get("_buffers", {}))
            for name, t in holder.items()
            if id(t) in copies
        ]
        for held, copy in self._lent:
            held.holder[held.name] = copy


class _Value:
    """A tensor's memory, values and version."""

    def __init__(self, t: Tensor) -> None:
        self.tensor, self.memory, self.version = t, t.detach(), t._version
        self.values = self.memory.clone()

    def restore(self, version: bool) -> None:
        """Put back what has changed; with `version`, as if nothing had been."""
        t = self.tensor
        if t.dtype != self.memory.dtype or t.device != self.memory.device or not t.is_set_to(self.memory):
            t.data = self.memory
        moved = t._version != self.version
        # Some writes leave no version: those of BatchNorm's kernels, and through .data. On a CPU they are looked for,
        # as memory may be read-only; elsewhere that would mean to wait.
        if moved or t.device.type != "cpu" or not torch.equal(self.memory, self.values):
            self.memory.data.copy_(self.values)
        if moved and version:
            torch._C._autograd._unsafe_set_version_counter((t,), (self.version,))


def _copies(values: list[_Value]) -> list[Tensor]:
    """Of each tensor a copy; those of tensors that share memory share one, too."""
    storages = [value.memory.untyped_storage() for value in values]
    sharing = Counter(storage._cdata for storage in storages)
    copied = {s._cdata: s.clone() for s in storages if sharing[s._cdata] > 1}  # type: ignore[no-untyped-call]

    def copy(t: Tensor, storage: int) -> Tensor:
        if storage not in copied:
            return t.clone()
        return t.new_empty(0).set_(copied[storage], t.storage_offset(), t.shape, t.stride())

    return [copy(value.memory, s._cdata) for value, s in zip(values, storages, strict=True)]


def _restorable(t: Tensor) -> bool:
    """Whether a pass can change its values, and they are neither a parameter's nor made of one."""
    return (
        not t.requires_grad
        and not isinstance(t, nn.Parameter)
        and t.layout == torch.strided
        and not t.is_inference()
        and not t.is_meta
        and torch._debug_has_internal_overlap(t) != 1  # one that is expanded cannot be written
    )


def _refill(now: Any, before: Any) -> None:
    """Give a container the entries that it had before, in their order."""
    if not (now or before):
        return
    if len(now) == len(before):
        if isinstance(now, dict):
            if all(map(is_, now.values(), before.values())) and all(map(eq, now, before)):
                return
        elif now == before if isinstance(now, set) else all(map(is_, now, before)):
            return
    now.clear()
    (now.extend if isinstance(now, list | deque) else now.update)(before)


class RandomState:
    """torch's random numbers from one place on, the CPU's and those of devices.

    >>> from blokern.curvature.preservation import RandomState
    >>> state, first = RandomState([]), torch.rand(())
    >>> with state.replayed():
    ...     bool(torch.rand(()) == first)
    True
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = [device for device in {*devices} if device.type not in ("cpu", "meta")]
        self._states = self._now()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, numbers are drawn from that place on; outside, nothing has been drawn."""
        before = self._now()
        self._draw_from(self._states)
        try:
            yield
        finally:
            self._draw_from(before)

    def _now(self) -> list[Tensor]:
        of_devices = [torch.get_device_module(d).get_rng_state(d) for d in self._devices]
        return [torch.random.get_rng_state(), *of_devices]

    def _draw_from(self, states: list[Tensor]) -> None:
        torch.random.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

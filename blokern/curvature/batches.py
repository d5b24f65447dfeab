"""What a batch is, how many samples it has, and its way to a device.

A batch is a pair (x, y). Either is a tensor, or tensors in tuples, lists, mappings of any type and dataclasses, as
models and losses take them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BatchSize", "Batches", "SampleCount", "check_loader", "loss_option", "moved", "pair", "tensors"]

Batches = Iterable[tuple[Any, Any]]
#: x → what a batch weighs in a mean: its samples, tokens, …; or the same of x and y.
BatchSize = Callable[..., float | Tensor]

#: What torch's losses take for "no label".
_IGNORED = -100


def check_loader(loader: Any) -> None:
    """TypeError or ValueError for a loader that cannot be gone through again and again, before it is asked."""
    if isinstance(loader, Iterator):
        raise ValueError(
            "loader must be a list, a DataLoader or the like, got an iterator: good for one product"
        )
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, Tensor | Mapping | str | bytes):
        raise TypeError(
            f"loader must give batches (x, y), such as a list of them, got {type(loader).__name__}"
        )


def pair(batch: Any) -> tuple[Any, Any]:
    """The x and y of a batch; TypeError for anything but a tuple or list of two."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        got = f"{type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing'}"
        hint = "; where the model takes it whole, let the loader give (batch, target)"
    elif isinstance(batch, Tensor):
        got, hint = f"a tensor of shape {tuple(batch.shape)}", "; one batch alone is the loader [(x, y)]"
    elif isinstance(batch, tuple | list):
        got = f"{type(batch).__name__} of {len(batch)}"
        hint = "; several inputs are one x: ((a, b), y)"
    else:
        got, hint = type(batch).__name__, ""
    raise TypeError(f"a batch of loader must be a pair (x, y), got {got}{hint}")


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of an x or y."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in _parts(tree) or ():
            yield from tensors(part)


def moved(tree: Any, device: torch.device) -> Any:
    """An x or y on the device: the same object where it is there already, else a copy of the same type.

    What has a method `to` is asked itself. TypeError for a container that no copy can be made of.
    """
    if _is_there(tree, device):
        return tree
    if callable(getattr(tree, "to", None)):
        # Some move themselves: not what the loader has.
        twin: Any = copy.copy(tree) if isinstance(tree, Mapping) else tree
        return twin.to(device)
    return _rebuilt(tree, [moved(part, device) for part in _parts(tree) or ()])


def _is_there(tree: Any, device: torch.device) -> bool:
    if isinstance(tree, Tensor):
        return tree.device == device
    parts = _parts(tree)
    if parts is None:
        return not callable(getattr(tree, "to", None)) or getattr(tree, "device", None) == device
    return all(_is_there(part, device) for part in parts)


def _parts(tree: Any) -> Sequence[Any] | None:
    """What a container holds; None for what is none."""
    if isinstance(tree, Mapping):
        return [*tree.values()]
    if isinstance(tree, tuple | list):
        return tree
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


def _rebuilt(tree: Any, parts: Sequence[Any]) -> Any:
    """A copy of a container with other parts."""
    kind: Any = type(tree)
    try:
        if isinstance(tree, Mapping):
            named = dict(zip(tree, parts, strict=True))
            if not isinstance(tree, MutableMapping):
                return kind(named)
            twin = copy.copy(tree)
            for key, part in named.items():
                twin[key] = part
            return twin
        if isinstance(tree, tuple | list):
            return kind(*parts) if hasattr(tree, "_fields") else kind(parts)
        twin = copy.copy(tree)
        for field, part in zip(dataclasses.fields(tree), parts, strict=True):
            object.__setattr__(twin, field.name, part)  # of a frozen one too
        return twin
    except Exception as error:
        raise TypeError(
            f"a batch's {kind.__name__} cannot be copied to another device ({error}): give it a method `to`, or have "
            "the loader give it there"
        ) from error


class SampleCount:
    """How many samples each batch has, for a mean over all of them.

    With a `size`, what that says. Without, the first dimension of x. Where that may be something else than what the
    loss is a mean over, batches weigh alike while they are alike, and the first one that differs is a ValueError:
    guessing would be a wrong product. In doubt are batches

    - whose x and y disagree in their first dimension, as time-first sequences [T, N, …] and labels [N] do;
    - of sequences of targets, whose lengths differ between batches: a mean over tokens, or over sequences?
    - with targets that the loss ignores, or a loss with class weights: the mean is over what counts;
    - with targets [T, N], for a model with layers that take time first.
    """

    def __init__(self, size: BatchSize | None, model: nn.Module, loss_fn: Any) -> None:
        if size is not None and not callable(size):
            raise TypeError(
                f"batch_size must be a function of x that says how many samples it has, got {type(size).__name__}"
            )
        self._size, self._takes_y = size, size is not None and _takes_two(size)
        self._time_first = [
            name for name, module in model.named_modules() if getattr(module, "batch_first", None) is False
        ]
        ignored = loss_option(loss_fn, "ignore_index")
        self._ignored = _IGNORED if ignored is None else ignored
        self._class_weights = _divides_by_weights(loss_fn)
        self._adds_up = loss_option(loss_fn, "reduction") == "sum"
        self.begin()

    def begin(self) -> None:
        """Forget the batches of an earlier pass."""
        self._first: tuple[Any, str | None] | None = None

    def of(self, x: Any, y: Any) -> float:
        """What a batch weighs; ValueError if that cannot be told, TypeError for another result of `batch_size`."""
        return self._guessed(x, y) if self._size is None else self._said(x, y)

    def _said(self, x: Any, y: Any) -> float:
        assert self._size is not None
        said = self._size(x, y) if self._takes_y else self._size(x)
        if isinstance(said, Tensor) and said.numel() == 1:
            said = said.item()
        if isinstance(said, bool) or not isinstance(said, Real):
            raise TypeError(f"batch_size must return a number, got {type(said).__name__}")
        if not 0 <= said < float("inf"):
            raise ValueError(f"batch_size must return how many samples x has, got {said}")
        return float(said)

    def _guessed(self, x: Any, y: Any) -> float:
        inputs = [t for t in tensors(x) if t.dim() > 0]
        targets = [t for t in tensors(y) if t.dim() > 0]
        leading = (inputs or targets)[:1]
        doubt, alike = self._doubt(x, leading, inputs, targets)
        if self._first is None:
            self._first = alike, doubt
        before, earlier = self._first
        if alike != before and (doubt or earlier):
            raise ValueError(
                f"what a batch weighs in the mean cannot be told: {doubt or earlier}, and batches differ. Say it: "
                "batch_size=lambda x: …, or of (x, y): …; or take a loss that is a sum, and reduction='sum'"
            )
        return len(leading[0]) if leading else 1

    def _doubt(
        self, x: Any, leading: list[Tensor], inputs: list[Tensor], targets: list[Tensor]
    ) -> tuple[str | None, Any]:
        """Why the first dimension may not be what the loss is a mean over, and what then has to be alike."""
        shapes = [tuple(t.shape) for t in (*inputs, *targets)]
        if self._adds_up:
            return "loss_fn is a sum", object()
        if not leading:
            scalars = any(True for _ in tensors(x))
            return (None, None) if scalars else ("x has no tensor", object())
        if any(len(t) != len(leading[0]) for t in targets or inputs):
            return f"x and y have the shapes {', '.join(map(str, shapes))}", shapes
        labels = [t for t in targets if not t.is_floating_point()]
        ignored = [int((t == self._ignored).sum()) for t in labels]
        if any(ignored):
            return f"targets are {self._ignored}, which losses ignore", (shapes, ignored)
        if self._class_weights and labels:
            return "loss_fn divides by its class weights", object()
        if self._time_first and any(t.dim() > 1 for t in targets):
            return f"{self._time_first[0]!r} takes time first (batch_first=False)", shapes
        sequences = any(t.dim() > 1 for t in targets)
        return "targets are sequences or maps" if sequences else None, [t.shape[1:] for t in targets]


def loss_option(loss_fn: Any, name: str) -> Any:
    """What a loss of torch.nn, or a partial one, was told; None where it does not say."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords[name] if name in loss_fn.keywords else loss_option(loss_fn.func, name)
    return getattr(loss_fn, name, None) if isinstance(loss_fn, nn.Module) else None


def _divides_by_weights(loss_fn: Any) -> bool:
    """Whether the loss, or one within it, is a mean by class weights; a loss written as a function does not tell."""
    if isinstance(loss_fn, functools.partial):
        if loss_fn.func in (F.cross_entropy, F.nll_loss):
            return loss_option(loss_fn, "weight") is not None
        return _divides_by_weights(loss_fn.func)
    module = getattr(loss_fn, "__self__", loss_fn)  # of a bound method
    return isinstance(module, nn.Module) and any(
        isinstance(part, nn.CrossEntropyLoss | nn.NLLLoss)
        and part.weight is not None
        and part.reduction == "mean"
        for part in module.modules()
    )


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function needs two arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in ones do not tell
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters) == 2

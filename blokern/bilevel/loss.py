"""What pruning methods ask of a batch: the model's call, its logits, and the loss. One place for all of them.

A batch is a pair (x, y), or a mapping that the model takes, labels among its words, and returns a loss for. x is a
tensor, a tuple or list of the model's arguments, or a mapping of them by name; y is whatever the loss takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "HALVES",
    "Criterion",
    "LossModule",
    "ModelLoss",
    "Widened",
    "as_batch",
    "call",
    "checked_batches",
    "cross_entropy",
    "first_of",
    "logits_of",
    "loss_of",
    "map_tensors",
    "model_loss",
    "samples",
    "tensors_in",
    "widened",
]

#: (model, x, y) → the loss, a scalar and a mean over samples, and the logits [N, ...] that it is of.
ModelLoss: TypeAlias = Callable[[nn.Module, Any, Any], tuple[Tensor, Tensor]]

HALVES = (torch.float16, torch.bfloat16)

# What networks call their logits where they return more: transformers and Inception; torchvision's segmentation.
_LOGITS = ("logits", "out")


# --- The model's call ---------------------------------------------------------------------------------------


def call(model: nn.Module, x: Any) -> Any:
    """model(x); model(*x) of a tuple or list, model(**x) of a mapping.

    >>> call(nn.Bilinear(2, 3, 1), (torch.ones(4, 2), torch.ones(4, 3))).shape
    torch.Size([4, 1])
    """
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def logits_of(output: Any) -> Tensor:
    """A model's logits: its output, or what is called "logits" or "out" in it, or the only tensor in it.

    Raises TypeError if an output has several tensors and none has such a name: which is meant cannot be known.

    >>> logits_of({"logits": torch.ones(2, 3), "hidden": torch.ones(2, 8)}).shape
    torch.Size([2, 3])
    """
    for name in _LOGITS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    tensors = [*tensors_in(output)]
    if len(tensors) != 1:
        raise TypeError(
            f"model returns a {type(output).__name__} with {len(tensors)} tensors, none of them called "
            f"{' or '.join(_LOGITS)}; say which is meant: "
            "loss_fn=model_loss(F.cross_entropy, logits=lambda output: output[0])"
        )
    return tensors[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a tensor, sequence, mapping or dataclass of such; of another object, those among its attributes.

    >>> len([*tensors_in({"out": torch.ones(2), "more": (torch.ones(2), None)})])
    2
    """
    parts = _parts(value)
    if parts is None and hasattr(value, "__dict__"):
        parts = vars(value).values()
    for part in [value] if isinstance(value, Tensor) else parts or ():
        if isinstance(part, Tensor):
            yield part
        elif _parts(part) is not None:  # no objects within objects: they lead anywhere
            yield from tensors_in(part)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, sequence or mapping of tensors, each of them changed.

    >>> map_tensors({"x": torch.ones(2)}, torch.neg)
    {'x': tensor([-1., -1.])}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    return [map_tensors(part, change) for part in value] if isinstance(value, list | tuple) else value


def _parts(value: Any) -> Iterable[Any] | None:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return None


# --- The loss -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Criterion:
    """A `ModelLoss` of what :func:`model_loss` was given; logits are divided by the temperature."""

    criterion: Callable[[Tensor, Any], Tensor]
    logits: Callable[[Any], Tensor] = logits_of
    temperature: float = 1.0

    def __call__(self, model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        output = call(model, x)
        logits = self.logits(output)
        if y is None:
            return self._own_loss(output), logits
        loss = self.criterion(logits if self.temperature == 1.0 else logits / self.temperature, y)
        if loss.dim():
            raise ValueError(f"loss_fn must give a scalar, a mean over the samples, got {tuple(loss.shape)}")
        return loss, logits

    def _own_loss(self, output: Any) -> Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError(
                "batches: a mapping must make the model return a loss, with labels among its words, got "
                f"{type(output).__name__} without one; give pairs (x, y) instead"
            )
        if self.temperature != 1.0:
            raise ValueError(
                f"temperature must be 1 where the model computes the loss itself, got {self.temperature}: "
                "its logits cannot be divided; give pairs (x, y), or temperature=1"
            )
        return loss


def model_loss(
    criterion: Callable[[Tensor, Any], Tensor], logits: Callable[[Any], Tensor] = logits_of
) -> Criterion:
    """The loss of a model's logits: what methods take as `loss_fn`.

    criterion: (logits, y) → the mean loss, a scalar. logits: picks them out of the model's output.

    >>> loss, _ = model_loss(F.mse_loss)(nn.Linear(2, 1), torch.ones(4, 2), torch.ones(4, 1))
    >>> loss.shape
    torch.Size([])
    """
    return Criterion(criterion, logits)


def _class_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy: y holds classes, of each sample, pixel or token, or each sample's probabilities."""
    if not isinstance(y, Tensor):
        raise TypeError(
            f"y must be a tensor of classes or probabilities, got {type(y).__name__}; for another loss give loss_fn"
        )
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must be [N, K, ...] of K >= 2 classes for cross-entropy, got shape {tuple(logits.shape)}; "
            "for another loss give loss_fn, such as model_loss(F.mse_loss)"
        )
    if y.is_floating_point():
        return F.cross_entropy(logits, _probabilities(logits, y).to(logits.dtype))
    if y.dtype == torch.bool or y.is_complex():
        raise TypeError(f"y must be class labels, integers, or probabilities, got {y.dtype}")
    after, before = logits.shape[:1] + logits.shape[2:], logits.shape[:-1]
    if y.shape not in (after, before):
        raise ValueError(
            f"y must have shape {tuple(after)} to fit logits of shape {tuple(logits.shape)}, "
            f"got {tuple(y.shape)}; for another loss give loss_fn"
        )
    if logits.dim() > 2 and after == before:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(y.shape)} fit with the classes in "
            "dimension 1 and with the classes in the last: give loss_fn, which knows"
        )
    # Tokens have their classes last, [N, L, K]; images and sequences for torch's own loss in dimension 1.
    return F.cross_entropy(logits if y.shape == after else logits.movedim(-1, 1), y.long())


def _probabilities(logits: Tensor, y: Tensor) -> Tensor:
    if y.shape != logits.shape:
        raise ValueError(
            f"y must be class labels, torch.int64, or probabilities of shape {tuple(logits.shape)}, got {y.dtype} "
            f"of shape {tuple(y.shape)}; for regression give loss_fn=model_loss(F.mse_loss)"
        )
    if not bool((y >= 0).all() & ((y.sum(1) - 1).abs() < 0.01).all()):
        raise ValueError(
            "y must be probabilities, >= 0 and of sum 1 over the classes, where it is of a floating point type; "
            "for regression give loss_fn=model_loss(F.mse_loss)"
        )
    return y


#: The mean cross-entropy, and the logits, of class labels (of samples, pixels or tokens) and of soft labels.
cross_entropy = model_loss(_class_loss)


def loss_of(loss_fn: ModelLoss, model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """The loss and the logits that a `ModelLoss` gives.

    Raises TypeError for what is no pair, such as a loss alone, whose samples would be taken for one; ValueError for a
    loss of several numbers.

    >>> loss_of(cross_entropy, model, x, y)[0].shape
    torch.Size([])
    """
    given = loss_fn(model, x, y)
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], Tensor):
        raise TypeError(
            f"loss_fn must give the loss and the logits, (loss, logits), got {type(given).__name__}; of a loss of "
            "logits model_loss makes one, as in loss_fn=model_loss(F.mse_loss)"
        )
    loss, logits = given
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must give a scalar, a mean over the samples, got {tuple(loss.shape)}")
    return loss, logits


class LossModule(nn.Module):
    """A model with its loss, for what calls modules: (x, y) → the loss.

    >>> loss = torch.func.functional_call(LossModule(model, cross_entropy), {"model.0.weight": w}, (x, y))
    """

    def __init__(self, model: nn.Module, loss_fn: ModelLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, x: Any, y: Any) -> Tensor:
        return loss_of(self.loss_fn, self.model, x, y)[0]


# --- Batches ------------------------------------------------------------------------------------------------


def as_batch(batch: Any, of: str = "batches") -> tuple[Any, Any]:
    """(x, y) of a batch, y None of a mapping; `of` begins the message.

    Raises TypeError for anything else, and TypeError or ValueError unless x has samples and y as many.

    >>> as_batch((torch.ones(4, 2), torch.arange(4)))[1]
    tensor([0, 1, 2, 3])
    """
    if isinstance(batch, Mapping):
        x, y = batch, None
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    else:
        got = f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}"
        raise TypeError(
            f"{of}: a batch must be a pair (x, y), in which x may be a tuple or mapping, or a mapping, got {got}"
        )
    n = samples(x, of)
    if isinstance(y, Tensor) and y.shape[:1] != (n,):
        raise ValueError(f"{of}: y must have {n} samples to fit x, got shape {tuple(y.shape)}")
    return x, y


def samples(x: Any, of: str = "batches") -> int:
    """How many samples x has: the first dimension of its first tensor.

    >>> samples({"input_ids": torch.zeros(4, 7, dtype=torch.int64)})
    4
    """
    first = next(tensors_in(x), None)
    if first is None:
        raise TypeError(f"{of}: x must be a tensor, or a tuple or mapping of tensors, got {type(x).__name__}")
    if first.dim() == 0 or first.shape[0] == 0:
        raise ValueError(f"{of}: x must be a batch, [N, ...] with N >= 1, got shape {tuple(first.shape)}")
    return first.shape[0]


def checked_batches(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The batches as pairs, of which there must be one at least: ValueError.

    >>> [len(y) for _, y in checked_batches([(x, y)])]
    [8]
    """
    empty = True
    for batch in batches:
        yield as_batch(batch)
        empty = False
    if empty:
        raise ValueError("batches must give at least one (x, y) whenever iterated over, got none")


def first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The inputs of the first batch, None if there is none, and the batches, that one among them.

    >>> x, batches = first_of(iter([(x, y)]))
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        return None, batches
    return as_batch(first)[0], chain([first], iterator) if iterator is batches else batches


def widened(tensor: Tensor) -> Tensor:
    """In float32 if of half precision.

    >>> widened(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor.float() if tensor.dtype in HALVES else tensor


class Widened:
    """Batches whose tensors are :func:`widened`, as often as they are iterated over."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return (map_tensors(batch, widened) for batch in self._batches)

"""What a model returned: the tensors in it, and whether a Gauss-Newton product can be cut there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["Found", "Split", "check_split", "is_number", "tensors_in"]

_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


class Found(NamedTuple):
    """The tensors in nested containers, each once, and the types of objects that were not looked into."""

    tensors: list[Tensor]
    opaque: set[str]


def tensors_in(tree: Any) -> Found:
    """Those in tuples, lists, sets, mappings and dataclasses, and in what is registered as a pytree."""
    tensors: dict[int, Tensor] = {}
    opaque: set[str] = set()
    seen: dict[int, Any] = {}  # which holds what it has ids of

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            tensors[id(item)] = item
        if isinstance(item, (Tensor, *_PLAIN)) or id(item) in seen:
            return
        seen[id(item)] = item
        inner = _items(item)
        if inner is None:
            opaque.add(type(item).__name__)
        for part in inner or ():
            visit(part)

    visit(tree)
    return Found([*tensors.values()], opaque)


def _items(item: Any) -> Sequence[Any] | None:
    """What a container has in it; None for what is none."""
    if isinstance(item, tuple | list | Set):
        return [*item]
    if isinstance(item, Mapping) or is_dataclass(item):
        values = [*item.values()] if isinstance(item, Mapping) else []
        return values + ([getattr(item, f.name) for f in fields(item)] if is_dataclass(item) else [])
    leaves = tree_leaves(item)
    return None if len(leaves) == 1 and leaves[0] is item else leaves


def is_number(shape: torch.Size) -> bool:
    """Whether an output of that shape may be a loss: [1] too, as models return it that run under DataParallel."""
    return shape in ((), (1,))


class Split(Protocol):
    """A loss of a model's outputs, as a Gauss-Newton product takes it apart."""

    def past_outputs(self) -> list[str]:
        """The parameters that the loss depends on by ways past the outputs."""
        ...

    def returns_loss(self) -> bool:
        """Whether the loss is linear in a number that the model returned: in a loss of its own."""
        ...


def check_split(split: Split, opaque: Set[str]) -> None:
    """ValueError if a Gauss-Newton product would be zero, or lack a part of the loss; whatever way it is computed."""
    if names := split.past_outputs():
        unseen = f" (tensors are not looked for in: {', '.join(sorted(opaque))})" if opaque else ""
        raise ValueError(
            "loss_fn must depend on the parameters through the model's output alone for a Gauss-Newton product, got "
            f"one that reads {_some(names)}, or activations of them, past it. Return all that loss_fn needs as tensors "
            f"in a tuple, list, mapping or dataclass{unseen}, and leave penalties on parameters to `damping` or `hvp`"
        )
    if split.returns_loss():
        raise ValueError(
            "loss_fn must compute the loss from the model's predictions for a Gauss-Newton product, got one that is "
            "linear in a scalar which the model returned, a loss of its own: that part would be zero. Compute it in "
            "loss_fn, of the logits, or take `hvp`"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown

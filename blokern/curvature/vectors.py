"""Vectors in the space of a model's parameters: dicts of tensors by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["check_input_vector", "check_vector", "flatten", "unflatten"]


def check_vector(v: Mapping[str, Tensor], parameters: Mapping[str, Tensor], name: str = "v") -> int | None:
    """The size of v's stack, None for a single vector; ValueError or TypeError if v does not fit the parameters.

    v has an entry for each parameter, of its shape, dtype and device, or all have one leading dimension more.
    """
    if not isinstance(v, Mapping):
        raise TypeError(f"{name} must be a dict of tensors by parameter name, got {type(v).__name__}")
    if v.keys() != parameters.keys():
        missing = sorted(map(str, parameters.keys() - v.keys()))
        extra = sorted(map(str, v.keys() - parameters.keys()))
        raise ValueError(
            f"{name} must have an entry for each parameter that requires a gradient; "
            f"missing: {_some(missing)}; unknown: {_some(extra)}"
        )
    stacks = {key: _stack(v[key], p, f"{name}[{key!r}]", "the parameter") for key, p in parameters.items()}
    sizes = set(stacks.values())
    if len(sizes) > 1:
        raise ValueError(f"{name} must be one vector, or stacks of one size, got {_sizes(stacks)}")
    return sizes.pop() if sizes else None


def check_input_vector(u: Tensor, x: Tensor) -> int | None:
    """The size of u's stack, None for a single one of the shape, dtype and device of x."""
    return _stack(u, x, "u", "x")


def _stack(t: Tensor, like: Tensor, name: str, like_name: str) -> int | None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.shape != like.shape and t.shape[1:] != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got {tuple(t.shape)}; "
            "a stack of vectors has one leading dimension more"
        )
    if t.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {t.dtype}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got the layout {t.layout}: {name}.to_dense()")
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {t.device}")
    return None if t.shape == like.shape else t.shape[0]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"


def _sizes(stacks: Mapping[str, int | None]) -> str:
    first: dict[int | None, str] = {}
    for key, size in stacks.items():
        first.setdefault(size, key)
    return ", ".join(f"{'one' if size is None else size} in {key!r}" for size, key in first.items())


def flatten(v: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """All entries of a vector in the space of `like` in a row, [n]; of a stack of vectors, [k, n]."""
    return torch.cat(
        [v[name].reshape(*v[name].shape[: v[name].dim() - p.dim()], p.numel()) for name, p in like.items()],
        -1,
    )


def unflatten(t: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flatten`, of [n] or [k, n]: views, of the dtypes of `like`."""
    parts = torch.split(t, [p.numel() for p in like.values()], -1)
    return {
        name: part.reshape((*t.shape[:-1], *p.shape)).to(p.dtype)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }

"""Vectors as solvers work on them: lists of stacks, one tensor a parameter and one row a system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from blokern import ops
from blokern.curvature.op import wide
from blokern.curvature.vectors import check_vector

__all__ = ["Operator", "Space", "check_operator", "multiply", "normalized", "power_of_two", "scaled"]


class Operator(Protocol):
    """A symmetric matrix in the space of `parameters`: `HessianOperator`, `GGNOperator`, or one's own.

    `operator @ v` takes and gives dicts by parameter name, and stacks of them, and leaves v as it is.

    >>> class Twice:
    ...     parameters = {"p": torch.zeros(2)}
    ...     def __matmul__(self, v):
    ...         return {"p": 2 * v["p"]}
    >>> cg_solve(Twice(), {"p": torch.ones(2)}).x
    {'p': tensor([0.5000, 0.5000])}
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def __matmul__(self, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


def check_operator(operator: Any) -> None:
    """TypeError or ValueError for what is no operator, or one of a space that has no real numbers."""
    parameters = getattr(operator, "parameters", None)
    if not isinstance(parameters, Mapping) or not hasattr(operator, "__matmul__"):
        raise TypeError(
            "operator must have `parameters`, a dict of tensors by name, and products `operator @ v`, got "
            f"{type(operator).__name__}"
        )
    if not sum(p.numel() for p in parameters.values()):
        raise ValueError("operator.parameters must have at least one entry, got none")
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise TypeError(f"operator.parameters[{name!r}] must be real floating-point, got {p.dtype}")


def multiply(operator: Operator, v: Mapping[str, Tensor], stack: int | None) -> Mapping[str, Tensor]:
    """operator @ v for a v of that stack; ValueError or TypeError if that does not fit v, or has written to v."""
    versions = [t._version for t in v.values()]
    product = operator @ v
    if versions != [t._version for t in v.values()]:
        raise ValueError("operator @ v must leave v as it is, but has changed it in place")
    if check_vector(product, operator.parameters, "operator @ v") != stack:
        raise ValueError("operator @ v must be a stack like v")
    return product


class Space:
    """The space of an operator's vectors, or of stacks like b: as lists, in at least float32, and back.

    Arithmetic is that of the lists' dtypes, products' that of the parameters.
    """

    def __init__(self, operator: Operator, b: Mapping[str, Tensor]) -> None:
        check_operator(operator)
        self.operator, self.like = operator, operator.parameters
        self.stack = check_vector(b, self.like, "b")
        #: Of the products.
        self.eps = max(torch.finfo(p.dtype).eps for p in self.like.values())
        self._narrow = any(wide(p).dtype != p.dtype for p in self.like.values())

    def finite(self, v: Mapping[str, Tensor], name: str) -> list[Tensor]:
        """A vector that somebody gives, ValueError if it is not finite."""
        listed = self.listed(v, name)
        if not all(t.isfinite().all() for t in listed):
            raise ValueError(f"{name} must be finite")
        return listed

    def listed(self, v: Mapping[str, Tensor], name: str) -> list[Tensor]:
        """A vector as a list, which may share its memory."""
        if check_vector(v, self.like, name) != self.stack:
            raise ValueError(f"{name} must be a stack like b")
        return [wide(v[key].detach()[None] if self.stack is None else v[key].detach()) for key in self.like]

    def vectors(self, stacks: list[Tensor]) -> dict[str, Tensor]:
        """The inverse of `listed`."""
        single = self.stack is None
        return {
            name: (t[0] if single else t).to(p.dtype)
            for (name, p), t in zip(self.like.items(), stacks, strict=True)
        }

    def rounded(self, stacks: list[Tensor]) -> list[Tensor]:
        """Vectors as they are in the parameters' dtypes."""
        return self.listed(self.vectors(stacks), "x")

    def multiply(self, stacks: list[Tensor]) -> list[Tensor]:
        """The products, in memory that is the operator's, or even that of the stacks."""
        if self._narrow:
            by = power_of_two(stacks)  # float16 has no small numbers
            return scaled(self._multiply(scaled(stacks, 1 / by)), by)
        return self._multiply(stacks)

    def residual(self, b: list[Tensor], x: list[Tensor]) -> list[Tensor]:
        """b − A x, for an x of any size."""
        by = power_of_two(x)
        product = scaled(self._multiply(scaled(x, 1 / by)), by)
        return [s - t for s, t in zip(b, product, strict=True)]

    def _multiply(self, stacks: list[Tensor]) -> list[Tensor]:
        product = multiply(self.operator, self.vectors(stacks), self.stack)
        return [wide(product[name].detach().view_as(t)) for name, t in zip(self.like, stacks, strict=True)]


def normalized(stacks: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The columns over a power of two each, those powers, and the columns' norms; for entries of any size, whose
    squares float32 does not have."""
    by = power_of_two(stacks)
    unit = scaled(stacks, 1 / by)
    return unit, by, ops.multi_tensor_dot(unit, unit).sqrt() * by


def power_of_two(stacks: list[Tensor]) -> Tensor:
    """Of each column one near its largest entry, float64 [K]; 1 if that is 0 or not finite."""
    columns = [t.reshape(len(t), t.shape[1:].numel()) for t in stacks]
    largest = torch.stack([t.abs().amax(1).double() for t in columns if t.shape[1]]).amax(0)
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    power = largest / torch.frexp(largest).mantissa / 2
    most = 2.0**100 if any(t.dtype == torch.float32 for t in stacks) else 2.0**1000
    return power.clamp(1 / most, most)


def scaled(stacks: list[Tensor], by: Tensor) -> list[Tensor]:
    """The columns times a power of two each, new."""
    return [t * by.to(t.dtype).reshape(-1, *[1] * (t.dim() - 1)) for t in stacks]

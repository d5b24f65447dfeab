"""Inner products and updates of vectors that are lists of tensors: what solvers take between two products.

A list has one tensor a parameter, each a stack [K, ...] of K columns, of any strides, float64, float32, bfloat16 or
float16 (arithmetic at least float32, sums over blocks in float64). Coefficients and sums are float64 [K] on the
tensors' device and stay there: nothing waits for a number. The order of a column's sums depends on its tensors' sizes
alone, not on threads or on the columns beside it. A product of two entries is one of that arithmetic: in float32 those
of entries below 1e-19 vanish, above 1e19 they are infinite, so scale lists of such first, as `blokern.curvature`'s
solvers do. On a device without kernels they are plain torch. None of these ops has a derivative. Errors are ValueError
or TypeError, naming the argument, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blokern.ops import reference_curvature as reference
from blokern.ops.curvature import has_kernels

__all__ = ["cg_update_", "multi_tensor_axpby_", "multi_tensor_dot"]


def multi_tensor_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ of each column, over all tensors of the lists: float64 [K].

    a, b: lists of one tensor a parameter, each a stack [K, ...], float64, float32, bfloat16 or float16. Raises
    ValueError or TypeError, naming the argument, for lists, shapes, dtypes or devices that do not fit.

    >>> multi_tensor_dot([torch.ones(1, 3), torch.ones(1)], [torch.ones(1, 3), torch.full((1,), 2.0)])
    tensor([5.], dtype=torch.float64)
    """
    _check_lists(a=a, b=b)
    if not has_kernels(a[0].device):
        return reference.multi_tensor_dot(a, b)
    products: Tensor = torch.ops.blokern.multi_tensor_dot(a, b)
    return products


def multi_tensor_axpby_(y: Sequence[Tensor], x: Sequence[Tensor], a: Tensor, b: Tensor) -> None:
    """y ← a x + b y in place, with one a and b a column, float64 [K].

    What a coefficient of 0 stands before is not read, as in BLAS: a NaN there is of no effect. Lists and errors as in
    :func:`multi_tensor_dot`.

    >>> y, one = [torch.tensor([[1.0, 2.0]])], torch.ones(1, dtype=torch.float64)
    >>> multi_tensor_axpby_(y, [torch.tensor([[10.0, 20.0]])], one, 3 * one); y
    [tensor([[13., 26.]])]
    """
    _check_lists(y=y, x=x)
    if has_kernels(y[0].device):
        torch.ops.blokern.multi_tensor_axpby_(y, x, a, b)
    else:
        reference.multi_tensor_axpby_(y, x, a, b)


def cg_update_(
    x: Sequence[Tensor], r: Sequence[Tensor], p: Sequence[Tensor], ap: Sequence[Tensor], alpha: Tensor
) -> Tensor:
    """x ← x + α p and r ← r − α A p in place, in one pass, and ⟨r, r⟩ of the new r, float64 [K].

    The step of conjugate gradients along p, or with p = r and a constant α of a Neumann series. alpha: float64 [K]; a
    column where it is 0 stays as it is, whatever p and ap are there. Lists and errors as in :func:`multi_tensor_dot`.

    >>> x, r, half = [torch.zeros(1, 2)], [torch.tensor([[2.0, 4.0]])], torch.full((1,), 0.5, dtype=torch.float64)
    >>> cg_update_(x, r, [torch.ones(1, 2)], [torch.ones(1, 2)], half), x
    (tensor([14.5000], dtype=torch.float64), [tensor([[0.5000, 0.5000]])])
    """
    _check_lists(x=x, r=r, p=p, ap=ap)
    if not has_kernels(x[0].device):
        return reference.cg_update_(x, r, p, ap, alpha)
    squares: Tensor = torch.ops.blokern.cg_update_(x, r, p, ap, alpha)
    return squares


def _check_lists(**lists: object) -> None:
    for name, tensors in lists.items():
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        if not tensors:
            raise ValueError(f"{name} must have at least one tensor, got an empty list")
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}] must be a Tensor, got {type(t).__name__}")


def _fake_columns(first: Sequence[Tensor], *_: object) -> Tensor:
    return first[0].new_empty(first[0].shape[0], dtype=torch.float64)


def _fake_nothing(*_: object) -> None:
    return None


torch.library.register_fake("blokern::multi_tensor_dot", _fake_columns)
torch.library.register_fake("blokern::cg_update_", _fake_columns)
torch.library.register_fake("blokern::multi_tensor_axpby_", _fake_nothing)

"""Random calls of the curvature ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arbitrary import FLOATS, Draw
from comparison import TOLERANCE, Unchanged, check_close, double
from torch import Tensor

from blokern import ops
from blokern.ops import curvature, reference_curvature


def with_oracle(name: str, dtype: torch.dtype, *args: Any, **options: Any) -> None:
    unchanged = Unchanged(*(arg for arg in (*args, *options.values()) if isinstance(arg, Tensor)))
    actual = getattr(ops, name)(*args, **options)
    unchanged.check()
    expected = getattr(reference_curvature, name)(
        *map(double, args), **{key: double(value) for key, value in options.items()}
    )
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        least = 1.0 if "norm" in name else 1e-3
        check_close(a, e, dtype, f"{args[0] if isinstance(args[0], str) else name}[{i}]", least)


def activation(draw: Draw, name: str) -> None:
    dtype = draw.one_of(FLOATS)
    shape = draw.shape(0, 4)
    saved = draw.values(shape, dtype)
    if name in ("tanh", "sigmoid"):  # their outputs, where rounding leaves the inverse some digits
        saved = 0.05 + 0.9 * torch.sigmoid(saved)
    parameters = {"softplus": (1.5, 20.0), "elu": (0.7, 1.3, 0.9)}.get(name, ())
    grad, grad_dot, x_dot = (draw.input(draw.values(shape, dtype)) for _ in range(3))
    with_oracle(
        "activation_adjoint_tangent", dtype, name, grad, grad_dot, draw.input(saved), x_dot, *parameters,
        adjoint=draw.chance(0.5),
    )  # fmt: skip


def cross_entropy(draw: Draw) -> None:
    dtype, rows, classes = draw.one_of(FLOATS), draw.size(64, least=1), draw.size(100, least=1)
    logits, tangent = (draw.input(draw.values((rows, classes), dtype)) for _ in range(2))
    if draw.chance(0.3):
        target = torch.rand(rows, classes, generator=draw.generator, dtype=torch.float64).to(dtype)
    else:
        target = torch.randint(classes, (rows,), generator=draw.generator)
        target[1:][draw.mask((rows - 1,), 0.2)] = -100  # one at least counts
    weight = torch.rand(classes, generator=draw.generator, dtype=torch.float64).to(dtype) + 0.5
    with_oracle(
        "softmax_cross_entropy_hvp", dtype, logits, tangent, draw.input(target),
        weight=draw.input(weight) if draw.chance(0.4) else None,
        reduction=draw.one_of(("mean", "sum")), label_smoothing=draw.one_of((0.0, 0.1, 1.0)),
    )  # fmt: skip


def optional(draw: Draw, t: Tensor) -> Tensor | None:
    return draw.input(t) if draw.chance(0.6) else None


def batch_norm(draw: Draw, name: str) -> None:
    dtype = draw.one_of(FLOATS)
    shape = (draw.size(20, least=1), draw.size(64, least=1), *draw.shape(0, 2, 20))
    if 0 in shape:
        shape = shape[:2]
    x, x_dot, grad, grad_dot = (draw.input(draw.values(shape, dtype)) for _ in range(4))
    train, dims = draw.chance(0.6), [d for d in range(len(shape)) if d != 1]
    mean = x.double().mean(dims)
    rstd = (x.double().var(dims, correction=0) + 0.1) ** -0.5
    weight, weight_dot, bias_dot = (optional(draw, draw.values(shape[1:2])) for _ in range(3))
    gate = draw.input(draw.values(shape, dtype)) if draw.chance(0.4) else None
    options: dict[str, Any] = {"gate": gate, "train": train}
    if name == "batch_norm_tangent":
        with_oracle(name, dtype, x, x_dot, mean, rstd, weight, weight_dot, bias_dot, **options)
    elif name == "batch_norm_adjoint":
        with_oracle(name, dtype, grad, x, mean, rstd, weight, **options)
    else:
        options["adjoint"] = draw.chance(0.5)
        with_oracle(name, dtype, grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot, **options)


def layer_norm(draw: Draw, name: str) -> None:
    dtype, kinds, size = draw.one_of(FLOATS), draw.one_of((1, 1, 2, 3)), draw.size(100, least=1)
    rows = kinds * draw.size(33, least=1)
    x, x_dot, grad, grad_dot = (draw.input(draw.values((rows, size), dtype)) for _ in range(4))
    mean, rstd = x.double().mean(1), (x.double().var(1, correction=0) + 0.1) ** -0.5
    weight = draw.values((kinds, size), torch.float32).double()  # given, so that all agree on the kinds
    weight_dot, bias_dot = (
        optional(draw, draw.values((kinds, size), torch.float32).double()) for _ in range(2)
    )
    if name == "layer_norm_tangent":
        with_oracle(name, dtype, x, x_dot, mean, rstd, weight, weight_dot, bias_dot)
    else:
        adjoint = draw.chance(0.5)
        with_oracle(
            name, dtype, grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot,
            adjoint=adjoint,
        )  # fmt: skip


def vectors(draw: Draw, name: str) -> None:
    columns, dtypes = draw.size(9), [draw.one_of(FLOATS) for _ in range(draw.source.randint(1, 4))]
    shapes = [(columns, *draw.shape(0, 3, 500)) for _ in dtypes]
    x, r, p, ap = (
        [draw.laid_out(draw.values(s, d)) for s, d in zip(shapes, dtypes, strict=True)] for _ in range(4)
    )
    a, b = (torch.randn(columns, generator=draw.generator, dtype=torch.float64) for _ in range(2))
    a[draw.mask((columns,), 0.2)] = 0
    lists, more = {
        "multi_tensor_dot": ((x, r), ()),
        "multi_tensor_axpby_": ((x, r), (a, b)),
        "cg_update_": ((x, r, p, ap), (a,)),
    }[name]
    exact = [[double(t) for t in tensors] for tensors in lists]
    actual = getattr(ops, name)(*lists, *more)
    expected = getattr(reference_curvature, name)(*exact, *more)
    for tensors, wanted in zip(lists, exact, strict=True):
        for t, e, dtype in zip(tensors, wanted, dtypes, strict=True):
            check_close(t, e, dtype, name)
    if actual is not None:
        # Of sums the error is relative to the sum of the products' sizes.
        of = exact if name == "multi_tensor_dot" else [exact[1], exact[1]]
        size = reference_curvature.multi_tensor_dot(*([t.abs() for t in tensors] for tensors in of))
        dtype = max(dtypes, key=lambda d: TOLERANCE[d])
        assert bool(((actual - expected).abs() <= TOLERANCE[dtype] * size + 1e-12).all()), (actual, expected)


_FAMILIES: dict[Callable[..., None], tuple[str, ...]] = {
    batch_norm: ("batch_norm_tangent", "batch_norm_adjoint", "batch_norm_adjoint_tangent"),
    layer_norm: ("layer_norm_tangent", "layer_norm_adjoint_tangent"),
    vectors: ("multi_tensor_dot", "multi_tensor_axpby_", "cg_update_"),
}
CASES: dict[str, Callable[[Draw], None]] = {"softmax_cross_entropy_hvp": cross_entropy}
CASES |= {f"activation {name}": partial(activation, name=name) for name in curvature.ACTIVATIONS}
CASES |= {name: partial(case, name=name) for case, names in _FAMILIES.items() for name in names}

"""Wrong calls of the curvature kernels: refused, naming the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_curvature_ops import (
    ARGUMENTS,
    ROW_ARGUMENTS,
    activation_case,
    batch_norm_case,
    call,
    cross_entropy_case,
    layer_norm_case,
    row_call,
)

from blokern import ops


def test_wrong_batch_norm_calls() -> None:
    case = batch_norm_case((3, 4, 5), torch.float32)
    wrong: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("batch_norm_tangent", {"x": case["x"].int()}, TypeError, "x must be float64, float32"),
        ("batch_norm_tangent", {"x": torch.ones(3)}, ValueError, r"x must be \[N, C, ...\]"),
        ("batch_norm_tangent", {"x_dot": case["x_dot"][:2]}, ValueError, r"x_dot must have the shape of x"),
        (
            "batch_norm_tangent",
            {"x_dot": case["x_dot"].double()},
            TypeError,
            "x_dot must have the dtype of x",
        ),
        ("batch_norm_tangent", {"mean": torch.ones(3)}, ValueError, "mean must have one value for each of 4"),
        (
            "batch_norm_tangent",
            {"weight_dot": torch.ones(2, 4)},
            ValueError,
            "weight_dot must have one value",
        ),
        ("batch_norm_adjoint", {"grad": case["grad"][0]}, ValueError, "grad must have the shape of x"),
        ("batch_norm_adjoint_tangent", {"grad_dot": case["grad"][None]}, ValueError, "shape of x_dot"),
    ]
    for op, changes, error, message in wrong:
        with pytest.raises(error, match=message):
            call(ops, op, case | changes)
    for name in ARGUMENTS["batch_norm_adjoint_tangent"]:
        with pytest.raises(ValueError, match=f"{name} requires grad, and this op has no derivative"):
            call(ops, "batch_norm_adjoint_tangent", case | {name: case[name].clone().requires_grad_()})
    with pytest.raises(ValueError, match="gate must have the shape of x"):
        call(ops, "batch_norm_tangent", case, gate=torch.ones(3, 4))


def test_wrong_layer_norm_calls() -> None:
    case = layer_norm_case(6, 5, 2, torch.float32)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"x": case["x"][0]}, ValueError, r"x must be \[rows, size\]"),
        ({"x": case["x"].long()}, TypeError, "x must be float64"),
        ({"x_dot": case["x_dot"][:3]}, ValueError, "x_dot must have the shape of x"),
        ({"mean": case["mean"][:3]}, ValueError, r"mean must have shape \[6\]"),
        ({"weight_dot": case["weight_dot"][:1]}, ValueError, r"weight_dot must have shape \[2, 5\]"),
    ]
    for changes, error, message in wrong:
        with pytest.raises(error, match=message):
            row_call(ops, "layer_norm_tangent", case | changes)
    adjoint: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"grad": case["grad"][:3]}, ValueError, "grad must have the shape of x"),
        ({"grad": case["grad"].double()}, TypeError, "grad must have the dtype of x"),
        (
            {"grad_dot": torch.stack([case["grad_dot"]] * 2)},
            ValueError,
            "grad_dot must have the shape of x_dot",
        ),
        ({"rstd": case["rstd"][:3]}, ValueError, r"rstd must have shape \[6\]"),
    ]
    for changes, error, message in adjoint:
        with pytest.raises(error, match=message):
            row_call(ops, "layer_norm_adjoint_tangent", case | changes)
    for name in ROW_ARGUMENTS["layer_norm_adjoint_tangent"]:
        with pytest.raises(ValueError, match=f"{name} requires grad, and this op has no derivative"):
            row_call(ops, "layer_norm_adjoint_tangent", case | {name: case[name].clone().requires_grad_()})


def test_wrong_activation_calls() -> None:
    case = activation_case("elu", (3, 4), torch.float32)
    f = ops.activation_adjoint_tangent
    with pytest.raises(ValueError, match="activation must be one of 'tanh'"):
        f("gelo", *case)
    with pytest.raises(TypeError, match="elu takes 3 parameters"):
        f("elu", *case, 1.0)
    with pytest.raises(ValueError, match="x_dot must have the shape of saved"):
        f("silu", *case[:3], case[3][0])
    with pytest.raises(ValueError, match="grad_dot must have the shape of x_dot"):
        f("silu", case[0], case[1], case[2], torch.stack([case[3]] * 2))
    with pytest.raises(TypeError, match="grad must have the dtype of saved"):
        f("silu", case[0].double(), *case[1:])
    for i, name in enumerate(("grad", "grad_dot", "saved", "x_dot")):
        with pytest.raises(ValueError, match=f"{name} requires grad, and this op has no derivative"):
            f("silu", *case[:i], case[i].clone().requires_grad_(), *case[i + 1 :])


def test_wrong_cross_entropy_calls() -> None:
    (z, v, t), _ = cross_entropy_case(4, 5, torch.float32)
    f = ops.softmax_cross_entropy_hvp
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: f(z[0], v[0], t), ValueError, r"logits must be \[N, C\]"),
        (lambda: f(z.int(), v, t), TypeError, "logits must be float64"),
        (lambda: f(z, v[:3], t), ValueError, "tangent must have the shape of logits"),
        (lambda: f(z, v.double(), t), TypeError, "tangent must have the dtype of logits"),
        (lambda: f(z, v, t + 1), ValueError, r"target must be in \[0, 5\), or -100 to be ignored, got "),
        (lambda: f(z, v, t[:3]), ValueError, r"target must have shape \[4\]"),
        (lambda: f(z, v, t.int()), TypeError, "target must be int64 labels"),
        (lambda: f(z, v, z.double()), TypeError, "target must have the dtype of logits"),
        (lambda: f(z, v, t, weight=torch.ones(4)), ValueError, r"weight must have shape \[5\]"),
        (lambda: f(z, v, t, label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]"),
        (lambda: f(z, v, t, reduction="none"), ValueError, "reduction"),  # type: ignore[arg-type]
        (lambda: f(z.clone().requires_grad_(), v, t), ValueError, "logits requires grad"),
    ]
    t = t.where(t != -100, 0)
    t[0] = 4
    for run, error, message in wrong:
        with pytest.raises(error, match=message):
            run()

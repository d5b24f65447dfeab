"""A plain case of every curvature kernel in every way that it spreads over a CUDA device, an emulated or a real one.
A case takes the module whose ops it calls; the reference is called in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import test_curvature_ops as cpu
import torch

from blokern.ops import reference_curvature as reference


def cross_entropy(
    module: Any, classes: int, *, rows: int = 3, soft: bool = False, dtype=torch.float32
) -> Any:
    """Of all options at once."""
    arguments, options = cpu.cross_entropy_case(rows, classes, dtype, soft=soft, weighted=True)
    if module is reference:
        arguments = [t.double() if t.is_floating_point() else t for t in arguments]
        options = {name: t.double() for name, t in options.items()}
    return module.softmax_cross_entropy_hvp(*arguments, label_smoothing=0.2, **options)


def batch_norm(
    module: Any, op: str, shape: tuple[int, ...], *, inner: bool = False, dtype=torch.float32
) -> Any:
    case = cpu.batch_norm_case(shape, dtype)
    if inner:
        case = {
            n: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t for n, t in case.items()
        }
    if module is reference:
        case = cpu.double(case)
    how = {"adjoint": True} if "adjoint_tangent" in op else {}
    return cpu.call(module, op, case, gate=case["gate"], **how)


def layer_norm(module: Any, op: str, rows: int, size: int, kinds: int, *, dtype=torch.float32) -> Any:
    case = cpu.layer_norm_case(rows, size, kinds, dtype)
    if module is reference:
        case = cpu.double(case)
    how = {"adjoint": True} if "adjoint" in op else {}
    return cpu.row_call(module, op, case, **how)


def activation(module: Any, name: str, size: int, *, dtype=torch.float32) -> Any:
    case = cpu.activation_case(name, (size,), dtype)
    if module is reference:
        case = tuple(t.double() for t in case)
    return module.activation_adjoint_tangent(name, *case, *cpu.PARAMETERS.get(name, ()), adjoint=True)


#: Every kernel in every way it spreads over threads: a warp, a block, a team of blocks; pixels or channels inner.
PLAIN: dict[str, Callable[[Any], Any]] = {
    "cross-entropy, a warp a row": lambda m: cross_entropy(m, 70),
    "cross-entropy, a block a row": lambda m: cross_entropy(m, 1033),
    "cross-entropy, blocks a row": lambda m: cross_entropy(m, 4201, rows=2, soft=True),
    "labels of blocks": lambda m: cross_entropy(m, 2, rows=2100),
    **{
        f"{op}, {name}": lambda m, op=op, shape=shape, inner=inner: batch_norm(m, op, shape, inner=inner)
        for op in cpu.ARGUMENTS
        for name, shape, inner in (
            ("a block a channel", (4, 3, 5, 7), False),
            ("blocks a channel", (3, 2, 41, 37), False),
            ("channels inner", (3, 37, 5, 30), True),
        )
    },
    **{
        f"{op}, {name}": lambda m, op=op, sizes=sizes: layer_norm(m, op, *sizes)
        for op in cpu.ROW_ARGUMENTS
        for name, sizes in (
            ("a warp a row", (40, 33, 2)),
            ("a block a row", (20, 1028, 1)),
            ("blocks a row", (3, 4201, 1)),
        )
    },
    "activation": lambda m: activation(m, "gelu", 4201),
}

"""Random calls of the sparse ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arbitrary import FLOATS, Draw
from comparison import check_close, double
from torch import Tensor

from blokern import ops
from blokern.ops import reference
from blokern.ops.masked_weight import clear_masked_

PRODUCTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEPS = (torch.float64, torch.float32)


def hidden(draw: Draw, weight: Tensor, mask: Tensor) -> Tensor:
    """Where the mask is 0, anything: it must not be read."""
    return (
        torch.where(mask, weight, draw.specials(weight.shape, weight.dtype)) if draw.chance(0.5) else weight
    )


def given_mask(draw: Draw, mask: Tensor) -> Any:
    return (
        ops.SparseMask(mask)
        if draw.chance(0.5)
        else draw.input(mask)
        if not mask.numel()
        else draw.laid_out(mask)
    )


def differentiated(
    draw: Draw, run: Callable[..., Tensor], dtype: torch.dtype, **factors: Tensor
) -> list[Tensor]:
    """The result and, of a random cotangent that both runs share, the factors' gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in factors.items()}
    out = run(**leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(dtype).to(out.dtype), materialize_grads=True
    )
    return [out.detach(), *grads]


def product(
    draw: Draw, name: str, dtype: torch.dtype, mask: Tensor, factors: dict[str, Tensor], **more: Any
) -> None:
    kept = given_mask(draw, mask)

    def run(module: Any, **leaves: Tensor) -> Tensor:
        return getattr(module, name)(**leaves, mask=kept if module is ops else mask, **more)

    actual = differentiated(draw, lambda **leaves: run(ops, **leaves), dtype, **factors)
    clean = {k: torch.where(mask, t, 0.0) if k == "weight" else t for k, t in factors.items()}
    # Contiguous: torch's convolution in float64 has wrong gradients by weights that lie otherwise.
    exact = {k: t.double().contiguous() for k, t in clean.items()}
    expected = differentiated(draw, lambda **leaves: run(reference, **leaves), dtype, **exact)
    labels = ["", *(f"'s gradient by {factor}" for factor in factors)]
    for label, a, e in zip(labels, actual, expected, strict=True):
        check_close(a, e, dtype, name + label)


def matrix_case(draw: Draw) -> tuple[torch.dtype, int, int, int, Tensor]:
    rows, cols = draw.size(), draw.size()
    return draw.one_of(PRODUCTS), rows, cols, draw.size(most=draw.one_of((17, 200))), draw.mask((rows, cols))


def sparse_mask(draw: Draw) -> None:
    shape = draw.shape(2, 4)
    one, two = draw.mask(shape), draw.mask(shape)
    kept = ops.SparseMask(draw.laid_out(one))
    assert torch.equal(kept.check, ops.SparseMask(one).check)
    assert torch.equal(kept.to_dense(), one)
    assert kept.kept == int(one.sum())
    assert int(kept.differing(two)) == int((one ^ two).sum())
    for transposed in (False, True):
        matrix = one.view(kept.rows, kept.cols)
        check_stream(kept.stream(transposed=transposed), matrix.t() if transposed else matrix)
    weight = draw.laid_out(draw.specials(shape, draw.one_of(FLOATS)))
    expected = torch.where(one, weight, 0)
    clear_masked_(weight, kept)
    assert torch.equal(weight.nan_to_num(), expected.nan_to_num())
    assert torch.equal(kept.update_(two).to_dense(), two)


def check_stream(stream: Any, matrix: Tensor) -> None:
    """Block by block of columns, in a block row by row."""
    blocks = matrix.split(stream.block, 1) if matrix.shape[1] else ()
    counts = torch.cat([block.sum(1) for block in blocks] or [torch.zeros(0, dtype=torch.int64)])
    columns = [block.nonzero()[:, 1] + i * stream.block for i, block in enumerate(blocks)]
    assert stream.start.tolist() == [0, *counts.cumsum(0).tolist()]
    assert stream.column.tolist() == [c for block in columns for c in block.tolist()]


def spmm(draw: Draw) -> None:
    dtype, rows, cols, samples, mask = matrix_case(draw)
    factors = {
        "weight": draw.laid_out(hidden(draw, draw.values((rows, cols), dtype), mask)),
        "x": draw.input(draw.values((cols, samples), dtype)),
    }
    if draw.chance(0.5):
        factors["bias"] = draw.input(draw.values((rows,), dtype))
    product(draw, "spmm", dtype, mask, factors)


def sddmm(draw: Draw) -> None:
    dtype, rows, cols, samples, mask = matrix_case(draw)
    a, b = (draw.input(draw.values((n, samples), dtype)) for n in (rows, cols))
    product(draw, "sddmm", dtype, mask, {"a": a, "b": b})


def masked_linear(draw: Draw) -> None:
    dtype, rows, cols, _, mask = matrix_case(draw)
    factors = {
        "x": draw.input(draw.values((*draw.shape(0, 2, 100), cols), dtype)),
        "weight": draw.laid_out(hidden(draw, draw.values((rows, cols), dtype), mask)),
    }
    if draw.chance(0.5):
        factors["bias"] = draw.input(draw.values((rows,), dtype))
    product(draw, "masked_linear", dtype, mask, factors, dense_grad=draw.chance(0.3))


def packed_linear(draw: Draw) -> None:
    dtype, rows, cols, _, mask = matrix_case(draw)
    weight = hidden(draw, draw.values((rows, cols), dtype), mask)
    x = draw.input(draw.values((*draw.shape(0, 2, 100), cols), dtype))
    packed = ops.pack_weight(draw.laid_out(weight), given_mask(draw, mask))
    bias = draw.input(draw.values((rows,), dtype)) if draw.chance(0.5) else None
    expected = reference.masked_linear(
        x.double(), torch.where(mask, weight, 0.0).double(), mask, None if bias is None else bias.double()
    )
    check_close(ops.packed_linear(x, packed, bias), expected, dtype, "packed_linear")


def masked_conv2d(draw: Draw) -> None:
    dtype, groups = draw.one_of(PRODUCTS), draw.one_of((1, 1, 1, 2, 3))
    own, filters = draw.one_of((1, 2, 3, 5, 17)), draw.one_of((1, 2, 3, 5, 17))
    taps = (1, 1) if draw.chance(0.3) else (draw.one_of((1, 2, 3, 5)), draw.one_of((1, 2, 3, 4)))
    stride, dilation = draw.one_of((1, 1, 2, 3, (1, 2))), draw.one_of((1, 1, 2, (2, 1)))
    padding: Any = draw.one_of((0, 0, 1, 2, (0, 3), "same" if stride == 1 else "valid"))
    least = [((dilation if isinstance(dilation, int) else dilation[i]) * (taps[i] - 1) + 1) for i in (0, 1)]
    samples = draw.size(most=draw.one_of((9, 9, 40)))
    size = [n + draw.source.randrange(draw.one_of((2, 9))) for n in least]
    shape = (filters * groups, own, *taps)
    mask = draw.mask(shape)
    x = draw.values((samples, own * groups, *size), dtype)
    samples_innermost = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    x = samples_innermost if draw.chance(0.3) else draw.input(x)
    factors = {"x": x, "weight": draw.laid_out(hidden(draw, draw.values(shape, dtype), mask))}
    if draw.chance(0.5):
        factors["bias"] = draw.input(draw.values(shape[:1], dtype))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    product(draw, "masked_conv2d", dtype, mask, factors, **geometry, dense_grad=draw.chance(0.3))


def scores(draw: Draw, least: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
    dtype = draw.one_of(FLOATS)
    shape = draw.shape(least, 4) if shape is None else shape
    t = draw.values(shape, dtype)
    if draw.chance(0.3):
        t = torch.where(
            draw.mask(shape, 0.3),
            draw.specials(shape, dtype).nan_to_num(nan=1.0, posinf=float("inf"), neginf=float("-inf")),
            t,
        )
    return draw.input(t)


def density(draw: Draw) -> float:
    return draw.one_of((1.0, 1e-9, 0.5, 1 - draw.source.random()))


def check_masks(name: str, actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bool
        assert torch.equal(a, e), name


def topk_mask(draw: Draw) -> None:
    layers = [scores(draw) for _ in range(draw.source.randint(1, 4))]
    keep, scope = density(draw), draw.one_of(("global", "layer"))
    check_masks(
        "topk_mask", ops.topk_mask(layers, keep, scope=scope), reference.topk_mask(layers, keep, scope=scope)
    )


def nm_mask(draw: Draw) -> None:
    m = draw.one_of((1, 2, 4, 5, 8, 33))
    n = draw.source.randint(1, m)
    shape = list(draw.shape(1, 3, 300))
    dim = draw.source.randrange(len(shape))
    shape[dim] = m * draw.source.randrange(5)
    t = scores(draw, shape=tuple(shape))
    dim -= draw.one_of((0, len(shape)))
    check_masks("nm_mask", [ops.nm_mask(t, n, m, dim)], [reference.nm_mask(t, n, m, dim)])


def group_mask(draw: Draw, name: str) -> None:
    keep = density(draw)
    t = draw.input(
        draw.values(draw.shape(2, 4), draw.one_of(FLOATS)).round()
    )  # norms that tie, or are far apart
    check_masks(name, [getattr(ops, name)(t, keep)], [getattr(reference, name)(t, keep)])


def step(draw: Draw, name: str) -> None:
    dtypes = [draw.one_of(STEPS) for _ in range(draw.source.randint(1, 3))]
    shapes = [draw.shape(2, 4, 2000) for _ in dtypes]

    def layers() -> list[Tensor]:
        return [draw.laid_out(draw.values(s, d)) for s, d in zip(shapes, dtypes, strict=True)]

    momentum = draw.one_of((0.0, 0.9))
    options = {"lr": draw.between(0, 1), "momentum": momentum, "weight_decay": draw.one_of((0.0, 0.1))}
    lists: dict[str, list[Tensor]] = {"weights": layers(), "grads": layers()}
    if name == "bip_score_step_":
        lists["scores"] = layers()
    if name != "masked_sgd_step_":
        options["gamma"] = draw.one_of((0.5, 10.0, float("inf")))
    if momentum or draw.chance(0.3):
        lists["momentum_buffers"] = layers()
    masks = [] if name == "bip_released_step_" else [draw.mask(s) for s in shapes]
    expected = {key: [double(t) for t in tensors] for key, tensors in lists.items()}
    given = {"masks": [given_mask(draw, mask) for mask in masks]} if masks else {}
    getattr(ops, name)(**lists, **given, **options)
    getattr(reference, name)(**expected, **({"masks": masks} if masks else {}), **options)
    for key, tensors in lists.items():
        for a, e, dtype in zip(tensors, expected[key], dtypes, strict=True):
            check_close(a, e, dtype, f"{name} {key}")


CASES: dict[str, Callable[[Draw], None]] = {
    "spmm": spmm,
    "sddmm": sddmm,
    "masked_linear": masked_linear,
    "packed_linear": packed_linear,
    "masked_conv2d": masked_conv2d,
    "topk_mask": topk_mask,
    "nm_mask": nm_mask,
    "SparseMask": sparse_mask,
}
CASES |= {name: partial(group_mask, name=name) for name in ("filter_mask", "channel_mask")}
CASES |= {
    name: partial(step, name=name) for name in ("bip_score_step_", "bip_released_step_", "masked_sgd_step_")
}

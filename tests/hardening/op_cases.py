"""One random call of each op, compared with its oracle. What a case promises is checked in it: values near the
oracle's in float64, arguments that are only read unchanged, and of a batch with NaN, infinities and the like, the other
samples as if it had none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from arbitrary import FLOATS, Draw
from torch import Tensor

from blokern import ops
from blokern.ops import curvature, reference, reference_curvature

NORMS = ("linf", "l2", "l1")
#: Of arithmetic in the dtype, or in float32 for halves, whose results are rounded.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PRODUCTS = (torch.float64, torch.float32, torch.bfloat16)
STEPS = (torch.float64, torch.float32)


def check_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    actual, expected = actual.double(), expected.double()
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance * max(size, 1e-3), msg=lambda text: f"{what}: {text}"
    )


def double(value: Any) -> Any:
    """As the oracles take it, some of which cannot differentiate along an expanded tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.double().clone(memory_format=torch.contiguous_format)


class Unchanged:
    """Fails if a tensor was written that is only read."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [(t, t.clone()) for t in tensors if t is not None]

    def check(self) -> None:
        for t, before in self.tensors:
            assert torch.equal(t.nan_to_num(), before.nan_to_num()), "an input was written"
            assert torch.equal(t.isnan(), before.isnan()), "an input was written"


# ---- Attack


def images(draw: Draw, dtype: torch.dtype) -> dict[str, Any]:
    shape = draw.shape(1, 4)
    per_sample = draw.chance(0.3)

    def size(high: float) -> Any:
        if per_sample:
            return torch.rand(shape[0], generator=draw.generator, dtype=torch.float64) * high
        return draw.one_of((0.0, draw.between(0, high)))

    grads = [dtype, *(FLOATS[2:] if dtype == torch.float32 else ())]
    clip_min = draw.between(-1, 1)
    return {
        "x_adv": draw.laid_out(draw.values(shape, dtype)),
        "x": draw.input(draw.values(shape, dtype)),
        "grad": draw.input(draw.values(shape, draw.one_of(grads))),
        "step_size": size(2.0),
        "eps": size(1.5),
        "norm": draw.one_of(NORMS),
        "clip_min": clip_min,
        "clip_max": clip_min + draw.between(0, 2),
        "active": draw.input(draw.mask(shape[:1])) if draw.chance(0.3) else None,
    }


def poisoned(draw: Draw, case: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], Tensor]:
    """The case with some samples' values replaced by special ones, and which samples were left."""
    n = case["x"].shape[0]
    bad = draw.mask((n,), 0.4)
    case = dict(case)
    for name in names:
        t = case[name].clone()
        t[bad] = draw.specials(t.shape, t.dtype)[bad]
        case[name] = draw.laid_out(t)
    return case, ~bad


def attack(draw: Draw, op: str, names: tuple[str, ...], written: tuple[str, ...], **more: Any) -> None:
    dtype = draw.one_of(FLOATS)
    case = images(draw, dtype)
    case = {name: case[name] for name in names if name in case}
    case.update(
        {name: draw.laid_out(draw.values(case["x"].shape, dtype)) for name in names if name not in case}
    )
    case |= more
    if op == "apgd_step_" and case["norm"] == "l1" and draw.chance(0.7):
        case["keep"] = draw.one_of((1, 2, 1000))

    def run(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        arguments = dict(arguments)
        for name in written:  # in their layout
            arguments[name] = torch.empty_strided(
                arguments[name].shape, arguments[name].stride(), dtype=arguments[name].dtype
            ).copy_(arguments[name])
        out = getattr(module, op)(**arguments)
        return tuple(arguments[name] for name in written) or (out if isinstance(out, tuple) else (out,))

    unchanged = Unchanged(*(case[name] for name in ("x", "grad") if name in case))
    actual = run(ops, case)
    unchanged.check()
    expected = run(reference, {name: double(value) for name, value in case.items()})
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.dtype == torch.bool:
            continue  # `free`, which turns where a rounding does: the properties' tests have it
        check_close(a, e, dtype, f"{op}[{i}]")
    bad_case, good = poisoned(draw, case, [name for name in ("x_adv", "z", "x", "grad") if name in case])
    for a, b in zip(actual, run(ops, bad_case), strict=True):
        check_close(b[good], a[good], dtype, f"{op} beside samples of NaN")


_SIZES = ("eps", "clip_min", "clip_max")
_BALL = (*_SIZES, "norm", "active")


def random_start(draw: Draw) -> None:
    case = images(draw, draw.one_of(FLOATS))
    case = {name: case[name] for name in ("x", *_SIZES, "norm")}
    seed = draw.source.getrandbits(30)
    one, two = (ops.random_start(**case, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, two)
    dtype = one.dtype
    low, high = (torch.tensor(case[name], dtype=torch.float64).to(dtype) for name in ("clip_min", "clip_max"))
    assert ((one >= low) & (one <= high)).all()
    inside = ops.project(one.double(), case["x"].double(), **{k: v for k, v in case.items() if k != "x"})
    box_meets_ball = (case["x"].double() >= case["clip_min"]) & (case["x"].double() <= case["clip_max"])
    if box_meets_ball.all():
        check_close(one, inside, dtype, "random_start's ball")


# ---- Sparse


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
    expected = differentiated(
        draw, lambda **leaves: run(reference, **leaves), dtype, **{k: t.double() for k, t in clean.items()}
    )
    labels = ["", *(f"'s gradient by {factor}" for factor in factors)]
    for label, a, e in zip(labels, actual, expected, strict=True):
        check_close(a, e, dtype, name + label)


def matrix_case(draw: Draw) -> tuple[torch.dtype, int, int, int, Tensor]:
    rows, cols = draw.size(), draw.size()
    return draw.one_of(PRODUCTS), rows, cols, draw.size(most=draw.one_of((17, 200))), draw.mask((rows, cols))


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
    if draw.chance(0.3):
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # samples innermost
    else:
        x = draw.input(x)
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


def group_mask(draw: Draw) -> None:
    name, keep = draw.one_of(("filter_mask", "channel_mask")), density(draw)
    t = draw.input(
        draw.values(draw.shape(2, 4), draw.one_of(FLOATS)).round()
    )  # norms that tie, or are far apart
    check_masks(name, [getattr(ops, name)(t, keep)], [getattr(reference, name)(t, keep)])


def steps(draw: Draw) -> None:
    name = draw.one_of(("bip_score_step_", "bip_released_step_", "masked_sgd_step_"))
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
    expected = {key: [t.double() for t in tensors] for key, tensors in lists.items()}
    given = {"masks": [given_mask(draw, mask) for mask in masks]} if masks else {}
    getattr(ops, name)(**lists, **given, **options)
    getattr(reference, name)(**expected, **({"masks": masks} if masks else {}), **options)
    for key, tensors in lists.items():
        for a, e, dtype in zip(tensors, expected[key], dtypes, strict=True):
            check_close(a, e, dtype, f"{name} {key}")


# ---- Curvature


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
        check_close(a, e, dtype, f"{args[0] if isinstance(args[0], str) else name}[{i}]")


def activation(draw: Draw) -> None:
    name, dtype = draw.one_of(list(curvature.ACTIVATIONS)), draw.one_of(FLOATS)
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


def batch_norm(draw: Draw) -> None:
    name = draw.one_of(("batch_norm_tangent", "batch_norm_adjoint", "batch_norm_adjoint_tangent"))
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


def layer_norm(draw: Draw) -> None:
    dtype, kinds, size = draw.one_of(FLOATS), draw.one_of((1, 1, 2, 3)), draw.size(100, least=1)
    rows = kinds * draw.size(33, least=1)
    x, x_dot, grad, grad_dot = (draw.input(draw.values((rows, size), dtype)) for _ in range(4))
    mean, rstd = x.double().mean(1), (x.double().var(1, correction=0) + 0.1) ** -0.5
    weight = draw.values((kinds, size), torch.float32).double()  # given, so that all agree on the kinds
    weight_dot, bias_dot = (
        optional(draw, draw.values((kinds, size), torch.float32).double()) for _ in range(2)
    )
    if draw.chance(0.5):
        with_oracle("layer_norm_tangent", dtype, x, x_dot, mean, rstd, weight, weight_dot, bias_dot)
    else:
        adjoint = draw.chance(0.5)
        with_oracle(
            "layer_norm_adjoint_tangent", dtype, grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot,
            adjoint=adjoint,
        )  # fmt: skip


CASES: dict[str, Callable[[Draw], None]] = {
    "pgd_step": lambda d: attack(d, "pgd_step", ("x_adv", "x", "grad", "step_size", *_BALL), ()),
    "pgd_step_": lambda d: attack(d, "pgd_step_", ("x_adv", "x", "grad", "step_size", *_BALL), ("x_adv",)),
    "project": lambda d: attack(d, "project", ("x_adv", "x", *_BALL), ()),
    "project_": lambda d: attack(d, "project_", ("x_adv", "x", *_BALL), ("x_adv",)),
    "apgd_step_": lambda d: attack(
        d,
        "apgd_step_",
        ("x_adv", "x_prev", "x", "grad", "step_size", *_BALL),
        ("x_adv", "x_prev"),
        momentum=0.75,
    ),
    "fast_bat_step": lambda d: attack(d, "fast_bat_step", ("z", "x", "grad", "step_size", *_SIZES), ()),
    "random_start": random_start,
    "spmm": spmm,
    "sddmm": sddmm,
    "masked_linear": masked_linear,
    "masked_conv2d": masked_conv2d,
    "topk_mask": topk_mask,
    "nm_mask": nm_mask,
    "filter_mask, channel_mask": group_mask,
    "bip_score_step_, bip_released_step_, masked_sgd_step_": steps,
    "activation_adjoint_tangent": activation,
    "softmax_cross_entropy_hvp": cross_entropy,
    "batch_norm_*": batch_norm,
    "layer_norm_*": layer_norm,
}

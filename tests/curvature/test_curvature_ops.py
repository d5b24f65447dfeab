"""The curvature kernels against their definitions, and what they promise torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import check_everywhere
from threads import check_threads
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from blokern import ops
from blokern.ops import reference_curvature as reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Of results of unit size: one rounding of the dtype, and what float32 sums lose.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

Results = tuple[Tensor, ...]


def close(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got.double(), want.double(), rtol=0.0, atol=TOLERANCE[dtype] * scale)


# ---- Batch normalisation

SHAPES = [
    (4, 3),
    (5, 40),
    (3, 2, 7),
    (4, 3, 5, 6),
    (2, 33, 4, 4),
    (2, 3, 2, 3, 2),
    (1, 5, 7, 9),
    (0, 3, 4, 4),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels inner": lambda t: t.movedim(-t_rank(t) + 1, -1).contiguous().movedim(-1, -t_rank(t) + 1),
    "samples inner": lambda t: t.movedim(-t_rank(t), -1).contiguous().movedim(-1, -t_rank(t)),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
}
_rank = 0


def t_rank(t: Tensor) -> int:
    """The dimensions of x, which t may be a stack of."""
    return _rank or t.dim()


def batch_norm_case(
    shape: tuple[int, ...], dtype: torch.dtype, stack: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments in a dtype that float64 copies of them mean exactly."""
    gen = torch.Generator().manual_seed(seed)
    lead = () if stack is None else (stack,)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)

    x = draw(*shape) + 2.0
    dims = [d for d in range(len(shape)) if d != 1]
    count = max(1, x.numel() // shape[1])
    mean = x.double().sum(dims) / count
    var = (x.double().square().sum(dims) / count - mean.square()).clamp(min=0.01)
    # Statistics may be of another dtype than x, as autocast has them.
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": x,
        "mean": mean.to(statistics),
        "rstd": (var + 1e-3).rsqrt().to(statistics),
        "weight": draw(shape[1]),
        "x_dot": draw(*lead, *shape),
        "weight_dot": draw(*lead, shape[1]),
        "bias_dot": draw(*lead, shape[1]),
        "grad": draw(*shape),
        "grad_dot": draw(*lead, *shape),
        "gate": draw(*shape),
    }


ARGUMENTS = {
    "batch_norm_tangent": ("x", "x_dot", "mean", "rstd", "weight", "weight_dot", "bias_dot"),
    "batch_norm_adjoint": ("grad", "x", "mean", "rstd", "weight"),
    "batch_norm_adjoint_tangent": ("grad", "grad_dot", "x", "x_dot", "mean", "rstd", "weight", "weight_dot"),
}


def call(module: Any, op: str, case: dict[str, Any], **how: Any) -> Results:
    result = getattr(module, op)(*(case.get(name) for name in ARGUMENTS[op]), **how)
    return (result,) if isinstance(result, Tensor) else result


def double(case: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() for name, t in case.items()}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_over_shapes(op: str, dtype: torch.dtype, gated: bool, train: bool) -> None:
    for shape in SHAPES:
        case = batch_norm_case(shape, dtype)
        how = {"gate": case["gate"] if gated else None, "train": train and shape[0] > 0}
        exact = how | {"gate": case["gate"].double() if gated else None}
        if "adjoint_tangent" in op:
            how["adjoint"] = exact["adjoint"] = gated
        close(call(ops, op, case, **how), call(reference, op, double(case), **exact), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_batch_norm_over_layouts(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((4, 3, 5, 6), (2, 40, 3, 3), (3, 2, 7)):
        monkeypatch.setattr(f"{__name__}._rank", len(shape))
        case = batch_norm_case(shape, torch.float64)
        expected = call(reference, op, case, gate=case["gate"])
        moved = {name: LAYOUTS[layout](t) if t.dim() == len(shape) else t for name, t in case.items()}
        results = call(ops, op, moved, gate=moved["gate"])
        close(results, expected, torch.float64)
        if layout == "channels inner":
            assert results[-3 if len(results) > 1 else 0].movedim(1, -1).is_contiguous()
        mixed = case | {name: moved[name] for name in ("x_dot", "grad_dot", "gate")}
        close(call(ops, op, mixed, gate=mixed["gate"]), expected, torch.float64)


@pytest.mark.parametrize("layout", ["contiguous", "channels inner"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_batch_norm_of_a_stack_is_that_of_each(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 5, 4, 2)
    monkeypatch.setattr(f"{__name__}._rank", len(shape))
    case = batch_norm_case(shape, torch.float32, stack=3)
    stacked = ("x_dot", "weight_dot", "bias_dot", "grad_dot")
    if op == "batch_norm_adjoint":
        stacked = ("grad",)
        case["grad"] = case["grad_dot"]
    case = {name: LAYOUTS[layout](t) if t.dim() >= len(shape) else t for name, t in case.items()}
    results = call(ops, op, case, gate=case["gate"])
    each = [
        call(ops, op, case | {name: case[name][i] for name in stacked}, gate=case["gate"]) for i in range(3)
    ]
    for result, *parts in zip(results, *each, strict=True):
        if result.numel() > 0:
            assert torch.equal(result, torch.stack(parts))


def test_batch_norm_adjoint_is_autograds() -> None:
    case = batch_norm_case((4, 3, 5, 6), torch.float64)
    x, weight = case["x"].requires_grad_(), case["weight"].requires_grad_()
    y = F.batch_norm(x, None, None, weight, torch.zeros(3).double(), training=True, eps=1e-3).relu()
    expected = torch.autograd.grad(y, (x, weight), case["grad"])
    with torch.no_grad():
        exact = case | {"rstd": (x.var((0, 2, 3), correction=0) + 1e-3) ** -0.5}
        results = call(ops, "batch_norm_adjoint", exact, gate=y)
    close(results[:2], expected, torch.float64)


def test_the_adjoint_beside_its_tangent_is_the_adjoint() -> None:
    case = batch_norm_case((4, 35, 5), torch.float64)
    both = call(ops, "batch_norm_adjoint_tangent", case, gate=case["gate"], adjoint=True)
    alone = call(ops, "batch_norm_adjoint", case, gate=case["gate"])
    close(both[:1], alone[:1], torch.float64)
    assert call(ops, "batch_norm_adjoint_tangent", case)[0].shape == (0,)


def test_without_weights() -> None:
    for op in ARGUMENTS:
        case = batch_norm_case((4, 3, 5), torch.float64)
        bare = {name: t for name, t in case.items() if not name.startswith(("weight", "bias"))}
        close(call(ops, op, bare), call(reference, op, bare), torch.float64)


# ---- Layer and group normalisation


def layer_norm_case(
    rows: int, size: int, kinds: int, dtype: torch.dtype, stack: int | None = None
) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    lead = () if stack is None else (stack,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    x = draw(rows, size) * 2.0 + 1.0
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": x,
        "x_dot": draw(*lead, rows, size),
        "mean": x.double().mean(1).to(statistics),
        "rstd": (x.double().var(1, correction=0) + 1e-3).rsqrt().to(statistics),
        "weight": draw(kinds, size),
        "weight_dot": draw(*lead, kinds, size),
        "bias_dot": draw(*lead, kinds, size),
        "grad": draw(rows, size),
        "grad_dot": draw(*lead, rows, size),
    }


ROW_ARGUMENTS = {
    "layer_norm_tangent": ("x", "x_dot", "mean", "rstd", "weight", "weight_dot", "bias_dot"),
    "layer_norm_adjoint_tangent": ("grad", "grad_dot", "x", "x_dot", "mean", "rstd", "weight", "weight_dot"),
}


def row_call(module: Any, op: str, case: dict[str, Any], **how: Any) -> Results:
    result = getattr(module, op)(*(case.get(name) for name in ROW_ARGUMENTS[op]), **how)
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("op", ROW_ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_over_shapes(op: str, dtype: torch.dtype) -> None:
    for rows, size, kinds in ((2, 5, 1), (6, 32, 1), (6, 33, 3), (300, 7, 2), (1, 9, 1)):
        case = layer_norm_case(rows, size, kinds, dtype)
        how = {"adjoint": rows % 2 == 0} if "adjoint" in op else {}
        close(row_call(ops, op, case, **how), row_call(reference, op, double(case), **how), dtype)
        moved = {name: torch.stack([t, t], -1)[..., 0] for name, t in case.items()}
        same = zip(row_call(ops, op, moved, **how), row_call(ops, op, case, **how), strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("op", ROW_ARGUMENTS)
def test_layer_norm_of_a_row_that_is_not_finite(op: str) -> None:
    for dtype in (torch.float64, torch.float32):
        case = layer_norm_case(6, 33, 3, dtype)
        expected = row_call(ops, op, case)
        case["x_dot"][2, 5] = torch.nan
        found = row_call(ops, op, case)
        rows = [0, 1, 3, 4, 5]
        which = 1 if "adjoint" in op else 0
        assert torch.equal(found[which][rows], expected[which][rows])
        assert found[which][2].isnan().all()


@pytest.mark.filterwarnings("ignore:var")
def test_layer_norm_of_nothing() -> None:
    case = layer_norm_case(0, 4, 1, torch.float32)
    assert row_call(ops, "layer_norm_tangent", case)[0].shape == (0, 4)
    bars = row_call(ops, "layer_norm_adjoint_tangent", case)
    assert torch.equal(bars[2], torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("op", ROW_ARGUMENTS)
def test_layer_norm_of_a_stack_is_that_of_each(op: str) -> None:
    case = layer_norm_case(140, 9, 2, torch.float32, stack=3)
    each = [
        row_call(ops, op, case | {k: case[k][i] for k in ("x_dot", "weight_dot", "bias_dot", "grad_dot")})
        for i in range(3)
    ]
    for result, *parts in zip(row_call(ops, op, case), *each, strict=True):
        if result.numel() > 0:
            assert torch.equal(result, torch.stack(parts))


@pytest.mark.parametrize("op", ROW_ARGUMENTS)
def test_layer_norm_without_weights(op: str) -> None:
    case = layer_norm_case(6, 9, 1, torch.float64)
    bare = {name: t for name, t in case.items() if not name.startswith(("weight", "bias"))}
    close(row_call(ops, op, bare), row_call(reference, op, bare), torch.float64)


# ---- Activations

PARAMETERS = {"softplus": (2.0, 3.0), "elu": (0.7, 1.3, 0.9)}


def activation_case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """grad, grad_dot, saved, x_dot"""
    gen = torch.Generator().manual_seed(0)
    grad, grad_dot, x, x_dot = (torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(4))
    x = 3.0 * x
    saved = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(name, torch.clone)(x)
    return tuple(t.to(dtype) for t in (grad, grad_dot, saved, x_dot))


@pytest.mark.parametrize("name", ops.curvature.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(name: str, dtype: torch.dtype) -> None:
    parameters = PARAMETERS.get(name, ())
    for shape in ((0,), (1,), (7, 13), (2, 3, 4, 5), (70,)):
        case = activation_case(name, shape, dtype)
        if dtype in (torch.bfloat16, torch.float16) and name in ("tanh", "sigmoid"):  # ±1 has no x
            case = (*case[:2], case[2].clamp(1e-3 - (name == "tanh"), 1.0 - 2.0**-7), case[3])
        exact = tuple(t.double() for t in case)
        for adjoint in (False, True):
            results = ops.activation_adjoint_tangent(name, *case, *parameters, adjoint=adjoint)
            expected = reference.activation_adjoint_tangent(name, *exact, *parameters, adjoint=adjoint)
            close(results, expected, dtype)
    case = activation_case(name, (2, 3, 4, 5), dtype)
    results = ops.activation_adjoint_tangent(name, *case, *parameters, adjoint=True)
    last = tuple(t.to(memory_format=torch.channels_last) for t in case)
    moved = ops.activation_adjoint_tangent(name, *last, *parameters, adjoint=True)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in moved)
    mixed = ops.activation_adjoint_tangent(name, *last[:2], *case[2:], *parameters, adjoint=True)
    sliced = tuple(torch.stack([t, t], -1)[..., 1] for t in case)
    apart = ops.activation_adjoint_tangent(name, *sliced, *parameters, adjoint=True)
    for other in (moved, mixed, apart):
        assert all(torch.equal(a, b) for a, b in zip(results, other, strict=True))
    grad, grad_dot, saved, x_dot = case
    stack = torch.stack([grad_dot, -grad_dot]), torch.stack([x_dot, 2.0 * x_dot])
    own, several = ops.activation_adjoint_tangent(
        name, grad, stack[0], saved, stack[1], *parameters, adjoint=True
    )
    assert torch.equal(own, results[0])
    assert torch.equal(several[0], results[1])
    one = ops.activation_adjoint_tangent(name, grad, stack[0][1], saved, stack[1][1], *parameters)[1]
    assert torch.equal(several[1], one)


@pytest.mark.parametrize("name", ops.curvature.ACTIVATIONS)
def test_activations_of_extreme_values(name: str) -> None:
    x = torch.tensor([-1e30, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e30, torch.nan])
    saved = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(name, torch.clone)(x)
    one = torch.ones_like(x)
    parameters = PARAMETERS.get(name, ())
    own, moved = ops.activation_adjoint_tangent(name, one, one, saved, one, *parameters, adjoint=True)
    assert own.isnan().tolist() == [False] * 8 + [True]
    assert moved.isnan().tolist() == [False] * 8 + [True]


# ---- Softmax cross-entropy


def cross_entropy_case(
    rows: int, classes: int, dtype: torch.dtype, *, soft: bool = False, weighted: bool = False, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    logits = (4.0 * torch.randn(rows, classes, generator=gen)).to(dtype)
    tangent = torch.randn(rows, classes, generator=gen).to(dtype)
    target = torch.randint(classes, (rows,), generator=gen)
    if rows > 2:
        target[rows // 2] = -100
    if soft:
        target = torch.rand(rows, classes, generator=gen).to(dtype)
    options = {"weight": torch.rand(classes, generator=gen).to(dtype)} if weighted else {}
    return (logits, tangent, target), options


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(
    dtype: torch.dtype, soft: bool, weighted: bool, smoothing: float, reduction: str
) -> None:
    for rows, classes in ((1, 1), (5, 3), (7, 32), (4, 33), (3, 70), (2, 1000), (0, 4)):
        arguments, options = cross_entropy_case(rows, classes, dtype, soft=soft, weighted=weighted)
        options |= {"label_smoothing": smoothing, "reduction": reduction}
        results = ops.softmax_cross_entropy_hvp(*arguments, **options)
        exact = [t.double() if t.is_floating_point() else t for t in arguments]
        exact_options = options | {name: t.double() for name, t in options.items() if isinstance(t, Tensor)}
        expected = reference.softmax_cross_entropy_hvp(*exact, **exact_options)
        assert all(t.dtype == dtype for t in results)
        if rows == 0 and reduction == "mean":
            assert results[0].isnan()
            continue
        close(results, expected, dtype)
        loss = F.cross_entropy(
            exact[0],
            exact[2],
            exact_options.get("weight"),
            reduction=reduction,
            label_smoothing=smoothing,
        )
        close(results[:1], (loss,), dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["labels", "ignored class", "soft"])
def test_cross_entropy_is_differentiated_right(kind: str, weighted: bool, smoothing: float) -> None:
    (logits, tangent, target), options = cross_entropy_case(
        6, 9, torch.float64, soft=kind == "soft", weighted=weighted
    )
    if kind == "ignored class":  # a label that is a class, and yet ignored
        target, options["ignore_index"] = target.clamp(min=0), int(target[0])
    options |= {"label_smoothing": smoothing}
    at = logits.clone().requires_grad_()
    loss = F.cross_entropy(at, target, **options)
    (grad,) = torch.autograd.grad(loss, at, create_graph=True)
    (hvp,) = torch.autograd.grad(grad, at, tangent)
    expected = loss.detach(), grad.detach(), hvp
    close(ops.softmax_cross_entropy_hvp(logits, tangent, target, **options), expected, torch.float64)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_over_layouts(dtype: torch.dtype, soft: bool) -> None:
    arguments, options = cross_entropy_case(5, 33, dtype, soft=soft, weighted=True)
    expected = ops.softmax_cross_entropy_hvp(*arguments, **options)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    ]
    for moved in layouts:
        found = ops.softmax_cross_entropy_hvp(
            *map(moved, arguments), **{name: moved(t) for name, t in options.items()}
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_cross_entropy_of_extreme_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-torch.inf, 0.0, 1.0], [-200.0, -300.0, -1e30]])
    tangent, target = torch.ones(3, 3), torch.tensor([0, 1, 0])
    loss, grad, hvp = ops.softmax_cross_entropy_hvp(logits, tangent, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    assert grad.isfinite().all()
    torch.testing.assert_close(hvp, torch.zeros(3, 3), rtol=0.0, atol=1e-6)  # H 1 = 0
    bad = logits.clone()
    bad[1, 2] = torch.nan
    loss, grad, hvp = ops.softmax_cross_entropy_hvp(bad, tangent, target)
    assert loss.isnan()
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_exponential_of_float32_is_within_two_ulp() -> None:
    """e^z − Q at the label's row of one class beside a constant: p itself, from the gradient of another class."""
    z = torch.linspace(-87.0, 0.0, 200_001)
    logits = torch.stack([torch.zeros_like(z), z], 1)
    grad = ops.softmax_cross_entropy_hvp(
        logits, logits, torch.zeros(len(z), dtype=torch.int64), reduction="sum"
    )[1]
    expected = torch.sigmoid(z.double())
    assert ((grad[:, 1].double() - expected) / expected).abs().max() < 4e-7


def test_every_label_ignored() -> None:
    logits, target = torch.randn(3, 4), torch.full((3,), 7)
    loss, grad, hvp = ops.softmax_cross_entropy_hvp(logits, logits, target, ignore_index=7)
    assert loss.isnan()
    assert not grad.any()
    assert not hvp.any()


# ---- Promises to torch


def overloads() -> dict[str, tuple[Any, ...]]:
    case = batch_norm_case((3, 4, 5, 2), torch.float32)
    stacked = batch_norm_case((3, 4, 5, 2), torch.float32, stack=2)
    (logits, tangent, target), _ = cross_entropy_case(4, 5, torch.float32)
    statistics = (case["mean"], case["rstd"], case["weight"])
    rows = layer_norm_case(6, 5, 2, torch.float32)
    return {
        "softmax_cross_entropy_hvp": (logits, tangent, target, torch.rand(5), -100, True, 0.1),
        **{
            f"{name}_adjoint_tangent": (
                *activation_case(name, (4, 5), torch.float32),
                True,
                *PARAMETERS.get(name, ()),
            )
            for name in ops.curvature.ACTIVATIONS
        },
        "layer_norm_tangent": tuple(rows[name] for name in ROW_ARGUMENTS["layer_norm_tangent"]),
        "layer_norm_adjoint_tangent": (
            *(rows[name] for name in ROW_ARGUMENTS["layer_norm_adjoint_tangent"][:-1]),
            *(None, True),
        ),
        "batch_norm_tangent": (
            *(case["x"], stacked["x_dot"], *statistics, stacked["weight_dot"], None),
            *(case["gate"], True),
        ),
        "batch_norm_adjoint": (case["grad"], case["x"], *statistics, None, False),
        "batch_norm_adjoint_tangent": (
            *(case["grad"], case["grad_dot"], case["x"], case["x_dot"], *statistics, None, None),
            *(True, True),
        ),
    }


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", overloads())
def test_opcheck(op: str) -> None:
    opcheck(getattr(torch.ops.blokern, op).default, overloads()[op], test_utils=OPCHECKS)


def test_opcheck_of_stacks_and_soft_targets() -> None:
    rows = layer_norm_case(6, 5, 2, torch.float32, stack=3)
    (logits, tangent, target), _ = cross_entropy_case(4, 5, torch.float32, soft=True)
    grad, grad_dot, saved, x_dot = activation_case("silu", (4, 5), torch.float32)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("softmax_cross_entropy_hvp", (logits, tangent, target, None, -100, False, 0.0)),
        ("layer_norm_tangent", tuple(rows[name] for name in ROW_ARGUMENTS["layer_norm_tangent"])),
        (
            "layer_norm_adjoint_tangent",
            (*(rows[name] for name in ROW_ARGUMENTS["layer_norm_adjoint_tangent"]), False),
        ),
        (
            "silu_adjoint_tangent",
            (grad, torch.stack([grad_dot] * 2), saved, torch.stack([x_dot] * 2), True),
        ),
    ]
    for op, arguments in calls:
        opcheck(getattr(torch.ops.blokern, op).default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("op", ["batch_norm_tangent", "batch_norm_adjoint", "batch_norm_adjoint_tangent"])
def test_fakes_have_the_kernels_layouts(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}._rank", 4)
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in ("contiguous", "channels inner", "samples inner"):
        case = batch_norm_case((3, 4, 5, 2), torch.float32)
        case = {name: LAYOUTS[layout](t) if t.dim() == 4 else t for name, t in case.items()}
        with FakeTensorMode() as mode:
            fakes = call(ops, op, {name: mode.from_tensor(t) for name, t in case.items()})
        for fake, real in zip(fakes, call(ops, op, case), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_compiled_in_one_graph() -> None:
    case = batch_norm_case((3, 4, 5, 2), torch.float32)
    (logits, tangent, target), _ = cross_entropy_case(4, 5, torch.float32)
    rows = layer_norm_case(6, 5, 2, torch.float32)
    activations = {name: activation_case(name, (4, 5), torch.float32) for name in ops.curvature.ACTIVATIONS}

    def run() -> Results:
        found = [*ops.softmax_cross_entropy_hvp(logits, tangent, target)]
        found += call(ops, "batch_norm_adjoint_tangent", case, adjoint=True)
        for op in ROW_ARGUMENTS:
            found += row_call(ops, op, rows)
        for name in ops.curvature.ACTIVATIONS:
            parameters = PARAMETERS.get(name, ())
            found += ops.activation_adjoint_tangent(name, *activations[name], *parameters, adjoint=True)
        return tuple(found)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(compiled, run(), strict=True))


def test_threads_do_not_change_a_bit() -> None:
    case = batch_norm_case((16, 24, 20, 21), torch.float32)
    inner = {name: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for name, t in case.items()}
    (logits, tangent, target), _ = cross_entropy_case(200, 300, torch.float32)
    rows = layer_norm_case(1000, 60, 2, torch.float32)
    gelu = activation_case("gelu", (300, 500), torch.float32)

    def run() -> list[Tensor]:
        found = [*ops.softmax_cross_entropy_hvp(logits, tangent, target)]
        for op in ROW_ARGUMENTS:
            found += row_call(ops, op, rows)
        found += ops.activation_adjoint_tangent("gelu", *gelu, adjoint=True)
        for op in ARGUMENTS:
            found += [*call(ops, op, case, gate=case["gate"]), *call(ops, op, inner)]
        return found

    check_threads(run)


def test_every_instruction_set() -> None:
    check_everywhere(
        """
import torch
import test_curvature_ops as t
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    t.test_cross_entropy(dtype, False, True, 0.3, "mean")
    for name in t.ops.curvature.ACTIVATIONS:
        t.test_activations(name, dtype)
    for op in t.ROW_ARGUMENTS:
        t.test_layer_norm_over_shapes(op, dtype)
    for op in t.ARGUMENTS:
        t.test_batch_norm_over_shapes(op, dtype, True, True)
t.test_exponential_of_float32_is_within_two_ulp()
t.test_cross_entropy_of_extreme_logits()
""",
        Path(__file__).parent,
    )

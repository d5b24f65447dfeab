"""The ops on lists of tensors against their definitions, and what they promise torch and a caller who is wrong."""

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

from blokern import ops
from blokern.ops import reference_curvature as reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Of results of unit size: one rounding of the dtype, and of sums of n products what float32 lanes lose.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SUM_TOLERANCE = 1e-13, 1e-6
#: Of each tensor, without the leading dimension: odd, empty, a scalar, several blocks.
SHAPES = [(3, 5), (0,), (), (33,), (2, 3, 4, 5), (16384 + 7,)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "inner dimensions permuted": lambda t: (
        t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t
    ),
    "columns innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 1],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}
Lists = dict[str, list[Tensor]]


def lists(columns: int, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0) -> Lists:
    gen = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randn(columns, *shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes]
        for name in ("x", "r", "p", "ap")
    }


def coefficients(columns: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.5, 0.7, columns).double(), torch.linspace(0.3, 2.0, columns).double()


def run(module: Any, on: Lists, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """All three ops, what they write and what they give, in a row."""
    dot = module.multi_tensor_dot(on["x"], on["r"])
    module.multi_tensor_axpby_(on["x"], on["p"], a, b)
    squares = module.cg_update_(on["x"], on["r"], on["p"], on["ap"], a)
    return *on["x"], *on["r"], dot, squares


def double(on: Lists) -> Lists:
    return {name: [t.to(torch.float64, copy=True) for t in tensors] for name, tensors in on.items()}


def close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, n: int) -> None:
    for got, want in zip(actual[:-2], expected[:-2], strict=True):
        assert got.dtype == dtype
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got.double(), want, rtol=0.0, atol=2 * TOLERANCE[dtype] * scale)
    for got, want in zip(actual[-2:], expected[-2:], strict=True):
        assert got.dtype == torch.float64
        # The halves' r is rounded after its square is summed.
        loss = SUM_TOLERANCE[dtype != torch.float64] if dtype.itemsize > 2 else TOLERANCE[dtype] / 2
        torch.testing.assert_close(got, want, rtol=0.0, atol=20 * loss * max(1, n))


@pytest.mark.parametrize("columns", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_over_dtypes_and_sizes(dtype: torch.dtype, columns: int) -> None:
    on = lists(columns, dtype)
    exact, (a, b) = double(on), coefficients(columns)
    n = sum(t[0].numel() for t in on["x"]) if columns else 0
    close(run(ops, on, a, b), run(reference, exact, a, b), dtype, n)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moved", [("x", "r", "p", "ap"), ("x",), ("r",), ("p", "ap")])
def test_over_layouts(layout: str, moved: tuple[str, ...]) -> None:
    on, (a, b) = lists(3, torch.float64), coefficients(3)
    expected = run(ops, {name: [t.clone() for t in tensors] for name, tensors in on.items()}, a, b)
    for name in moved:
        on[name] = [LAYOUTS[layout](t) for t in on[name]]
    found = run(ops, on, a, b)
    for got, want in zip(found[:-2], expected[:-2], strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(found[-2:], expected[-2:], rtol=1e-13, atol=1e-10)


def test_a_list_may_have_several_dtypes() -> None:
    (a, b), n = coefficients(2), 5
    on = {
        name: [t.to(dtype) for t, dtype in zip(tensors, (torch.float64, torch.float32), strict=True)]
        for name, tensors in lists(2, torch.float64, [(n,), (n, 2)]).items()
    }
    exact = double(on)
    found, expected = run(ops, on, a, b), run(reference, exact, a, b)
    assert [t.dtype for t in found[:2]] == [torch.float64, torch.float32]
    torch.testing.assert_close([t.double() for t in found], [*expected], rtol=1e-5, atol=1e-5)


def test_a_coefficient_of_zero_reads_nothing() -> None:
    on = lists(3, torch.float32)
    before = [t.clone() for t in on["x"]], [t.clone() for t in on["r"]]
    for name in ("p", "ap"):
        for t in on[name]:
            t[1] = torch.nan
    steps = torch.tensor([0.5, 0.0, 0.5]).double()
    squares = ops.cg_update_(on["x"], on["r"], on["p"], on["ap"], steps)
    assert all(
        torch.equal(t[1], old[1])
        for now, was in zip((on["x"], on["r"]), before, strict=True)
        for t, old in zip(now, was, strict=True)
    )
    assert squares[1] == ops.multi_tensor_dot(before[1], before[1])[1]
    assert squares.isfinite().all()
    one = torch.ones(3).double()
    ops.multi_tensor_axpby_(on["x"], on["p"], steps, one)
    assert torch.equal(on["x"][0][1], before[0][0][1])
    ops.multi_tensor_axpby_(on["p"], before[1], one, one - one)  # b = 0: what was there is not read
    assert all(torch.equal(t, r) for t, r in zip(on["p"], before[1], strict=True))


def test_what_is_not_finite_stays_in_its_column() -> None:
    on, (a, b) = lists(3, torch.float32), coefficients(3)
    on["p"][0][1, 0, 0] = torch.nan
    on["ap"][3][1, 2] = torch.inf
    found = run(ops, on, a, b)
    assert [bool(v) for v in found[-1].isfinite()] == [True, False, True]
    assert all(t[[0, 2]].isfinite().all() for t in found[:-2])
    assert found[0][1].isnan().sum() == 1


def test_a_neumann_step_has_the_residual_for_direction() -> None:
    on = lists(2, torch.float64)
    exact = {name: [t.clone() for t in tensors] for name, tensors in on.items()}
    steps = torch.tensor([0.3, 0.4]).double()
    squares = ops.cg_update_(on["x"], on["r"], on["r"], on["ap"], steps)
    expected = reference.cg_update_(
        exact["x"], exact["r"], [t.clone() for t in exact["r"]], exact["ap"], steps
    )
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(on["x"] + on["r"], exact["x"] + exact["r"])


def test_a_device_without_kernels_has_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (a, b), exact = coefficients(3), double(lists(3, torch.float64))
    expected = run(reference, exact, a, b)
    monkeypatch.setattr(ops.multi_tensor, "has_kernels", lambda device: False)
    found = run(ops, lists(3, torch.float64), a, b)
    assert all(map(torch.equal, found, expected))


def test_versions_move_with_what_is_written() -> None:
    on, (a, b) = lists(2, torch.float64), coefficients(2)
    versions = {name: [t._version for t in tensors] for name, tensors in on.items()}
    ops.multi_tensor_dot(on["x"], on["r"])
    ops.cg_update_(on["x"], on["r"], on["p"], on["ap"], a)
    ops.multi_tensor_axpby_(on["x"], on["p"], a, b)
    moved = {name: [t._version - v for t, v in zip(on[name], versions[name], strict=True)] for name in on}
    count = len(SHAPES)
    assert moved == {"x": [2] * count, "r": [1] * count, "p": [0] * count, "ap": [0] * count}


# ---- Promises to torch


def arguments(op: str) -> tuple[Any, ...]:
    on, (a, b) = lists(3, torch.float32, [(2, 3), (4,)]), coefficients(3)
    return {
        "multi_tensor_dot": (on["x"], on["r"]),
        "multi_tensor_axpby_": (on["x"], on["r"], a, b),
        "cg_update_": (on["x"], on["r"], on["p"], on["ap"], a),
    }[op]


OPS = ("multi_tensor_dot", "multi_tensor_axpby_", "cg_update_")


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(getattr(torch.ops.blokern, op).default, arguments(op), test_utils=tests)


def test_compiled_in_one_graph() -> None:
    (a, b), shapes = coefficients(3), [(2, 3), (4,)]

    def step(on: Lists) -> tuple[Tensor, ...]:
        return run(ops, on, a, b)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = compiled(lists(3, torch.float32, shapes))
    assert all(torch.equal(x, y) for x, y in zip(found, step(lists(3, torch.float32, shapes)), strict=True))


def test_threads_do_not_change_a_bit() -> None:
    shapes, (a, b) = [(300, 301), (7,), (64, 3, 3, 3), (1,)], coefficients(3)
    check_threads(lambda: run(ops, lists(3, torch.float32, shapes), a, b))


def test_every_instruction_set() -> None:
    check_everywhere(
        """
import test_multi_tensor as t
for dtype in t.DTYPES:
    t.test_over_dtypes_and_sizes(dtype, 3)
t.test_a_coefficient_of_zero_reads_nothing()
""",
        Path(__file__).parent,
    )


# ---- Wrong calls


def test_wrong_calls() -> None:
    on, (a, b) = lists(3, torch.float32, [(2, 3), (4,)]), coefficients(3)
    x, r, p, ap = on.values()
    row = torch.zeros(8)
    f, g, h = ops.multi_tensor_dot, ops.multi_tensor_axpby_, ops.cg_update_
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: f([], []), ValueError, "a must have at least one tensor"),
        (lambda: f(x[0], r), TypeError, "a must be a list of tensors, got Tensor"),  # type: ignore[arg-type]
        (lambda: f([x[0], 1.0], r), TypeError, r"a\[1\] must be a Tensor, got float"),  # type: ignore[list-item]
        (lambda: f(x, r[:1]), ValueError, "b must have as many tensors as a, 2, got 1"),
        (lambda: f([x[0], x[1][:2]], r), ValueError, r"a\[1\] must be a stack of as many as the others"),
        (lambda: f([torch.ones(())], [torch.ones(())]), ValueError, r"a\[0\] must be a stack"),
        (lambda: f([x[0].long()], [r[0].long()]), TypeError, r"a\[0\] must be float64, float32"),
        (lambda: f(x, [r[0], r[1].double()]), TypeError, r"b\[1\] must have the dtype of a\[1\]"),
        (lambda: f(x, [r[0][:, :1], r[1]]), ValueError, r"b\[0\] must have the shape of a\[0\]"),
        (lambda: g(x, r, a.float(), b), TypeError, "a must be float64"),
        (lambda: g(x, r, a, b[:2]), ValueError, r"b must have shape \[3\], one value a column"),
        (
            lambda: g([x[1][:, :1].expand(3, 4)], [r[1]], a, b),
            ValueError,
            "some of its elements may share memory",
        ),
        (
            lambda: g([row[:6].view(3, 2)], [row[2:8].view(3, 2)], a, b),
            ValueError,
            r"y\[0\] is written in place and shares memory with x\[0\]",
        ),
        (
            lambda: h(x, x, p, ap, a),
            ValueError,
            r"x\[\d\] is written in place and shares memory with r\[\d\]",
        ),
        (lambda: h(x, r, p[:1], ap, a), ValueError, "p must have as many tensors as x, 2, got 1"),
        (lambda: h(x, r, p, ap, a[:1]), ValueError, r"alpha must have shape \[3\]"),
        (
            lambda: h(x, r, p, [ap[0].clone().requires_grad_(), ap[1]], a),
            ValueError,
            r"ap\[0\] requires grad",
        ),
    ]
    before = [t.clone() for t in x + r]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(t, old) for t, old in zip(x + r, before, strict=True))

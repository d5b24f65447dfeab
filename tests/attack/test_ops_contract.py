"""What the attack ops promise to torch (schemas, tracing, versions) and to a caller who is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ops_cases import NORMS, calls, images
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from blokern import ops

OPS = ("pgd_step", "pgd_step_", "project", "project_", "apgd_step_")
ALL = [*itertools.product(OPS, NORMS), ("fast_bat_step", "linf")]


SCHEMAS = ("pgd_step", "pgd_step_", "project", "project_", "apgd_step_", "random_start", "fast_bat_step")


def _native_args(op: str, norm: int, per_sample: bool) -> tuple[object, ...]:
    x_adv, x, grad = images((3, 2, 5))
    each = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) if per_sample else None
    sizes = 0.1, 0.2, each, each
    active = torch.tensor([True, False, True])
    return {
        "pgd_step": (x_adv, x, grad, *sizes, norm, 0.0, 1.0, active),
        "project": (x_adv, x, 0.1, each, norm, 0.0, 1.0, None),
        "apgd_step": (x_adv, x.clone(), x, grad, *sizes, 0.75, norm, 0.0, 1.0, None, active),
        "random_start": (x, 0.1, each, norm, 0.0, 1.0, 2, None),
        "fast_bat_step": (x_adv - x, x, grad, *sizes, 0.0, 1.0),
    }[op.removesuffix("_")]


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(op: str, norm: int, per_sample: bool) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if op != "random_start":  # a new draw each call has nothing to compare itself with
        tests.append("test_aot_dispatch_dynamic")
    opcheck(getattr(torch.ops.blokern, op).default, _native_args(op, norm, per_sample), test_utils=tests)


def test_a_norm_that_is_none_is_refused_natively() -> None:
    for op in SCHEMAS[:-1]:
        with pytest.raises(ValueError, match="norm must be 0"):
            getattr(torch.ops.blokern, op)(*_native_args(op, 3, per_sample=False))


@pytest.mark.parametrize("norm", NORMS)
def test_calls_under_fake_tensors(norm: str) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.rand(3, 2, 5)
        assert ops.pgd_step(x, x, x, 0.1, 0.2, norm=norm).shape == x.shape
        ops.project_(x, x.clone(), 0.1, norm=norm)


def test_every_schema_is_checked_here() -> None:
    registered = {
        s.name.removeprefix("blokern::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("blokern::")
    }
    sparse = {
        "mask_words",
        "words_mask",
        "transpose_words",
        "mask_stream",
        "conv2d_entries",
        "conv2d_weight",
        "count_words",
        *("mask_check", "mask_fingerprint", "clear_masked_"),
        "spmm",
        "sddmm",
        "packed_values",
        "packed_spmm",
        "masked_conv2d",
        "masked_conv2d_input",
        "bip_score_step_",
        "bip_released_step_",
        "masked_sgd_step_",
        "masked_conv2d_weight",
        "topk_mask",
        "nm_mask",
        *(f"traced_{name}" for name in ("spmm", "sddmm", "conv2d", "conv2d_input", "conv2d_weight")),
    }  # in tests/sparse
    curvature = {
        "batch_norm_adjoint",
        "batch_norm_adjoint_tangent",
        "batch_norm_tangent",
        "layer_norm_adjoint_tangent",
        "layer_norm_tangent",
        "softmax_cross_entropy_hvp",
        *ops.multi_tensor.__all__,
        *(f"{name}_adjoint_tangent" for name in ops.curvature.ACTIVATIONS),
    }  # in tests/curvature
    assert registered - sparse - curvature == set(SCHEMAS)


@pytest.mark.parametrize(("op", "norm"), ALL)
def test_compiles_in_one_graph_to_the_same_bits(op: str, norm: str) -> None:
    torch._dynamo.reset()
    call = calls(ops, norm)[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = images((3, 3, 6, 10))
    for got, want in zip(compiled(*tensors), call(*tensors), strict=True):
        assert torch.equal(got, want)


def test_inductor_compiles_a_loop() -> None:
    torch._dynamo.reset()

    def loop(x: Tensor, grad: Tensor) -> Tensor:
        x_adv = ops.random_start(x, 0.1)
        for _ in range(3):
            ops.pgd_step_(x_adv, x, grad, 0.02, 0.1)
        return x_adv

    _, x, grad = images((3, 3, 6, 10))
    torch.manual_seed(0)
    want = loop(x, grad)
    torch.manual_seed(0)
    assert torch.equal(torch.compile(loop, fullgraph=True)(x, grad), want)


@pytest.mark.parametrize("norm", NORMS)
def test_a_loop_of_steps_is_compiled_once(norm: ops.Norm) -> None:
    """Twice, by torch's own rule: a number is a constant until it is seen to change."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 4))
    x, y = torch.rand(3, 2, 3, 3), torch.tensor([0, 1, 3])

    def loss(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(z), y)

    def step(x_adv: Tensor, x_prev: Tensor, eps: float, number: int) -> Tensor:
        grad = torch.func.grad(loss)(x_adv).detach()
        ops.pgd_step_(x_adv, x, grad, eps * 0.8**number, eps, norm=norm)
        ops.apgd_step_(x_adv, x_prev, x, grad, eps / (number + 1), eps, norm=norm)
        return ops.project(x_adv, x, eps / 2, norm=norm)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    ours, theirs = [x.clone(), x.clone()], [x.clone(), x.clone()]
    for number in range(5):
        eps = 0.1 + 0.05 * number
        assert torch.equal(compiled(*ours, eps, number), step(*theirs, eps, number))
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
    assert graphs.frame_count == 2


@pytest.mark.parametrize("norm", NORMS)
def test_vmap(norm: str) -> None:
    x_adv, x, grad = (t.view(4, 3, 3, 6, 5) for t in images((12, 3, 6, 5)))
    eps = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    step = lambda a, b, g: ops.pgd_step(a, b, g, 0.1, eps, norm=norm)  # noqa: E731
    want = torch.stack([step(a, b, g) for a, b, g in zip(x_adv, x, grad, strict=True)])
    assert torch.equal(torch.vmap(step)(x_adv, x, grad), want)
    moved = torch.vmap(step, in_dims=(1, 0, 0))(x_adv.transpose(0, 1), x, grad)
    assert torch.equal(moved, want)
    shared = torch.vmap(lambda g: ops.pgd_step(x_adv[0], x[0], g, 0.1, 0.2, norm=norm))(grad)
    assert torch.equal(shared[1], ops.pgd_step(x_adv[0], x[0], grad[1], 0.1, 0.2, norm=norm))
    projected = torch.vmap(lambda a, b: ops.project(a, b, 0.1, norm=norm))(x_adv, x)
    assert torch.equal(projected[2], ops.project(x_adv[2], x[2], 0.1, norm=norm))
    delta, free = torch.vmap(lambda a, b, g: ops.fast_bat_step(a, b, g, 0.1, 0.2))(x_adv - x, x, grad)
    assert torch.equal(delta[3], ops.fast_bat_step((x_adv - x)[3], x[3], grad[3], 0.1, 0.2)[0])
    assert free.dtype == torch.bool


def test_in_place_bumps_the_version_and_autograd_notices() -> None:
    x_adv, x, grad = images((2, 3, 4, 4))
    x_prev = x_adv.clone()
    for call in (
        lambda: ops.pgd_step_(x_adv, x, grad, 0.1, 0.1),
        lambda: ops.project_(x_adv, x, 0.1, norm="l2"),
        lambda: ops.apgd_step_(x_adv, x_prev, x, grad, 0.1, 0.1),
    ):
        before = x_adv._version
        assert call() is x_adv
        assert x_adv._version > before
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * x_adv).sum()
    ops.pgd_step_(x_adv, x, grad, 0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        x_adv, x, grad = images((2, 3, 4, 4))
        assert torch.equal(
            ops.pgd_step_(x_adv.clone(), x, grad, 0.1, 0.1), ops.pgd_step(x_adv, x, grad, 0.1, 0.1)
        )


WRONG: list[tuple[type[Exception], str, Callable[[Tensor, Tensor, Tensor], object]]] = [
    (ValueError, "eps must be at least 0, got -0.1", lambda a, x, g: ops.pgd_step_(a, x, g, 0.1, -0.1)),
    (ValueError, "eps must be at least 0, got nan", lambda a, x, g: ops.project(a, x, float("nan"))),
    (ValueError, "eps must be at least 0", lambda a, x, g: ops.random_start(x, torch.tensor([0.1, -1.0]))),
    (ValueError, "first must be at least 0, got -1", lambda a, x, g: ops.random_start(x, 0.1, first=-1)),
    (TypeError, "first must be an int, got float", lambda a, x, g: ops.random_start(x, 0.1, first=1.5)),
    (ValueError, "step_size must be finite", lambda a, x, g: ops.pgd_step(a, x, g, float("inf"), 0.1)),
    (ValueError, "clip_min must be at most clip_max", lambda a, x, g: ops.project_(a, x, 0.1, clip_min=2.0)),
    (
        ValueError,
        "clip_min must be at most clip_max",
        lambda a, x, g: ops.project_(a, x, 0.1, clip_max=float("nan")),
    ),
    (
        ValueError,
        "norm must be one of 'linf', 'l2', 'l1', got 'l_inf'; did you mean 'linf'",
        lambda a, x, g: ops.project(a, x, 0.1, norm="l_inf"),
    ),
    (
        ValueError,
        r"x must have the shape of x_adv, \[2, 3, 4, 4\], got \[2, 3, 4\]",
        lambda a, x, g: ops.pgd_step_(a, x[..., 0], g, 0.1, 0.1),
    ),
    (ValueError, "grad must have the shape of x_adv", lambda a, x, g: ops.pgd_step_(a, x, g[:1], 0.1, 0.1)),
    (
        ValueError,
        r"eps must have shape \[2\], one value a sample, got \[3\]",
        lambda a, x, g: ops.pgd_step_(a, x, g, 0.1, torch.ones(3)),
    ),
    (
        ValueError,
        r"active must have shape \[2\]",
        lambda a, x, g: ops.pgd_step_(a, x, g, 0.1, 0.1, active=torch.ones(3).bool()),
    ),
    (
        TypeError,
        "active must be Bool, got Float",
        lambda a, x, g: ops.pgd_step_(a, x, g, 0.1, 0.1, active=torch.ones(2)),
    ),
    (
        TypeError,
        "x must have the dtype of x_adv, Float, got Double",
        lambda a, x, g: ops.pgd_step_(a, x.double(), g, 0.1, 0.1),
    ),
    (
        TypeError,
        "grad must have the dtype of x_adv, Float, or be bfloat16 or float16, got Double",
        lambda a, x, g: ops.pgd_step_(a, x, g.double(), 0.1, 0.1),
    ),
    (
        TypeError,
        "x_adv must be float64, float32, bfloat16 or float16, got Long",
        lambda a, x, g: ops.pgd_step_(a.long(), x.long(), g.long(), 0.1, 0.1),
    ),
    (TypeError, "z must be float64", lambda a, x, g: ops.fast_bat_step(a.int(), x.int(), g.int(), 0.1, 0.1)),
    (
        ValueError,
        "a batch dimension",
        lambda a, x, g: ops.pgd_step_(torch.tensor(0.5), torch.tensor(0.5), torch.tensor(0.5), 0.1, 0.1),
    ),
    (ValueError, "may share memory", lambda a, x, g: ops.pgd_step_(a[:1].expand_as(a), x, g, 0.1, 0.1)),
    (
        ValueError,
        "shares part of its memory with x",
        lambda a, x, g: ops.pgd_step_(
            a.view(-1)[1:].view(1, -1), a.view(-1)[:-1].view(1, -1), g.view(-1)[1:].view(1, -1), 0.1, 0.1
        ),
    ),
    (
        ValueError,
        "x_prev is written in place and shares memory with x_adv",
        lambda a, x, g: ops.apgd_step_(a, a, x, g, 0.1, 0.1),
    ),
    (
        ValueError,
        "momentum must be in",
        lambda a, x, g: ops.apgd_step_(a, a.clone(), x, g, 0.1, 0.1, momentum=1.5),
    ),
    (
        ValueError,
        "keep must be at least 1, got 0",
        lambda a, x, g: ops.apgd_step_(a, a.clone(), x, g, 0.1, 0.1, norm="l1", keep=0),
    ),
    (ValueError, "keep is for norm", lambda a, x, g: ops.apgd_step_(a, a.clone(), x, g, 0.1, 0.1, keep=3)),
    (
        ValueError,
        "x_adv requires grad, and this op has no derivative",
        lambda a, x, g: ops.pgd_step_(a.requires_grad_(), x, g, 0.1, 0.1),
    ),
    (ValueError, "grad requires grad", lambda a, x, g: ops.fast_bat_step(a, x, g.requires_grad_(), 0.1, 0.1)),
    (TypeError, "x_adv must be a Tensor, got list", lambda a, x, g: ops.project([0.5], x, 0.1)),
    (TypeError, "eps must be a float or a Tensor, got str", lambda a, x, g: ops.project(a, x, "0.1")),
    (TypeError, "grad must be a Tensor, got NoneType", lambda a, x, g: ops.pgd_step(a, x, None, 0.1, 0.1)),
    (TypeError, "clip_max must be a float", lambda a, x, g: ops.project(a, x, 0.1, clip_max=None)),
    (
        TypeError,
        "step_size must be a float or a Tensor, got list",
        lambda a, x, g: ops.pgd_step(a, x, g, [0.1, 0.2], torch.tensor([0.1, 0.2])),
    ),
    (
        TypeError,
        "eps must be a Tensor of real numbers, got torch.complex64",
        lambda a, x, g: ops.project(a, x, torch.tensor([0.1j, 0.2])),
    ),
    (
        TypeError,
        "step_size must be a Tensor of real numbers, got torch.bool",
        lambda a, x, g: ops.pgd_step(a, x, g, torch.tensor([True, False]), 0.1),
    ),
    (
        ValueError,
        "norm must be one of 'linf', 'l2', 'l1', got None",
        lambda a, x, g: ops.project(a, x, 0.1, norm=None),
    ),
    (
        TypeError,
        "x must be a dense tensor, got one of layout",
        lambda a, x, g: ops.project(a, x.to_sparse(), 0.1),
    ),
    (
        TypeError,
        "x_adv must be a Tensor, got ndarray",
        lambda a, x, g: ops.project(a.numpy(), x, torch.ones(2)),
    ),
]


@pytest.mark.parametrize(
    ("kind", "message", "call"), WRONG, ids=[f"{i}-{m[:40]}" for i, (_, m, _) in enumerate(WRONG)]
)
def test_a_wrong_call_says_what_is_wrong(
    kind: type[Exception], message: str, call: Callable[..., object]
) -> None:
    tensors = images((2, 3, 4, 4))
    before = [t.clone() for t in tensors]
    with pytest.raises(kind, match=message):
        call(*tensors)
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t, old)


def boxed(ops_: object, images: tuple[Tensor, Tensor, Tensor], **box: object) -> list[Callable[[], object]]:
    """Every op with a box."""
    a, x, g = images
    steps = [lambda norm=norm: ops_.pgd_step(a, x, g, 0.1, 0.1, norm=norm, **box) for norm in NORMS]
    return [
        *steps,
        lambda: ops_.pgd_step_(a.clone(), x, g, 0.1, 0.1, **box),
        lambda: ops_.project(a, x, 0.1, **box),
        lambda: ops_.project_(a.clone(), x, 0.1, **box),
        lambda: ops_.apgd_step_(a.clone(), a.clone(), x, g, 0.1, 0.1, **box),
        lambda: ops_.random_start(x, 0.1, **box),
        lambda: ops_.fast_bat_step(a, x, g, 0.1, 0.1, **box),
    ]


@pytest.mark.parametrize("bound", ["clip_min", "clip_max"])
@pytest.mark.parametrize(
    "value", [torch.zeros(3, 1, 1), torch.tensor(0.5), torch.ones(1), [0.0, 0.0, 0.0], np.ones(3), "1", 1j]
)
def test_a_box_is_two_numbers(bound: str, value: object) -> None:
    for call in boxed(ops, images((2, 3, 4, 4)), **{bound: value}):
        with pytest.raises(
            TypeError, match=f"{bound} must be a float, got {type(value).__name__}: the box is the same"
        ):
            call()


def test_numbers_of_other_kinds() -> None:
    """NumPy's scalars, integers, and tensors of one value are the numbers that they are."""
    x_adv, x, grad = images((2, 3, 4, 4))
    want = ops.pgd_step(x_adv, x, grad, 0.5, 0.25)
    for half, quarter in (
        (np.float32(0.5), np.float64(0.25)),
        (torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float16)),
        (np.float32(0.5), torch.full((2,), 0.25)),
    ):
        assert torch.equal(ops.pgd_step(x_adv, x, grad, half, quarter), want)
        assert torch.equal(
            ops.pgd_step(x_adv, x, grad, half, quarter, clip_min=np.int64(0), clip_max=np.float32(1)), want
        )
    kept = [
        ops.apgd_step_(x_adv.clone(), x.clone(), x, grad, 0.5, 0.25, norm="l1", keep=keep)
        for keep in (3, np.int64(3))
    ]
    assert torch.equal(*kept)


def test_the_same_tensor_may_be_image_and_start() -> None:
    for norm in NORMS:
        _, x, grad = images((2, 3, 4, 4))
        want = ops.pgd_step(x, x.clone(), grad, 0.1, 0.1, norm=norm)
        assert torch.equal(ops.pgd_step_(x, x, grad, 0.1, 0.1, norm=norm), want)

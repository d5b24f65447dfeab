"""Half-precision images: what an op stores lies in the ball and in the box, as the real numbers that are stored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import check_everywhere
from threads import check_threads
from torch import Tensor, nn

from blokern import ops
from blokern.attack import evaluate
from blokern.ops import reference

HALVES = (torch.bfloat16, torch.float16)
NORMS = ("linf", "l2", "l1")
ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
#: L∞ is exact; the others know the norm as sums of float32 do.
SLACK = {"linf": 0.0, "l2": 1e-6, "l1": 1e-6}
#: Boxes with bounds that no half has, and none.
BOXES = ((0.0, 1.0), (-2.118, 2.64), (0.1, 0.9), (-math.inf, math.inf))

half_types = pytest.mark.parametrize("dtype", HALVES, ids=str)


def case(
    dtype: torch.dtype, box: tuple[float, float], scale: float, seed: int = 0, size: int = 301
) -> Tensor:
    """Images [3, size] in the box, up to `scale` in magnitude."""
    gen = torch.Generator().manual_seed(seed)
    x = scale * (2.4 * torch.rand(3, size, generator=gen, dtype=torch.float64) - 0.9)
    low, high = reference._box_in(dtype, *box)
    return x.clamp(low, high).to(dtype).clamp(low, high)


def outputs(x: Tensor, eps: float, norm: str, box: tuple[float, float], seed: int = 0) -> dict[str, Tensor]:
    """What every op stores around x, from near and from far."""
    gen = torch.Generator().manual_seed(seed)
    grad = torch.randn(x.shape, generator=gen).to(x.dtype)
    how = {"norm": norm, "clip_min": box[0], "clip_max": box[1]}
    found = {"random_start": ops.random_start(x, eps, generator=gen, **how)}
    for far in (0.3, 3.0):
        start = (x.double() + far * eps * torch.randn(x.shape, generator=gen).double()).to(x.dtype)
        sizes = eps * torch.tensor([far, 1.0, 0.1], dtype=torch.float64)
        found |= {
            f"project {far}": ops.project(start, x, eps, **how),
            f"pgd_step {far}": ops.pgd_step(start, x, grad, far * eps, eps, **how),
            f"pgd_step_ {far}": ops.pgd_step_(
                start.clone(), x, grad, sizes, sizes.new_full((3,), eps), **how
            ),
            f"apgd_step_ {far}": ops.apgd_step_(start.clone(), x.clone(), x, grad, far * eps, eps, **how),
            f"apgd_step_ without momentum {far}": ops.apgd_step_(
                start.clone(), x.clone(), x, grad, far * eps, eps, momentum=1.0, **how
            ),
        }
    return found


def check_inside(out: Tensor, x: Tensor, eps: float, norm: str, box: tuple[float, float]) -> None:
    distance = torch.linalg.vector_norm(out.double() - x.double(), ORDER[norm], dim=1)
    assert (distance <= eps * (1 + SLACK[norm])).all(), (distance.max().item(), eps)
    assert box[0] <= out.double().min()
    assert out.double().max() <= box[1]


@half_types
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_every_op_stores_points_of_ball_and_box(
    dtype: torch.dtype, norm: str, box: tuple[float, float]
) -> None:
    for scale in (1.0, 1e-3, 1e-6, 50.0):
        x = case(dtype, box, scale)
        for eps in (8 / 255, 0.125, 1e-3, 1e-7, 3.0):
            for out in outputs(x, eps, norm, box).values():
                assert out.dtype == dtype
                check_inside(out, x, eps, norm, box)


@half_types
@settings(max_examples=300, deadline=None)
@given(
    st.floats(-65504, 65504, width=16),
    st.floats(0, 1e5),
    st.floats(-2, 2),
    st.sampled_from(NORMS),
    st.integers(0, 9),
)
def test_single_pixels(
    dtype: torch.dtype, pixel: float, eps: float, grad: float, norm: str, shift: int
) -> None:
    """Tiny pixels beside large radii, denormal halves, the type's end: the sum x + eps itself is rarely a float."""
    eps *= 2.0 ** -(2 * shift)
    x = torch.tensor([[pixel]], dtype=dtype)
    everywhere = (-math.inf, math.inf)
    got = ops.pgd_step(
        x, x, torch.full_like(x, grad), 2 * eps, eps, norm=norm, clip_min=-math.inf, clip_max=math.inf
    )
    check_inside(got, x, eps, norm, everywhere)
    check_inside(
        ops.random_start(x, eps, norm=norm, clip_min=-math.inf, clip_max=math.inf), x, eps, norm, everywhere
    )


@half_types
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_bounds_are_the_nearest_that_are_inside(dtype: torch.dtype, box: tuple[float, float]) -> None:
    """The oracle's bits: nothing of the ball is given away that the type could have."""
    for scale in (1.0, 1e-3, 1e-6):
        x = case(dtype, box, scale)
        grad = torch.where(torch.arange(x.numel()).view(x.shape) % 2 == 0, 1.0, -1.0).to(dtype)
        for eps in (8 / 255, 0.125, 1e-3, 1e-7):
            how = {"clip_min": box[0], "clip_max": box[1]}
            got = ops.pgd_step(x, x, grad, 5 * eps, eps, **how)
            assert torch.equal(got, reference.pgd_step(x, x, grad, 5 * eps, eps, **how))


def test_the_value_of_the_report() -> None:
    x = torch.full((1, 1), 0.498046875, dtype=torch.bfloat16)
    assert (
        ops.pgd_step(x, x, torch.ones_like(x), 1.0, 8 / 255).item() == 0.52734375
    )  # 0.53125 is 5.8 % too far


@half_types
def test_fast_bat_delta(dtype: torch.dtype) -> None:
    for box in BOXES:
        for scale, eps in ((1.0, 8 / 255), (1e-3, 8 / 255), (1.0, 1e-7), (1.0, 0.3)):
            x = case(dtype, box, scale)
            gen = torch.Generator().manual_seed(1)
            z, grad = (eps * torch.randn(x.shape, generator=gen).to(dtype) for _ in range(2))
            delta, free = ops.fast_bat_step(z, x, grad, 2.0, eps, clip_min=box[0], clip_max=box[1])
            moved = x.double() + delta.double()
            assert (delta.double().abs() <= eps).all()
            assert box[0] <= moved.min()
            assert moved.max() <= box[1]
            want, want_free = reference.fast_bat_step(z, x, grad, 2.0, eps, clip_min=box[0], clip_max=box[1])
            torch.testing.assert_close(delta, want)
            assert (free != want_free).sum() <= 0.02 * free.numel()
            assert 0 < free.sum() < free.numel() or eps == 1e-7


@half_types
def test_a_box_without_numbers_of_the_type_is_refused(dtype: torch.dtype) -> None:
    x = torch.full((1, 2), 0.3, dtype=dtype)
    with pytest.raises(ValueError, match=r"lies between clip_min and clip_max, got clip_min=0\.3001"):
        ops.project(x, x, 0.1, clip_min=0.3001, clip_max=0.3002)
    with pytest.raises(ValueError, match=r"got clip_min=0\.9999999 and clip_max=0\.99999991"):  # all digits
        ops.project(x, x, 0.1, clip_min=0.9999999, clip_max=0.99999991)


@half_types
@pytest.mark.parametrize("norm", ["linf", "l2"])  # for l1 it has no sign, and is not moved
def test_not_a_number_stays_one(dtype: torch.dtype, norm: str) -> None:
    x = torch.tensor([[0.5, 0.25], [0.5, 0.25]], dtype=dtype)
    x_adv = torch.tensor([[math.nan, 0.25], [0.5, 0.3]], dtype=dtype)
    out = ops.project(x_adv, x, 0.1, norm=norm)
    assert out[0, 0].isnan()
    assert out[1].isfinite().all()


@half_types
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x = case(dtype, (0.0, 1.0), 1.0, size=20000)
    for norm in NORMS:
        check_threads(lambda norm=norm: [*outputs(x, 8 / 255, norm, (0.0, 1.0)).values()])


def test_the_oracle_s_bits_on_every_instruction_set() -> None:
    check_everywhere(
        "import test_half_images as t\n"
        "for dtype in t.HALVES:\n"
        "    for box in t.BOXES: t.test_bounds_are_the_nearest_that_are_inside(dtype, box)\n"
        "    for norm in t.NORMS: t.test_every_op_stores_points_of_ball_and_box(dtype, norm, (0.0, 1.0))",
        Path(__file__).parent,
    )


@half_types
@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_of_a_half_network(dtype: torch.dtype, norm: ops.Norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).to(dtype)
    x, y = torch.rand(12, 3, 4, 4).to(dtype), torch.randint(0, 4, (12,))
    result = evaluate(model, [(x, y)], eps={"linf": 8 / 255, "l2": 0.5, "l1": 2.0}[norm], norm=norm)
    assert 0 <= result.robust_accuracy <= result.clean_accuracy <= 100

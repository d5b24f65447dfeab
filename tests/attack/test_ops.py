"""The attack kernels against their float64 oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops_cases import DTYPES, HALVES, NORMS, SIZES, TOLERANCE, calls, images
from threads import check_threads
from torch import Tensor

from blokern import ops
from blokern.ops import reference

OPS = ("pgd_step", "pgd_step_", "project", "project_", "apgd_step_")
ALL = [*itertools.product(OPS, NORMS), ("fast_bat_step", "linf")]
every_op = pytest.mark.parametrize(("op", "norm"), ALL)

# A vector and a tail, a tail alone, one element, whole vectors, several blocks of a sum, several threads' worth.
SHAPES = [(3, 3, 7, 11), (2, 5), (4,), (1, 1), (2, 64), (2, 3, 80, 80), (40, 3, 32, 32)]
EMPTY = [(0, 3, 4, 4), (2, 0, 4), (0,)]


def check(op: str, norm: str, tensors: tuple[Tensor, Tensor, Tensor], tol: float, **options: object) -> None:
    got = calls(ops, norm, **options)[op](*tensors)
    # Of half images the oracle has the store's rounding, too, and computes in float64 itself.
    exact = tensors if tensors[0].dtype in HALVES else [t.double() for t in tensors]
    want = calls(reference, norm, **options)[op](*exact)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        if one.dtype == torch.bool:
            # Only the kernel's own precision can say what is strictly inside: the exact test is test_free_is_exact.
            assert (one != other).sum() <= (0.0 if tol < 1e-10 else 0.05) * one.numel()
        else:
            assert one.dtype == tensors[0].dtype
            torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tol)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_equals_the_oracle(op: str, norm: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(op, norm, images(shape, dtype), TOLERANCE[dtype])


@every_op
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_images_take_half_gradients(op: str, norm: str, grad_dtype: torch.dtype) -> None:
    x_adv, x, grad = images((3, 3, 9, 9))
    check(op, norm, (x_adv, x, grad.to(grad_dtype)), TOLERANCE[torch.float32])


def _layouts(t: Tensor) -> dict[str, Tensor]:
    """t's values in other memory: each is equal to t."""
    n, c, h, w = t.shape
    wide = t.new_zeros(2 * n, c, h, w)
    wide[::2] = t
    narrow = t.new_zeros(n, c, h, 2 * w)
    narrow[..., ::2] = t
    shifted = t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
    return {
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "samples innermost": t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every second sample": wide[::2],
        "every second column": narrow[..., ::2],
        "transposed": t.transpose(2, 3).contiguous().transpose(2, 3),
        "misaligned": shifted,
    }


@every_op
@pytest.mark.parametrize("layout", list(_layouts(torch.zeros(1, 1, 1, 1))))
def test_any_layout_same_bits(op: str, norm: str, layout: str) -> None:
    tensors = images((4, 3, 6, 10))
    want = calls(ops, norm)[op](*tensors)
    others = [_layouts(t)[layout] for t in tensors]
    # All three in the layout, and each alone among contiguous ones.
    mixes = [others] + [[*tensors[:i], others[i], *tensors[i + 1 :]] for i in range(3)]
    for mix in mixes:
        for one, other in zip(calls(ops, norm)[op](*mix), want, strict=True):
            # Sums run in memory order, so another order may round otherwise.
            torch.testing.assert_close(one, other, rtol=0, atol=0 if norm == "linf" else 2e-7)


def test_in_place_writes_a_strided_view_and_nothing_else() -> None:
    for norm in NORMS:
        x_adv, x, grad = images((4, 3, 6, 10))
        eps, step = SIZES[norm]
        want = ops.pgd_step(x_adv, x, grad, step, eps, norm=norm)
        frame = torch.full((4, 3, 6, 20), -7.0)
        frame[..., ::2] = x_adv
        ops.pgd_step_(frame[..., ::2], x, grad, step, eps, norm=norm)
        assert torch.equal(frame[..., ::2], want)
        assert (frame[..., 1::2] == -7).all()


@pytest.mark.parametrize("norm", NORMS)
def test_out_of_place_keeps_the_layout(norm: str) -> None:
    x_adv, x, grad = (t.contiguous(memory_format=torch.channels_last) for t in images((4, 3, 6, 10)))
    assert ops.pgd_step(x_adv, x, grad, 0.1, 0.1, norm=norm).is_contiguous(memory_format=torch.channels_last)
    assert ops.random_start(x, 0.1, norm=norm).is_contiguous(memory_format=torch.channels_last)


@every_op
def test_sizes_of_each_sample(op: str, norm: str) -> None:
    x_adv, x, grad = images((5, 3, 6, 10))
    eps, step = SIZES[norm]
    factors = torch.tensor([0.0, 0.3, 1.0, 2.0, 10.0])
    previous = (2 * x - x_adv).clone()

    def call(rows: slice, e: object, s: object) -> tuple[Tensor, ...]:
        a, b, g, p = x_adv[rows].clone(), x[rows], grad[rows], previous[rows].clone()
        if op == "fast_bat_step":
            return ops.fast_bat_step(a - b, b, g, s, e)
        if op == "apgd_step_":
            return ops.apgd_step_(a, p, b, g, s, e, norm=norm), p
        function = getattr(ops, op)
        return (function(a, b, g, s, e, norm=norm) if "pgd" in op else function(a, b, e, norm=norm),)

    together = call(slice(None), eps * factors, step * factors.double())
    mixed = call(slice(None), eps * factors.double(), step)
    for n, factor in enumerate(factors.tolist()):
        row = slice(n, n + 1)
        e, s = (eps * factors)[n].item(), step * factor
        for whole, alone in zip(together, call(row, e, s), strict=True):
            assert torch.equal(whole[row], alone)
        for whole, alone in zip(
            mixed,
            call(row, eps * factor if factor != 0.3 else eps * factors.double()[n].item(), step),
            strict=True,
        ):
            assert torch.equal(whole[row], alone)


@pytest.mark.parametrize(("op", "norm"), list(itertools.product(OPS, NORMS)))
def test_inactive_samples_stay(op: str, norm: str) -> None:
    tensors = images((5, 3, 6, 10))
    active = torch.tensor([True, False, True, True, False])
    got = calls(ops, norm, active=active)[op](*tensors)
    full = calls(ops, norm)[op](*tensors)
    before = (tensors[0], 2 * tensors[1] - tensors[0])
    for one, moved, old in zip(got, full, before, strict=False):
        assert torch.equal(one[active], moved[active])
        assert torch.equal(one[~active], old[~active])
    check(op, norm, tensors, TOLERANCE[torch.float32], active=active)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("magnitude", [1e-300, 1e-43, 1e-30, 1e-22, 1e18, 1e30, 1e300])
def test_gradients_of_any_magnitude(norm: str, dtype: torch.dtype, magnitude: float) -> None:
    x_adv, x, grad = images((3, 2, 5, 7), dtype)
    grad = (grad.double() * magnitude).to(dtype)
    if not grad.isfinite().all():
        pytest.skip("beyond float32")
    eps, step = SIZES[norm]
    want = reference.pgd_step(
        x_adv.double(), x.double(), _unit(grad), step, eps, norm=norm
    )  # the direction does not change with the gradient's length
    got = ops.pgd_step(x_adv, x, grad, step, eps, norm=norm)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype])
    previous = x_adv.clone()
    ops.apgd_step_(x_adv, previous, x, grad, step, eps, norm=norm, momentum=1.0)
    assert x_adv.isfinite().all()


def _unit(grad: Tensor) -> Tensor:
    largest = grad.double().abs().amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest == 0, torch.zeros((), dtype=torch.float64), grad.double() / largest)


def test_l2_step_that_cancels() -> None:
    """Far outside the ball and stepping back by as much: ‖δ‖² + 2s⟨δ,g⟩ + s²‖g‖² would lose every digit."""
    x = torch.full((1, 3, 8, 8), 0.5)
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    u /= u.norm()
    x_adv = x + 100 * u + 0.3 * torch.roll(u, 1)
    want = reference.pgd_step(
        x_adv.double(), x.double(), -u.double(), 100.0, 0.2, norm="l2", clip_min=-9, clip_max=9
    )
    got = ops.pgd_step(x_adv, x, -u, 100.0, 0.2, norm="l2", clip_min=-9, clip_max=9)
    # δ itself is known to an ulp of 100.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradient_is_no_step(norm: str, dtype: torch.dtype) -> None:
    x_adv, x, grad = images((3, 3, 6, 10), dtype)
    grad[1] = 0
    eps, step = SIZES[norm]
    got = ops.pgd_step(x_adv, x, grad, step, eps, norm=norm)
    assert torch.equal(got[1], ops.project(x_adv, x, eps, norm=norm)[1])
    x_prev = x_adv.clone()
    ops.apgd_step_(x_adv, x_prev, x, grad, step, eps, norm=norm, momentum=1.0)
    assert torch.equal(x_adv[1], got[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_gradient_stays_in_its_sample(norm: str, bad: float) -> None:
    x_adv, x, grad = images((3, 3, 6, 10))
    eps, step = SIZES[norm]
    want = ops.pgd_step(x_adv, x, grad, step, eps, norm=norm)
    grad[1, 0, 2, 3] = bad
    for got in (
        ops.pgd_step(x_adv, x, grad, step, eps, norm=norm),
        ops.apgd_step_(x_adv.clone(), x_adv.clone(), x, grad, step, eps, norm=norm, momentum=1.0, keep=None),
    ):
        assert got[[0, 2]].isfinite().all()
    got = ops.pgd_step(x_adv, x, grad, step, eps, norm=norm)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    if (
        norm == "linf"
    ):  # as torch.sign: a NaN has no direction, and the rest of the sample does not know of it
        others = torch.ones(3, 6, 10, dtype=torch.bool)
        others[0, 2, 3] = False
        assert torch.equal(got[1][others], want[1][others])
        assert got.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_x_outside_the_box_box_wins(norm: str) -> None:
    x = torch.tensor([[-3.0, 0.5, 4.0, -0.01]])
    x_adv = torch.tensor([[0.5, 0.9, 0.5, 0.2]])
    got = ops.project(x_adv, x, 0.1, norm=norm)
    assert ((got >= 0) & (got <= 1)).all()
    want = reference.project(x_adv.double(), x.double(), 0.1, norm=norm)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_that_does_not_hold_zero(norm: str) -> None:
    x_adv, x, _ = images((3, 3, 7, 11))
    x_adv, x = 0.6 * x_adv + 0.3, 0.6 * x + 0.3
    got = ops.project(x_adv, x, SIZES[norm][0], norm=norm, clip_min=0.25, clip_max=0.95)
    want = reference.project(
        x_adv.double(), x.double(), SIZES[norm][0], norm=norm, clip_min=0.25, clip_max=0.95
    )
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[torch.float32])


def test_free_is_exact() -> None:
    """The mask is the strict test on the unclamped value in the op's own precision, also at the bounds."""
    gen = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        x = torch.rand(4, 3, 40, 40, generator=gen, dtype=dtype)
        x[x < 0.1], x[x > 0.9] = 0, 1
        grad = torch.randn(x.shape, generator=gen, dtype=dtype)
        eps = 0.125
        z = (torch.rand(x.shape, generator=gen, dtype=dtype) * 2 - 1) * eps
        z[:, 0], grad[:, 0] = eps, 0  # exactly on the ball's border: not free
        z[:, 1, :20], grad[:, 1, :20] = (1 - x)[:, 1, :20], 0  # exactly on the box's
        delta, free = ops.fast_bat_step(z, x, grad, 0.05, eps)
        u = z - torch.tensor(0.05, dtype=dtype) * grad
        assert torch.equal(free, (torch.clamp(0 - x, min=-eps) < u) & (u < torch.clamp(1 - x, max=eps)))
        assert torch.equal(delta[free], u[free])
        assert not free[:, 0].any()
        assert not free[:, 1, :20].any()
        assert 0.1 < free[:, 2].double().mean() < 0.95


@every_op
def test_same_bits_for_any_number_of_threads(op: str, norm: str) -> None:
    tensors = images((37, 3, 33, 31))
    check_threads(lambda: calls(ops, norm)[op](*tensors))


class TestRandomStart:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(3, 3, 7, 11), (2, 5), (4,), (1, 1), (0, 3), (2, 0)], ids=str)
    def test_inside_ball_and_box(self, norm: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        _, x, _ = images(shape, dtype)
        eps = SIZES[norm][0]
        x_adv = ops.random_start(x, eps, norm=norm)
        assert x_adv.dtype == dtype
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        if x.numel():
            size = torch.linalg.vector_norm(
                (x_adv.double() - x.double()).flatten(1)
                if x.dim() > 1
                else (x_adv.double() - x.double())[:, None],
                {"linf": float("inf"), "l2": 2, "l1": 1}[norm],
                dim=1,
            )
            slack = TOLERANCE[dtype] * {"linf": 1, "l2": x[0].numel() ** 0.5, "l1": x[0].numel()}[norm]
            assert (size <= eps + slack).all()

    @pytest.mark.parametrize("norm", NORMS)
    def test_is_uniform_in_the_ball(self, norm: str) -> None:
        """Moments of 40,000 draws in five dimensions against those of the oracle's distribution."""
        n, d = 40_000, 5
        x = torch.zeros(n, d, dtype=torch.float64)
        box = {"clip_min": -2.0, "clip_max": 2.0}
        got = ops.random_start(x, 1.0, norm=norm, generator=torch.Generator().manual_seed(1), **box)
        want = reference.random_start(x, 1.0, norm=norm, generator=torch.Generator().manual_seed(2), **box)
        for moment in (
            lambda t: t.mean(0),
            lambda t: t.pow(2).mean(0),
            lambda t: t.pow(4).mean(0),
            lambda t: (t[:, :-1] * t[:, 1:]).mean(0),
            lambda t: (t[:, :-1] * t[:, 1:]).pow(2).mean(0),
            lambda t: t.abs().sum(1).mean(),
        ):
            torch.testing.assert_close(moment(got), moment(want), rtol=0, atol=0.02)

    @pytest.mark.parametrize("norm", NORMS)
    def test_follows_the_generator(self, norm: str) -> None:
        x = torch.full((6, 3, 5, 5), 0.5)
        draw = lambda gen, images=x: ops.random_start(images, 0.2, norm=norm, generator=gen)  # noqa: E731
        seeded = lambda: torch.Generator().manual_seed(7)  # noqa: E731
        assert torch.equal(draw(seeded()), draw(seeded()))
        gen = seeded()
        assert not torch.equal(draw(gen), draw(gen))
        torch.manual_seed(3)
        first = draw(None)
        torch.manual_seed(3)
        assert torch.equal(first, draw(None))
        # A sample's draw depends on its index, not on the batch; no two samples share one.
        assert torch.equal(draw(seeded(), x[:2]), draw(seeded())[:2])
        rest = ops.random_start(x[2:], 0.2, norm=norm, first=2, generator=seeded())
        assert torch.equal(rest, draw(seeded())[2:])
        assert not torch.equal(first[0], first[1])
        torch.testing.assert_close(draw(seeded(), x.double()).float(), draw(seeded()), rtol=0, atol=2e-7)

    def test_eps_of_each_sample(self) -> None:
        x = torch.full((3, 4, 5), 0.5)
        eps = torch.tensor([0.0, 0.1, 0.2])
        x_adv = ops.random_start(x, eps)
        assert torch.equal(x_adv[0], x[0])
        assert (x_adv[1] - 0.5).abs().amax() <= 0.1 + 1e-7
        assert 0.1 < (x_adv[2] - 0.5).abs().amax() <= 0.2 + 1e-7

"""The CUDA kernels' very sources, run by the emulation in cuda_emulation/ under ASan and UBSan: against the oracles of
the CPU kernels, and for L∞ against their bits. What this proves and what not: docs/gpu.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import test_half_images
import test_ops
import torch
from emulated import EmulatedOps
from ops_cases import DTYPES, HALVES, NORMS, SIZES, TOLERANCE, calls, images
from server import SCHEDULES
from torch import Tensor

from blokern import ops

# An odd size and a tail; whole packs, one element, more packs than a block has threads.
ODD, OTHERS = (3, 3, 7, 11), [(2, 64), (4,), (1, 1100)]
# Samples that a team of blocks shares: more than 4096 elements of four bytes. L1 takes a dozen passes over them.
SHARED = {"linf": (2, 3, 50, 61), "l2": (2, 3, 50, 61), "l1": (1, 4201)}


# Barriers are what schedules are for: all run the kernels' plain case, one the many cases of numbers and layouts.
one_schedule = pytest.mark.parametrize("emulated", ["shuffled"], indirect=True)


@pytest.fixture(scope="module", params=SCHEDULES)
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedOps]:
    kernels = EmulatedOps(request.param)
    yield kernels
    kernels.close()


@pytest.fixture
def oracles(emulated: EmulatedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_ops, the CPU kernels' tests, then speak of the emulated kernels."""
    monkeypatch.setattr(test_ops, "ops", emulated)


every_op = pytest.mark.parametrize(("op", "norm"), test_ops.ALL)


@pytest.mark.usefixtures("oracles")
@every_op
def test_equals_the_oracle(op: str, norm: str) -> None:
    test_ops.check(op, norm, images(ODD), TOLERANCE[torch.float32])
    test_ops.check(op, norm, images(SHARED[norm]), TOLERANCE[torch.float32])


@one_schedule
@pytest.mark.usefixtures("oracles")
@every_op
def test_every_dtype_and_shape_equals_the_oracle(op: str, norm: str) -> None:
    for dtype in DTYPES:
        test_ops.check(op, norm, images(ODD, dtype), TOLERANCE[dtype])
    for shape in OTHERS + test_ops.EMPTY:
        test_ops.check(op, norm, images(shape, torch.bfloat16), TOLERANCE[torch.bfloat16])
    x_adv, x, grad = images((2, 3, 9, 9))
    for half in (torch.bfloat16, torch.float16):
        test_ops.check(op, norm, (x_adv, x, grad.to(half)), TOLERANCE[torch.float32])


@one_schedule
@pytest.mark.parametrize("op", ["pgd_step", "project", "apgd_step_", "fast_bat_step"])
def test_linf_has_the_bits_of_the_cpu(emulated: EmulatedOps, op: str) -> None:
    for dtype in DTYPES:
        tensors = images(ODD, dtype)
        for one, other in zip(
            calls(emulated, "linf")[op](*tensors), calls(ops, "linf")[op](*tensors), strict=True
        ):
            assert torch.equal(one, other)


@one_schedule
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_images_stay_in_ball_and_box(
    emulated: EmulatedOps, dtype: torch.dtype, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_half_images, "ops", emulated)
    for box in test_half_images.BOXES[:2]:
        x = test_half_images.case(dtype, box, 1.0, size=61)
        for out in test_half_images.outputs(x, 8 / 255, norm, box).values():
            test_half_images.check_inside(out, x, 8 / 255, norm, box)


def _layouts(t: Tensor) -> list[Tensor]:
    """t's values at other addresses: shifted by one and by three elements, every second sample."""
    shifted = [t.new_zeros(t.numel() + k)[k:].view(t.shape).copy_(t) for k in (1, 3)]
    wide = t.new_zeros(2 * len(t), *t.shape[1:])
    wide[::2] = t
    return [*shifted, wide[::2]]


@one_schedule
@every_op
def test_any_alignment(emulated: EmulatedOps, op: str, norm: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = images((2, 2, 5, 9), dtype)
        want = calls(emulated, norm)[op](*tensors)
        for which, layout in [((0, 1, 2), 0), ((0, 1, 2), 2), ((0,), 1), ((1,), 0), ((2,), 2)]:
            others = [_layouts(t)[layout] if i in which else t for i, t in enumerate(tensors)]
            for one, other in zip(calls(emulated, norm)[op](*others), want, strict=True):
                atol = 0 if norm == "linf" else TOLERANCE[dtype]  # other packs, other order of sums
                torch.testing.assert_close(one, other, rtol=0, atol=atol)


@one_schedule
@pytest.mark.usefixtures("oracles")
@every_op
def test_sizes_of_each_sample(op: str, norm: str) -> None:
    test_ops.test_sizes_of_each_sample(op, norm)


@one_schedule
@pytest.mark.usefixtures("oracles")
@pytest.mark.parametrize("norm", NORMS)
def test_inactive_samples_and_unusual_gradients(norm: str) -> None:
    for op in test_ops.OPS:
        test_ops.test_inactive_samples_stay(op, norm)
    for magnitude in (1e-43, 1e-22, 1e30):
        test_ops.test_gradients_of_any_magnitude(norm, torch.float32, magnitude)
    test_ops.test_gradients_of_any_magnitude(norm, torch.float64, 1e-300)
    test_ops.test_zero_gradient_is_no_step(norm, torch.bfloat16)
    for bad in (float("nan"), float("inf"), float("-inf")):
        test_ops.test_a_bad_gradient_stays_in_its_sample(norm, bad)
    test_ops.test_x_outside_the_box_box_wins(norm)
    test_ops.test_a_box_that_does_not_hold_zero(norm)


@one_schedule
@pytest.mark.usefixtures("oracles")
def test_values_of_the_cpu_tests() -> None:
    test_ops.test_free_is_exact()
    test_ops.test_l2_step_that_cancels()


@one_schedule
@pytest.mark.parametrize("norm", NORMS)
def test_random_start_draws_the_cpu_numbers(emulated: EmulatedOps, norm: str) -> None:
    for dtype, shape in itertools.product(DTYPES, [(3, 3, 7, 11), (2, 5), (4,), (2, 4099)]):
        x = images(shape, dtype)[1]
        eps = SIZES[norm][0]
        got, want = (
            library.random_start(x, eps, norm=norm, first=5, generator=torch.Generator().manual_seed(3))
            for library in (emulated, ops)
        )
        torch.testing.assert_close(
            got, want, rtol=0, atol=TOLERANCE[dtype] if dtype != torch.float64 else 1e-12
        )


@pytest.mark.parametrize("op", ["pgd_step", "project", "apgd_step_"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_every_schedule_gives_the_same_bits(op: str, norm: str) -> None:
    outputs = []
    for schedule in SCHEDULES:
        kernels = EmulatedOps(schedule)
        outputs.append(calls(kernels, norm)[op](*images(SHARED[norm])))
        kernels.close()
    for others in outputs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outputs[0], others, strict=True))

"""The CUDA kernels of lists of tensors under emulation (docs/gpu.md): through the tests of the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_multi_tensor as cpu
import torch
from emulated_multi_tensor import EmulatedMultiTensor
from server import SCHEDULES

# Blocks' sums are what schedules are for: all run every size, one the many cases of numbers and layouts.
one_schedule = pytest.mark.parametrize("emulated", ["shuffled"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", cpu.DTYPES)


@pytest.fixture(scope="module", params=SCHEDULES)
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedMultiTensor]:
    kernels = EmulatedMultiTensor(request.param)
    yield kernels
    kernels.close()


@pytest.fixture(autouse=True)
def oracles(emulated: EmulatedMultiTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_multi_tensor, the CPU kernels' tests, then speak of the emulated kernels."""
    monkeypatch.setattr(cpu, "ops", emulated)


@DTYPES
def test_over_dtypes_and_sizes(dtype: torch.dtype) -> None:
    for columns in (0, 1, 3):
        cpu.test_over_dtypes_and_sizes(dtype, columns)


@one_schedule
@pytest.mark.parametrize("layout", cpu.LAYOUTS)
def test_over_layouts(layout: str) -> None:
    for moved in (("x", "r", "p", "ap"), ("x",), ("p", "ap")):
        cpu.test_over_layouts(layout, moved)


@one_schedule
def test_more_tensors_than_a_launch_takes_and_of_several_dtypes() -> None:
    cpu.test_a_list_may_have_several_dtypes()
    shapes = [(i % 7, 3) for i in range(130)]
    on, (a, b) = cpu.lists(2, torch.float32, shapes), cpu.coefficients(2)
    exact = cpu.double(on)
    want = cpu.run(cpu.reference, exact, a, b)
    cpu.close(cpu.run(cpu.ops, on, a, b), want, torch.float32, sum(t[0].numel() for t in on["x"]))


@one_schedule
def test_numbers_of_the_cpu_tests() -> None:
    cpu.test_a_coefficient_of_zero_reads_nothing()
    cpu.test_what_is_not_finite_stays_in_its_column()
    cpu.test_a_neumann_step_has_the_residual_for_direction()


@one_schedule
def test_a_column_does_not_depend_on_the_others_or_on_the_schedule() -> None:
    shapes, (a, b) = [(4103,), (33,), (5,)], cpu.coefficients(3)

    def columns(kernels: EmulatedMultiTensor, which: slice) -> tuple[torch.Tensor, ...]:
        on = {
            name: [t[which].clone() for t in of] for name, of in cpu.lists(3, torch.float32, shapes).items()
        }
        return cpu.run(kernels, on, a[which], b[which])

    whole = columns(cpu.ops, slice(0, 3))
    parts = [torch.cat(of) for of in zip(*(columns(cpu.ops, slice(k, k + 1)) for k in range(3)), strict=True)]
    assert all(map(torch.equal, whole, parts))
    for schedule in SCHEDULES:
        kernels = EmulatedMultiTensor(schedule)
        assert all(map(torch.equal, columns(kernels, slice(0, 3)), whole))
        kernels.close()

"""The curvature family's CUDA kernels under emulation (docs/gpu.md), against the oracles of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_curvature_ops as cpu
import torch
from emulated_curvature import EmulatedCurvatureOps
from kernel_cases import PLAIN, activation, batch_norm, cross_entropy, layer_norm
from server import SCHEDULES
from torch import Tensor

from blokern import ops
from blokern.ops import reference_curvature as reference

# Barriers are what schedules are for: all run a plain case of every kernel, one the many cases of numbers and layouts.
one_schedule = pytest.mark.parametrize("emulated", ["shuffled"], indirect=True)


@pytest.fixture(scope="module", params=SCHEDULES)
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedCurvatureOps]:
    kernels = EmulatedCurvatureOps(request.param)
    yield kernels
    kernels.close()


@pytest.fixture
def oracles(emulated: EmulatedCurvatureOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_curvature_ops, the CPU kernels' tests, then speak of the emulated kernels."""
    monkeypatch.setattr(cpu, "ops", emulated)


@pytest.mark.parametrize("case", PLAIN)
def test_equals_the_oracle(emulated: EmulatedCurvatureOps, case: str) -> None:
    cpu.close(PLAIN[case](emulated), PLAIN[case](reference), torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        "cross-entropy, blocks a row",
        "batch_norm_adjoint_tangent, blocks a channel",
        "batch_norm_adjoint_tangent, channels inner",
        "layer_norm_adjoint_tangent, blocks a row",
    ],
)
def test_every_schedule_gives_the_same_bits(case: str) -> None:
    outputs = []
    for schedule in SCHEDULES:
        kernels = EmulatedCurvatureOps(schedule)
        outputs.append(PLAIN[case](kernels))
        kernels.close()
    for others in outputs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outputs[0], others, strict=True))


@one_schedule
@pytest.mark.usefixtures("oracles")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_every_dtype_and_shape_equals_the_oracle(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, weighted, smoothing in ((False, False, 0.0), (False, True, 0.3), (True, True, 0.3)):
        cpu.test_cross_entropy(dtype, soft, weighted, smoothing, "sum" if weighted and not soft else "mean")
    monkeypatch.setattr(
        cpu, "SHAPES", [(4, 3), (2, 40), (3, 2, 7), (2, 9, 4, 4), (2, 3, 2, 3, 2), (0, 3, 4, 4)]
    )
    for op in cpu.ARGUMENTS:
        cpu.test_batch_norm_over_shapes(op, dtype, gated=True, train=dtype != torch.float64)
    for op in cpu.ROW_ARGUMENTS:
        cpu.test_layer_norm_over_shapes(op, dtype)
    for name in ops.curvature.ACTIVATIONS:
        cpu.test_activations(name, dtype)


@one_schedule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_a_block_in_every_dtype(emulated: EmulatedCurvatureOps, dtype: torch.dtype) -> None:
    """Longer than a warp takes: 256 packs."""
    size = 256 * 16 // dtype.itemsize + 5
    cpu.close(
        cross_entropy(emulated, size, rows=2, dtype=dtype),
        cross_entropy(reference, size, rows=2, dtype=dtype),
        dtype,
    )
    for op in cpu.ROW_ARGUMENTS:
        got, want = (layer_norm(module, op, 3, size, 1, dtype=dtype) for module in (emulated, reference))
        cpu.close(got, want, dtype)


@one_schedule
@pytest.mark.usefixtures("oracles")
def test_layouts_stacks_and_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in cpu.ARGUMENTS:
        cpu.test_batch_norm_over_shapes(op, torch.float32, gated=False, train=True)
        for layout in ("channels inner", "sliced"):
            cpu.test_batch_norm_over_layouts(op, layout, monkeypatch)
            monkeypatch.setattr(cpu, "_rank", 0)
    for layout in ("contiguous", "channels inner"):
        cpu.test_batch_norm_of_a_stack_is_that_of_each("batch_norm_adjoint_tangent", layout, monkeypatch)
        monkeypatch.setattr(cpu, "_rank", 0)
    cpu.test_without_weights()
    for op in cpu.ROW_ARGUMENTS:
        cpu.test_layer_norm_of_a_stack_is_that_of_each(op)
        cpu.test_layer_norm_without_weights(op)
    cpu.test_layer_norm_of_nothing()


@one_schedule
@pytest.mark.usefixtures("oracles")
def test_unusual_numbers() -> None:
    cpu.test_cross_entropy_of_extreme_logits()
    cpu.test_every_label_ignored()
    for name in ops.curvature.ACTIVATIONS:
        cpu.test_activations_of_extreme_values(name)


@one_schedule
def test_logits_of_minus_infinity(emulated: EmulatedCurvatureOps) -> None:
    """A masked class has no probability, also where a whole pack, or all that a thread sees, is masked."""
    logits = torch.randn(2, 300)
    logits[:, 4:200] = -torch.inf
    target, tangent = torch.tensor([1, 250]), torch.randn(2, 300)
    loss, grad, hvp = emulated.softmax_cross_entropy_hvp(logits, tangent, target)
    _, want, product = reference.softmax_cross_entropy_hvp(logits.double(), tangent.double(), target)
    cpu.close((grad, hvp), (want, product), torch.float32)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
    nothing = emulated.softmax_cross_entropy_hvp(torch.full((1, 5), -torch.inf), torch.ones(1, 5), target[:1])
    assert nothing[0].isnan()
    assert nothing[1].isnan().all()


@one_schedule
def test_a_label_out_of_range_makes_its_row_nan(emulated: EmulatedCurvatureOps) -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 5, 2])
    loss, grad, _ = emulated.softmax_cross_entropy_hvp(logits, logits, target, reduction="sum")
    assert loss.isnan()
    assert grad.isnan().any(1).tolist() == [False, True, False]


@one_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1, 3])
def test_any_alignment(emulated: EmulatedCurvatureOps, dtype: torch.dtype, shift: int) -> None:
    """Tensors that begin anywhere, with rows, planes and columns that 16 bytes divide or not."""

    def results() -> list[Tensor]:
        found = [*cross_entropy(emulated, 40, dtype=dtype), *activation(emulated, "silu", 90, dtype=dtype)]
        for op in cpu.ARGUMENTS:
            found += batch_norm(emulated, op, (2, 3, 4, 4), dtype=dtype)
            found += batch_norm(emulated, op, (2, 16, 2, 3), inner=True, dtype=dtype)
        for op in cpu.ROW_ARGUMENTS:
            found += layer_norm(emulated, op, 3, 48, 1, dtype=dtype)
        return found

    want = results()
    emulated.shift = shift
    got = results()
    emulated.shift = 0
    cpu.close(tuple(got), tuple(want), dtype)

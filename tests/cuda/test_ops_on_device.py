"""The attack and curvature ops on a device against the oracles of the CPU kernels."""

from __future__ import annotations

import pytest
import test_curvature_ops
import test_multi_tensor
import test_ops
import torch
from kernel_cases import PLAIN
from on_device import OnDevice
from ops_cases import DTYPES, NORMS, SIZES, TOLERANCE, calls, images
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import ops
from blokern.curvature import linearize
from blokern.ops import reference_curvature as reference

# Samples of a block, of a team of blocks, and of one that takes several rounds.
SHAPES = [(3, 3, 7, 11), (2, 5), (4,), (2, 3, 80, 80), (1, 70_001)]


@pytest.fixture
def there(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    """The ops on the device; the CPU's tests speak of them, too."""
    found = OnDevice(device)
    monkeypatch.setattr(test_ops, "ops", found)
    monkeypatch.setattr(test_curvature_ops, "ops", found)
    monkeypatch.setattr(test_multi_tensor, "ops", found)
    return found


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("op", "norm"), test_ops.ALL)
def test_attack_ops_equal_their_oracles(op: str, norm: str) -> None:
    for shape in SHAPES:
        test_ops.check(op, norm, images(shape), TOLERANCE[torch.float32])
    for dtype in DTYPES:
        for shape in (*SHAPES[:3], *test_ops.EMPTY):
            test_ops.check(op, norm, images(shape, dtype), TOLERANCE[dtype])
    x_adv, x, grad = images((2, 3, 9, 9))
    for half in (torch.bfloat16, torch.float16):
        test_ops.check(op, norm, (x_adv, x, grad.to(half)), TOLERANCE[torch.float32])
    test_ops.test_sizes_of_each_sample(op, norm)


@pytest.mark.parametrize("op", ["pgd_step", "project", "apgd_step_", "fast_bat_step"])
def test_linf_has_the_bits_of_the_cpu(there: OnDevice, op: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            got, want = (calls(module, "linf")[op](*images(shape, dtype)) for module in (there, ops))
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("norm", NORMS)
def test_inactive_samples_and_unusual_gradients(norm: str) -> None:
    for op in test_ops.OPS:
        test_ops.test_inactive_samples_stay(op, norm)
    for magnitude in (1e-43, 1e-22, 1e30):
        test_ops.test_gradients_of_any_magnitude(norm, torch.float32, magnitude)
    for bad in (float("nan"), float("inf")):
        test_ops.test_a_bad_gradient_stays_in_its_sample(norm, bad)
    test_ops.test_x_outside_the_box_box_wins(norm)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_draws_the_cpu_numbers(there: OnDevice, norm: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            x, eps = images(shape, dtype)[1], SIZES[norm][0]
            got, want = (
                module.random_start(x, eps, norm=norm, generator=torch.Generator().manual_seed(3))
                for module in (there, ops)
            )
            atol = TOLERANCE[dtype] if dtype != torch.float64 else 1e-12
            torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("case", PLAIN)
def test_curvature_ops_equal_their_oracles(there: OnDevice, case: str) -> None:
    test_curvature_ops.close(PLAIN[case](there), PLAIN[case](reference), torch.float32)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_ops_of_every_dtype(dtype: torch.dtype) -> None:
    for soft, weighted, smoothing in ((False, False, 0.0), (False, True, 0.3), (True, True, 0.3)):
        test_curvature_ops.test_cross_entropy(dtype, soft, weighted, smoothing, "mean")
    for op in test_curvature_ops.ARGUMENTS:
        test_curvature_ops.test_batch_norm_over_shapes(op, dtype, gated=True, train=True)
    for op in test_curvature_ops.ROW_ARGUMENTS:
        test_curvature_ops.test_layer_norm_over_shapes(op, dtype)
    for name in ops.curvature.ACTIVATIONS:
        test_curvature_ops.test_activations(name, dtype)


@pytest.mark.usefixtures("there")
def test_curvature_ops_of_unusual_numbers() -> None:
    test_curvature_ops.test_cross_entropy_of_extreme_logits()
    test_curvature_ops.test_every_label_ignored()
    for name in ops.curvature.ACTIVATIONS:
        test_curvature_ops.test_activations_of_extreme_values(name)


@pytest.mark.parametrize("case", PLAIN)
def test_the_same_bits_every_time(there: OnDevice, case: str) -> None:
    first, second = (PLAIN[case](there) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.usefixtures("there")
def test_lists_of_tensors() -> None:
    for dtype in test_multi_tensor.DTYPES:
        for columns in (0, 1, 3):
            test_multi_tensor.test_over_dtypes_and_sizes(dtype, columns)
    for layout in test_multi_tensor.LAYOUTS:
        test_multi_tensor.test_over_layouts(layout, ("x", "ap"))
    test_multi_tensor.test_a_list_may_have_several_dtypes()
    test_multi_tensor.test_a_coefficient_of_zero_reads_nothing()
    test_multi_tensor.test_what_is_not_finite_stays_in_its_column()
    test_multi_tensor.test_a_neumann_step_has_the_residual_for_direction()


class Net(nn.Module):
    """A layer of each kind that has kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group_norm, self.linear = nn.GroupNorm(2, 4), nn.Linear(4 * 36, 12)
        self.layer_norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch_norm(self.conv(x)))
        x = F.silu(self.group_norm(x)).flatten(1)
        return self.head(F.gelu(self.layer_norm(self.linear(x))))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_engine_runs_unchanged(device: torch.device, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(6, 3, 6, 6, dtype=torch.float64)
    y, v = torch.randint(5, (6,)), {k: torch.randn_like(p) for k, p in model.named_parameters()}
    u = torch.randn_like(x)

    def products(device: torch.device) -> dict[str, Tensor]:
        x_there = x.to(device).to(memory_format=memory_format)
        at = linearize(model.to(device), nn.CrossEntropyLoss(), x_there, y.to(device))
        moved = {key: t.to(device) for key, t in v.items()}
        stacks = {key: torch.stack([t, 2.0 * t]) for key, t in moved.items()}
        found = {
            "hvp": at.hvp(moved, retain_graph=True),
            "ggnvp": at.ggnvp(moved, retain_graph=True),
            "stacks": at.hvp(stacks, retain_graph=True),
            "mixed": at.mixed_hvp(u.to(device), retain_graph=True),
        }
        flat = {f"{name}.{key}": t.cpu() for name, by_key in found.items() for key, t in by_key.items()}
        return flat | {"transpose": at.mixed_hvp_transpose(moved).cpu()}

    got, want = products(device), products(torch.device("cpu"))
    for key, t in want.items():
        torch.testing.assert_close(got[key], t, rtol=1e-8, atol=1e-10)

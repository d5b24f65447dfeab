"""The sparse ops on a device against the oracles of the CPU kernels. Masks are made anew in many of these tests, so
that the host may look at them."""

from __future__ import annotations

import copy

import pytest
import test_packed
import test_products
import test_pruning
import test_selection
import torch
from on_device import OnDevice
from torch import nn

from blokern import ops
from blokern.sparse import MaskedLinear, pack, sparsify, to_dense


@pytest.fixture(autouse=True)
def there(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    """The CPU's tests then speak of the ops on the device."""
    found = OnDevice(device, waits=True)
    for module in (test_packed, test_products, test_pruning, test_selection):
        monkeypatch.setattr(module, "ops", found)
    return found


@pytest.mark.parametrize("dtype", test_products.TOLERANCE)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_products_are_the_dense_ones(density: float, dtype: torch.dtype) -> None:
    for size in test_products.SIZES:
        test_products.test_products_are_the_dense_ones(size, density, dtype)
    for samples in (1, 4, 16, 17, 40):
        weight, mask, x = test_products.factors(187, 390, samples, density, dtype)
        poisoned = torch.where(mask, weight, torch.nan)
        test_products.check_spmm(test_products.ops.spmm(poisoned, mask, x.t()), weight, mask, x.t())


@pytest.mark.parametrize("dtype", test_packed.DTYPES)
def test_packed_products(dtype: torch.dtype) -> None:
    test_packed.check_every_size(dtype)
    for shape in ((7,), (2, 3, 7), (0, 7), (4, 14)):
        test_packed.test_any_shape_and_strides_of_x(shape)


def test_selections() -> None:
    for name in test_selection.SCORES:
        for dtype in test_selection.DTYPES:
            for density in test_selection.DENSITIES:
                scores = test_selection.SCORES[name](dtype)
                got, want = (
                    module.topk_mask(scores, density) for module in (test_selection.ops, ops.reference)
                )
                assert torch.equal(got, want)
    for n, m in ((2, 4), (3, 5), (1, 8)):
        for dim in (0, -1):
            test_selection.test_nm_keeps_the_largest_of_each_group(n, m, dim, torch.float32)


@pytest.mark.parametrize("name", test_pruning.OPS)
def test_steps_have_the_bits_of_the_cpu(name: str) -> None:
    shapes = [(3, 17), (40, 131), (2, 3, 3, 3)] * 20
    for rates in test_pruning.RATES:
        got, want = (
            test_pruning.run(module, name, shapes, rates, torch.float32) for module in (test_pruning.ops, ops)
        )
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_masked_network_and_its_dense_twin(
    device: torch.device, memory_format: torch.memory_format, autocast: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(288, 10)
    )
    masks = {
        name: torch.rand_like(net.get_parameter(name)) < 0.3 for name in ("0.weight", "2.weight", "4.weight")
    }
    masked = sparsify(net, masks).to(device, memory_format=memory_format)
    dense = to_dense(copy.deepcopy(masked))
    x = torch.rand(20, 3, 8, 8, device=device).to(memory_format=memory_format)
    found = []
    for model in (masked, dense):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(x).float()
        grads = torch.autograd.grad(logits.square().sum(), [*model.parameters()])
        found.append((logits, *grads))
    close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found[0][0], found[1][0], **close)
    for (name, _), got, want in zip(net.named_parameters(), found[0][1:], found[1][1:], strict=True):
        expected = want * masks[name].to(device) if name in masks else want
        scale = float(expected.abs().max())
        torch.testing.assert_close(got / scale, expected / scale, **close)


@pytest.mark.cuda
@torch.no_grad()
def test_two_of_four_on_tensor_cores(cuda: torch.device) -> None:
    weight = torch.randn(2048, 2048)
    layer = MaskedLinear(2048, 2048, mask=ops.nm_mask(weight, 2, 4), dtype=torch.bfloat16).to(cuda)
    for samples in (1, 8, 200):
        x = torch.randn(samples, 2048, dtype=torch.bfloat16, device=cuda)
        twin = pack(copy.deepcopy(layer))
        assert isinstance(twin.weight, torch.sparse.SparseSemiStructuredTensor)
        torch.testing.assert_close(twin(x), layer(x), rtol=0.02, atol=0.02)

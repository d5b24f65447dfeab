"""What only a CUDA device can show: captures, other devices, tensors of more than 2³¹ elements, PGD as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_curvature_ops
import test_ops
import torch
from kernel_cases import PLAIN
from on_device import OnDevice, asynchronous, moved_to
from ops_cases import NORMS, SIZES, calls, images
from torch import Tensor, nn

from blokern import ops
from blokern.attack import PGD

pytestmark = pytest.mark.cuda


class Recorder:
    """The ops, as functions without arguments of tensors that stay where they are: for a capture."""

    curvature = ops.curvature

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = torch.utils._pytree.tree_map_only(
                Tensor, lambda t: moved_to(t, self.device), (args, kwargs)
            )
            self.calls.append(lambda: getattr(ops, name)(*args, **kwargs))
            return self.calls[-1]()

        return call


def check_capture(device: torch.device, case: Callable[[Any], Any]) -> None:
    """A replay has the bits of the call; it needs no more than the call queued."""
    recorder = Recorder(device)
    case(recorder)
    run = recorder.calls[-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = asynchronous(device, run)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    leaves = torch.utils._pytree.tree_leaves
    for t in leaves(got):
        t.zero_()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(leaves(got), leaves(want), strict=True))


@pytest.mark.parametrize("case", PLAIN)
def test_curvature_ops_are_captured(cuda: torch.device, case: str) -> None:
    check_capture(cuda, PLAIN[case])


@pytest.mark.parametrize("op", ["pgd_step", "project", "fast_bat_step"])
@pytest.mark.parametrize("norm", NORMS)
def test_attack_ops_are_captured(cuda: torch.device, op: str, norm: str) -> None:
    if op == "fast_bat_step" and norm != "linf":
        return
    for shape in ((3, 3, 7, 11), (2, 3, 80, 80)):
        check_capture(cuda, lambda module, shape=shape: calls(module, norm)[op](*images(shape)))


def test_steps_in_place_are_captured(cuda: torch.device) -> None:
    for norm in NORMS:
        x_adv, x, grad = (t.to(cuda) for t in images((3, 3, 40, 40)))
        eps, step = SIZES[norm]
        want = x_adv.clone()
        ops.pgd_step_(want, x, grad, step, eps, norm=norm)
        graph, static = torch.cuda.CUDAGraph(), x_adv.clone()
        with torch.cuda.graph(graph):
            ops.pgd_step_(static, x, grad, step, eps, norm=norm)
        static.copy_(x_adv)
        graph.replay()
        assert torch.equal(static, want)


def test_sums_of_lists_and_products_are_captured(cuda: torch.device) -> None:
    stacks = [torch.randn(3, 5000), torch.randn(3, 7)]
    check_capture(cuda, lambda module: module.multi_tensor_dot(stacks, stacks))
    weight, mask, x = (
        torch.randn(40, 300, device=cuda),
        torch.rand(40, 300, device=cuda) < 0.02,
        torch.randn(33, 300),
    )
    packed, sparse = ops.pack_weight(weight, mask), ops.SparseMask(mask)
    check_capture(cuda, lambda module: module.packed_linear(x, packed))
    for samples in (3, 33):
        check_capture(cuda, lambda module, n=samples: module.masked_linear(x[:n], weight, sparse))


def test_tensors_of_two_devices_are_refused(cuda: torch.device) -> None:
    x_adv, x, grad = images((3, 2, 5))
    for mixed in ((x_adv.to(cuda), x, grad), (x_adv.to(cuda), x.to(cuda), grad)):
        with pytest.raises((ValueError, RuntimeError), match="device"):
            ops.pgd_step(*mixed, 0.1, 0.1)
    (logits, tangent, target), _ = test_curvature_ops.cross_entropy_case(4, 5, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        ops.softmax_cross_entropy_hvp(logits.to(cuda), tangent.to(cuda), target)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("case", PLAIN)
def test_another_device_than_the_current(case: str) -> None:
    torch.cuda.set_device(0)
    other, current = (PLAIN[case](OnDevice(torch.device("cuda", i))) for i in (1, 0))
    test_curvature_ops.close(other, current, torch.float32)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("op", ["pgd_step", "project", "apgd_step_"])
def test_on_a_stream_of_the_caller(cuda: torch.device, op: str, norm: str) -> None:
    """The work waits for what the caller has queued there."""
    stream, tensors = torch.cuda.Stream(), images((2, 3, 40, 40))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        here = tuple(t.to(cuda, non_blocking=True) for t in tensors)
        got = calls(ops, norm)[op](*here)
    stream.synchronize()
    want = calls(ops, norm)[op](*(t.to(cuda) for t in tensors))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


# ---- More than 2³¹ elements

LARGE = 2**31 + 4099


def large(cuda: torch.device, tensors: int) -> None:
    """Skips where so many tensors of LARGE bfloat16 elements do not fit."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(cuda)[0] < (tensors + 1) * 2 * LARGE:
        pytest.skip("not enough memory on the device")


def pattern(cuda: torch.device, seed: int) -> Tensor:
    """LARGE values that repeat with a period that no power of two divides."""
    piece = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)).bfloat16().to(cuda)
    return piece.repeat(LARGE // len(piece) + 1)[:LARGE]


def test_a_batch_of_more_elements_than_an_int_counts(cuda: torch.device) -> None:
    large(cuda, 4)
    x_adv, x, grad = (pattern(cuda, seed) for seed in range(3))
    x_adv.clamp_(0, 1), x.clamp_(0, 1)
    tail = slice(LARGE - 5000, LARGE)
    want = ops.pgd_step(x_adv[tail], x[tail], grad[tail], 0.1, 0.2)
    ops.pgd_step_(x_adv.view(1, -1), x.view(1, -1), grad.view(1, -1), 0.1, 0.2)
    assert torch.equal(x_adv[tail], want)


def test_a_sample_of_more_elements_than_an_int_counts(cuda: torch.device) -> None:
    large(cuda, 4)
    x_adv, x, grad = (pattern(cuda, seed) for seed in range(3))
    x_adv.clamp_(0, 1), x.clamp_(0, 1)
    eps = 20_000.0
    chunks = list(zip(x_adv.split(2**26), x.split(2**26), grad.split(2**26), strict=True))
    norm = sum(float(g.double().square().sum()) for _, _, g in chunks) ** 0.5
    deltas = (a.double() - b.double() + 9_000.0 / norm * g.double() for a, b, g in chunks)
    size = sum(float(d.square().sum()) for d in deltas) ** 0.5
    a, b, g = (t[-5000:].double() for t in (x_adv, x, grad))
    want = (b + (a - b + 9_000.0 / norm * g) * min(1.0, eps / size)).clamp(0, 1)
    ops.pgd_step_(x_adv.view(1, -1), x.view(1, -1), grad.view(1, -1), 9_000.0, eps, norm="l2")
    torch.testing.assert_close(x_adv[-5000:].double(), want, rtol=0, atol=2.0**-8)


def test_curvature_ops_of_more_elements_than_an_int_counts(cuda: torch.device) -> None:
    large(cuda, 6)
    z, v = pattern(cuda, 0), pattern(cuda, 1)
    rows, classes = LARGE // 40_009, 40_009
    shape, target = (rows, classes), torch.arange(rows, device=cuda)
    z, v = z[: rows * classes].view(shape), v[: rows * classes].view(shape)
    _, grad, hvp = ops.softmax_cross_entropy_hvp(z, v, target % classes, reduction="sum")
    _, *want = ops.softmax_cross_entropy_hvp(z[-3:], v[-3:], target[-3:] % classes, reduction="sum")
    test_curvature_ops.close((grad[-3:], hvp[-3:]), tuple(want), torch.bfloat16)
    del grad, hvp
    moved = ops.activation_adjoint_tangent("silu", z, v, z, v)[1]
    want = ops.activation_adjoint_tangent("silu", z[-3:], v[-3:], z[-3:], v[-3:])[1]
    assert torch.equal(moved[-3:], want)


# ---- PGD as one graph


@pytest.mark.parametrize("norm", NORMS)
def test_a_graphed_attack_is_the_attack(cuda: torch.device, norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(cuda)
    eps, step = SIZES[norm]

    def attack(**how: Any) -> PGD:
        generator = torch.Generator().manual_seed(1)
        return PGD(model, eps, step, steps=5, norm=norm, generator=generator, **how)

    graphed, plain = attack(cuda_graph=True), attack()
    for seed, samples in ((0, 6), (1, 6), (2, 4)):  # captured, replayed, captured for another shape
        x = images((samples, 3, 8, 8), seed=seed)[1].to(cuda)
        y = torch.randint(5, (samples,), device=cuda)
        torch.testing.assert_close(graphed(x, y), plain(x, y), rtol=0, atol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)
    torch.testing.assert_close(graphed(x, y), plain(x, y), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="label 7"):
        graphed(x, torch.full_like(y, 7))


def test_every_attack_kernel_once(cuda: torch.device) -> None:
    """For compute-sanitizer (make gpu), beside the plain cases of the curvature family."""
    there = OnDevice(cuda)
    for op, norm in test_ops.ALL:
        for shape in ((3, 3, 7, 11), (2, 3, 50, 61)):
            calls(there, norm)[op](*images(shape))
    for norm in NORMS:
        there.random_start(images((2, 3, 50, 61))[1], SIZES[norm][0], norm=norm)


def test_every_sparse_kernel_once(cuda: torch.device) -> None:
    """The same of the sparse family and of lists of tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = (
            torch.randn(70, 300, device=cuda, dtype=dtype),
            torch.randn(40, 300, device=cuda, dtype=dtype),
        )
        for density in (0.02, 0.6):
            mask = ops.SparseMask(torch.rand(70, 300, device=cuda) < density)
            mask.to_dense(), mask.stream(transposed=True), ops.sddmm(weight[:, :40], x.t().contiguous(), mask)
            packed = ops.pack_weight(weight, mask)
            for samples in (1, 3, 16, 40):
                ops.masked_linear(x[:samples], weight, mask)
                ops.packed_linear(x[:samples], packed)
        ops.topk_mask([weight, x], 0.3), ops.nm_mask(weight, 2, 4), ops.nm_mask(weight, 2, 5)
    layers, stacks = [torch.randn(5, 9, device=cuda)], [torch.randn(2, 5000, device=cuda) for _ in range(4)]
    ops.masked_sgd_step_(
        layers, [layers[0].clone()], [torch.ones(5, 9, dtype=torch.bool, device=cuda)], lr=0.1
    )
    ones = torch.ones(2, dtype=torch.float64, device=cuda)
    ops.multi_tensor_axpby_(stacks[:1], stacks[1:2], ones, ones)
    ops.cg_update_(*([t] for t in stacks), ones)

"""Masked and packed layers in what torch traces: nothing of one input, one mask or one weight is kept."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern.sparse import MaskedConv2d, MaskedLinear, masks_of, pack, samples_innermost, sparsify, to_dense


class Reader(nn.Module):
    """Calls its layers, and reads their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)) + F.conv2d(x, self.conv.weight, None, padding="same")
        x = self.fc(x.mean((2, 3)))
        return self.out(x) + F.linear(x, self.out.weight)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def network() -> nn.Module:
    model = Reader().double().eval()
    return sparsify(model, random_masks(model))


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() > 1}


def images(n: int = 2, size: int = 5) -> Tensor:
    return torch.rand(n, 2, size, size, dtype=torch.float64)


def expected(model: nn.Module, x: Tensor) -> Tensor:
    return to_dense(copy.deepcopy(model))(x)


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    """Values where masks are 0, which nobody may see."""
    for p in model.parameters():
        p.data.add_(1.0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_jit_trace(warm: bool, grad: bool) -> None:
    model = network()
    with torch.set_grad_enabled(grad):
        if warm:
            model(images())
        traced = torch.jit.trace(model, images())
        for n, size in ((3, 5), (2, 9), (1, 4)):
            x = images(n, size)
            torch.testing.assert_close(traced(x), expected(model, x))
        for mask in masks_of(model).values():
            mask.update_(torch.rand(mask.shape) < 0.5)
        spoil(model)
        torch.testing.assert_close(traced(x), expected(model, x))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    torch.testing.assert_close(loaded(x), expected(model, x))


@pytest.mark.parametrize("warm", [False, True])
def test_compiled(warm: bool) -> None:
    model = network()
    if warm:
        model(images()).sum().backward()
        model.zero_grad()
    twin = to_dense(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        spoil(model)
        masks = {name: mask.to_dense() for name, mask in masks_of(model).items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                twin.get_parameter(name).copy_(p * masks.get(name, 1))
        x = images()
        gradients = []
        for net in (compiled, twin):
            y = net(x)
            gradients.append((y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))))
        for (name, _), got, want in zip(
            twin.named_parameters(), gradients[0][1:], gradients[1][1:], strict=True
        ):
            torch.testing.assert_close(got, want * masks.get(name, 1))
        torch.testing.assert_close(gradients[0][0], gradients[1][0])
        for mask in masks_of(model).values():
            mask.update_(torch.rand(mask.shape) < 0.5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_exported(warm: bool, strict: bool) -> None:
    model = network()
    if warm:
        with torch.no_grad():
            model(images(3))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},), strict=strict)
    x = images(7)
    torch.testing.assert_close(program.module()(x), expected(model, x))
    state = copy.deepcopy(network().state_dict())
    module = program.module()
    module.load_state_dict(state, strict=False)  # strict ones have no check, which they do not read
    model.load_state_dict(state)
    torch.testing.assert_close(module(x), expected(model, x))


@torch.no_grad()
def test_packed_layers_in_a_trace() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    sparsify(model, random_masks(model))
    want = to_dense(copy.deepcopy(model))
    pack(model, max_density=1.0)
    traced = torch.jit.trace(model, torch.randn(3, 8))
    for n in (1, 5):
        x = torch.randn(n, 8)
        torch.testing.assert_close(traced(x), want(x))


def test_vmap_and_forward_mode_over_what_is_read() -> None:
    layer = MaskedLinear(6, 4, mask=torch.rand(4, 6) < 0.5).double()
    weight = layer.weight.detach().clone()
    xs = torch.randn(3, 2, 6, dtype=torch.float64)
    got = torch.func.vmap(lambda x: F.linear(x, layer.weight))(xs)
    torch.testing.assert_close(got, F.linear(xs, weight))
    tangent = torch.func.jvp(lambda x: F.linear(x, layer.weight), (xs,), (torch.ones_like(xs),))[1]
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(xs), weight))

    def read(weight: Tensor) -> Tensor:
        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.child = layer

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.child.weight).square().sum()

        return torch.func.functional_call(Parent(), {"child.weight": weight}, (xs,))

    mask = layer.mask.to_dense()
    start = torch.randn(4, 6, dtype=torch.float64)
    want = torch.func.grad(lambda w: F.linear(xs, w * mask).square().sum())(start)
    torch.testing.assert_close(torch.func.grad(read)(start), want)
    torch.testing.assert_close(torch.func.jacfwd(read)(start), want)
    layer.dense_grad = True
    straight = torch.func.grad(lambda w: F.linear(xs, w).square().sum())(start * mask)
    torch.testing.assert_close(torch.func.grad(read)(start), straight)
    torch.testing.assert_close(torch.func.jacfwd(read)(start), straight)


@pytest.mark.parametrize("form", [lambda model: model, samples_innermost, pack])
def test_symbolically_traced(form: Callable[[nn.Module], nn.Module]) -> None:
    """Layers are nodes, and what a parent reads of them is masked."""
    model = nn.Sequential(Reader(), nn.Sequential(nn.Linear(3, 9), nn.Unflatten(1, (1, 3, 3))))
    model = nn.Sequential(model, nn.MaxPool2d(2), nn.BatchNorm2d(1)).double().eval()
    spoil(sparsify(model, random_masks(model)))
    if form is pack:
        model = nn.Sequential(nn.Flatten(), pack(model[0][1]))
    x = torch.rand(2, 3, dtype=torch.float64) if form is pack else images()
    with torch.no_grad():
        want = form(model)(x)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), want)
        if form is not pack:
            torch.testing.assert_close(want, expected(model, x))
            assert {node.target for node in traced.graph.nodes} >= {"0.0.conv", "0.0.fc", "0.0.out", "0.1.0"}
            sparsify(model, random_masks(model))
            torch.testing.assert_close(traced(x), expected(model, x))


@pytest.mark.parametrize("layer", [MaskedLinear(3, 3), MaskedConv2d(3, 3, 1), pack(MaskedLinear(3, 3), 1.0)])
@pytest.mark.parametrize("input", [None, [1.0], "x"])
def test_no_tensor_is_told(layer: nn.Module, input: object) -> None:
    with pytest.raises(TypeError, match=f"input must be a Tensor, got {type(input).__name__}"):
        layer(input)

"""Networks that compute with samples innermost against the same networks in NCHW."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import models
from blokern.sparse import (
    MaskedLinear,
    SamplesInnermostBatchNorm2d,
    SparseMask,
    is_samples_innermost,
    samples_innermost,
    sparsify,
    to_dense,
    to_samples_innermost,
)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(name: str = "preact_resnet18") -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name, num_classes=5, width=4).double()
    masks = {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters() if p.dim() > 1}
    return sparsify(model, masks)


class Functional(nn.Module):
    """What a network does outside its layers: pools, means, concatenation, a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16 + 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        y = torch.cat([y, y + self.conv(x)], 1)
        pooled = F.adaptive_avg_pool2d(F.max_pool2d(y[:, :4], 2), 2)
        return self.fc(torch.cat([pooled.flatten(1), y.mean((2, 3))], 1))


def functional() -> nn.Module:
    torch.manual_seed(0)
    model = Functional().double()
    return sparsify(
        model, {"conv.weight": torch.rand(4, 3, 3, 3) < 0.5, "fc.weight": torch.rand(3, 24) < 0.5}
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.BatchNorm2d(3),
    "norm, cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "norm, no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "norm, not affine": lambda: nn.BatchNorm2d(3, affine=False, eps=0.1, momentum=0.7),
    "norm, eval": lambda: nn.BatchNorm2d(3).eval(),
    "max": lambda: nn.MaxPool2d(2),
    "max, odd": lambda: nn.MaxPool2d(3, 2, padding=1, dilation=2, ceil_mode=True),
    "max, indices": lambda: nn.MaxPool2d(2, return_indices=True),
    "average": lambda: nn.AvgPool2d(2),
    "average, odd": lambda: nn.AvgPool2d((3, 2), (2, 1), padding=1, ceil_mode=True, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive, odd": lambda: nn.AdaptiveAvgPool2d((4, None)),
}


def run(layer: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients by x and the parameters of a function of them."""
    x = x.detach().requires_grad_()
    out = layer(x)
    outs = [out] if isinstance(out, Tensor) else [*out]
    return outs, [*torch.autograd.grad((outs[0] ** 3).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("shape", [(4, 3, 7, 8), (2, 3, 9, 5), (1, 3, 7, 8)], ids=str)
def test_layers(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    plain, layer = make().double(), samples_innermost(make().double())
    x = images(*shape)
    inner = to_samples_innermost(x)
    for _ in range(2):  # running statistics move
        (want, want_grads), (got, got_grads) = run(plain, x), run(layer, inner)
        torch.testing.assert_close([*got, *got_grads], [*want, *want_grads], rtol=1e-10, atol=1e-10)
    assert all(is_samples_innermost(y) == (shape[0] > 1) for y in got)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    assert str(plain) in str(layer)  # the name grows, the settings stay


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_on_other_layouts_are_the_plain_ones(make: Callable[[], nn.Module]) -> None:
    plain, layer = make().double(), samples_innermost(make().double())
    layer._forward_pre_hooks.clear()
    x = images(4, 3, 7, 8)
    for y in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        to_samples_innermost(images(4, 6, 7, 8))[:, ::2],
    ):
        (want, want_grads), (got, got_grads) = run(plain, y), run(layer, y)
        assert all(map(torch.equal, [*got, *got_grads], [*want, *want_grads]))


@given(*[st.integers(1, 4)] * 4)
def test_conversion(n: int, c: int, h: int, w: int) -> None:
    x = images(n, c, h, w)
    inner = to_samples_innermost(x)
    assert torch.equal(inner, x)
    assert is_samples_innermost(inner) == (n > 1)
    assert to_samples_innermost(inner) is inner
    assert (inner is x) == (n == 1 or x.permute(1, 2, 3, 0).is_contiguous())


def test_conversion_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got shape \(3, 8\)"):
        to_samples_innermost(torch.rand(3, 8))


@pytest.mark.parametrize(
    "make", [network, lambda: network("small_cnn"), lambda: network("vgg16_bn"), functional]
)
def test_networks_train_alike(make: Callable[[], nn.Module]) -> None:
    plain, inner = make(), samples_innermost(make())
    assert plain.state_dict().keys() == inner.state_dict().keys()
    x, y = images(3, 3, 16, 16), torch.tensor([0, 1, 2])
    for _ in range(2):
        for net in (plain, inner):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        want = {name: p.grad for name, p in plain.named_parameters()} | dict(plain.named_buffers())
        got = {name: p.grad for name, p in inner.named_parameters()} | dict(inner.named_buffers())
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(inner.eval()(x), plain.eval()(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inner(x[:1]), plain(x[:1]), rtol=1e-10, atol=1e-10)


def test_the_layout_lasts_to_the_classifier() -> None:
    model = samples_innermost(network())
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if not [*module.children()]:
            hook: Any = lambda _, args, __, name=name: seen.update({name: args[0].stride()})  # noqa: E731
            module.register_forward_hook(hook)
    model(images(3, 3, 16, 16))
    assert isinstance(model.get_submodule("head.2"), MaskedLinear)
    assert len(seen) == 58
    assert {stride[0] for stride in seen.values()} == {1}


def test_to_dense_undoes_it() -> None:
    model = network()
    kinds = [type(m) for m in to_dense(copy.deepcopy(model)).modules()]
    samples_innermost(samples_innermost(model))
    assert len(model._forward_pre_hooks) == 1
    assert any(type(m) is SamplesInnermostBatchNorm2d for m in model.modules())
    own = model.register_forward_pre_hook(lambda *_: None)
    assert [type(m) for m in to_dense(model).modules()] == kinds
    assert [*model._forward_pre_hooks] == [own.id]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_so_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = samples_innermost(network("small_cnn")).eval()
    x = images(2, 3, 8, 8)
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert is_samples_innermost(twin.get_submodule("features")(to_samples_innermost(x)))
    assert len(to_dense(twin)._forward_pre_hooks) == 0
    assert len(model._forward_pre_hooks) == 1


def test_compiled_networks() -> None:
    model = samples_innermost(functional()).eval()
    x = images(3, 3, 8, 8)
    want, got = model(x), torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out.square().sum(), [*model.parameters()]) for out in (got, want)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


def test_first_use_in_inference_mode_does_not_spoil_training() -> None:
    model = samples_innermost(functional())
    x = images(2, 3, 8, 8)
    with torch.inference_mode():
        mask = SparseMask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
        want = sparsify(model, {"conv.weight": mask})(x)
    out = model(x)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())

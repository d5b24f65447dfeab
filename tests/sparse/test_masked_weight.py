"""What others see of a masked layer's weight, against dense networks with weight · mask: values and gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import (
    clip_grad_norm_,
    parameters_to_vector,
    parametrizations,
    spectral_norm,
    vector_to_parameters,
)

from blokern.curvature import hvp
from blokern.sparse import MaskedConv2d, MaskedLinear, masks_of, sparsify, to_dense


class Reader(nn.Module):
    """A parent that multiplies by its children's weights itself, as attention blocks do, and calls them as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj, self.fc = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(12, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + F.conv2d(x, self.conv.weight, None, padding=1)
        x = F.linear(x.flatten(1), self.proj.weight, self.proj.bias)
        return F.linear(self.fc(x), self.fc.weight.t()) * self.fc.weight.square().mean()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape) < 0.4 for name, p in model.named_parameters() if p.dim() > 1}


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 2, 2, dtype=torch.float64)


def masked_and_dense(model: nn.Module | None = None) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A masked network, and a dense one with zeros in the same places."""
    model = Reader().double() if model is None else model
    masks = random_masks(model)
    dense = copy.deepcopy(model)
    apply(dense, masks)
    return sparsify(model, masks), dense, masks


@torch.no_grad()
def apply(dense: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        dense.get_parameter(name).mul_(mask)


def dense_loss(dense: nn.Module, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of weight · mask, with its gradients."""
    weights = {name: dense.get_parameter(name) * mask for name, mask in masks.items()}
    return functional_call(dense, weights, (x,)).square().sum()


def assert_zero_where_masked(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        assert (model.state_dict()[name][~mask] == 0).all()
        assert (model.get_parameter(name)[~mask] == 0).all()


# ---- Values and gradients


def test_a_parent_that_reads_weights_gets_masked_ones() -> None:
    masked, dense, masks = masked_and_dense()
    x = images()
    torch.testing.assert_close(masked(x), dense(x), rtol=1e-12, atol=1e-12)
    for _ in range(2):  # the hook is there once
        masked.zero_grad()
        masked(x).square().sum().backward()
    wanted = torch.autograd.grad(dense_loss(dense, masks, x), list(dense.parameters()))
    for (name, got), want in zip(masked.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, want, rtol=1e-12, atol=1e-12)
        assert name not in masks or (got.grad[~masks[name]] == 0).all()
        assert len(got._backward_hooks or {}) == (name in masks)


def test_second_derivatives_through_a_reader() -> None:
    masked, dense, masks = masked_and_dense()
    x, names = images(), list(masks)
    vectors = [torch.randn_like(masked.get_parameter(name)) for name in names]
    products = []
    for net in (masked, dense):
        loss = dense_loss(net, masks, x) if net is dense else net(x).square().sum()
        weights = [net.get_parameter(name) for name in names]
        first = torch.autograd.grad(loss, weights, create_graph=True)
        products.append(torch.autograd.grad(first, weights, vectors))
    for got, want in zip(*products, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_transformers_of_torch(training: bool) -> None:
    """In eval mode without gradients a fast path reads the layers' weights."""
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    masks = {
        name: torch.rand_like(encoder.get_parameter(name)) < 0.3
        for name in ("linear1.weight", "linear2.weight")
    }
    masked, dense = copy.deepcopy(encoder).train(training), encoder.train(training)
    sparsify(masked, masks)
    apply(dense, masks)
    x = torch.randn(2, 5, 16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(masked(x), dense(x), rtol=1e-5, atol=1e-5)


def test_a_straight_through_gradient_is_seen_by_readers_too() -> None:
    masked, dense, masks = masked_and_dense()
    for module in masked.modules():
        if isinstance(module, MaskedLinear | MaskedConv2d):
            module.dense_grad = True
    x = images()
    masked(x).square().sum().backward()
    dense(x).square().sum().backward()
    for got, want in zip(masked.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-12, atol=1e-12)
    assert_zero_where_masked(masked, masks)


def test_stand_ins_are_masked_and_left_as_they_are() -> None:
    masked, dense, masks = masked_and_dense()
    x = images()
    for make in (lambda t: t, nn.Parameter):
        weights = {name: make(torch.randn_like(masked.get_parameter(name))) for name in masks}
        before = {name: t.detach().clone() for name, t in weights.items()}
        products = {name: weights[name].detach() * mask for name, mask in masks.items()}
        torch.testing.assert_close(
            functional_call(masked, weights, (x,)), functional_call(dense, products, (x,))
        )
        assert all(torch.equal(weights[name], t) for name, t in before.items())

    for t in (*weights.values(), *products.values()):
        t.requires_grad_()
    got, want = (
        torch.autograd.grad(functional_call(net, w, (x,)).square().sum(), list(w.values()))
        for net, w in ((masked, weights), (dense, products))
    )
    for g, w, mask in zip(got, want, masks.values(), strict=True):
        torch.testing.assert_close(g, w * mask)


# ---- Training


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("change", [False, True], ids=["", "masks change midway"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_weight_times_mask(name: str, change: bool) -> None:
    if change and name == "lbfgs":
        pytest.skip("its memory is of other masks")
    masked, dense, masks = masked_and_dense()
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in (masked, dense)]
    for i in range(4):
        if change and i == 2:
            masks = random_masks(dense)
            sparsify(masked, masks)
            apply(dense, masks)
            assert_zero_where_masked(masked, masks)
        x = images()

        def masked_closure(x: Tensor = x) -> Tensor:
            masked.zero_grad()
            loss = masked(x).square().sum()
            loss.backward()
            clip_grad_norm_(masked.parameters(), 1.0)
            return loss

        def dense_closure(x: Tensor = x, masks: dict[str, Tensor] = masks) -> Tensor:
            dense.zero_grad()
            loss = dense_loss(dense, masks, x)
            loss.backward()
            clip_grad_norm_(dense.parameters(), 1.0)
            return loss

        optimizers[0].step(masked_closure)
        optimizers[1].step(dense_closure)
        apply(dense, masks)
        for got, want in zip(masked.state_dict().items(), dense.state_dict().items(), strict=False):
            if got[0] == want[0]:
                torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(masked(x), dense(x), rtol=1e-9, atol=1e-9)
    assert_zero_where_masked(masked, masks)


def test_a_scaler_and_autocast() -> None:
    torch.manual_seed(0)
    masked, dense, masks = masked_and_dense(Reader())
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (masked, dense)]
    x = images().float()
    for _ in range(3):
        for net, scaler, optimizer in zip((masked, dense), scalers, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(x).float().square().sum() if net is masked else dense_loss(net, masks, x).float()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for got, want in zip(masked.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.01)
    assert_zero_where_masked(masked, masks)


# ---- Whoever writes


def overwrite_data(weight: nn.Parameter) -> None:
    weight.data.normal_()


def take_other_data(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


def initialise(weight: nn.Parameter) -> None:
    nn.init.kaiming_normal_(weight)


@torch.no_grad()
def copy_over(weight: nn.Parameter) -> None:
    weight.copy_(torch.randn_like(weight))


@torch.no_grad()
def spoil(weight: nn.Parameter) -> None:
    weight.fill_(float("nan"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("write", [overwrite_data, take_other_data, initialise, copy_over, spoil])
def test_what_is_written_where_the_mask_is_zero_is_not_seen(write: Any, channels_last: bool) -> None:
    masked, _, masks = masked_and_dense()
    if channels_last:
        masked = masked.to(memory_format=torch.channels_last)
    parameters = dict(masked.named_parameters())
    for name, mask in masks.items():
        layer = masked.get_submodule(name.removesuffix(".weight"))
        weight = layer.weight
        assert weight is parameters[name]
        write(weight)
        assert layer.weight is weight
        assert (layer.weight[~mask] == 0).all()
        assert layer.weight[mask].abs().sum() != 0
        write(weight)
        assert (layer.state_dict()["weight"][~mask] == 0).all()
        write(weight)
        layer.mask.update_(mask)  # the same bits
        assert (layer.weight[~mask] == 0).all()


def test_a_vector_of_all_parameters() -> None:
    masked, dense, masks = masked_and_dense()
    vector = torch.randn_like(parameters_to_vector(masked.parameters()))
    for net in (masked, dense):
        vector_to_parameters(vector.clone(), net.parameters())
    apply(dense, masks)
    x = images()
    torch.testing.assert_close(masked(x), dense(x))
    torch.testing.assert_close(
        parameters_to_vector(masked.parameters()), parameters_to_vector(dense.parameters())
    )


def test_what_becomes_masked_is_zero_at_once_and_what_comes_back_starts_there() -> None:
    layer = MaskedLinear(6, 4, mask=torch.ones(4, 6, dtype=torch.bool))
    stored, weight = layer.stored_weight, layer.weight.detach().clone()
    first, second = torch.rand(4, 6) < 0.5, torch.rand(4, 6) < 0.5
    layer.mask.update_(first)
    assert torch.equal(stored, weight * first)
    with torch.no_grad():
        stored.add_(1.0)  # as an optimizer with momentum would
    layer.mask.update_(second)
    assert torch.equal(stored, (weight + 1) * first * second)


def test_an_outside_read_disturbs_no_graph() -> None:
    layer, x = MaskedLinear(6, 4, mask=torch.rand(4, 6) < 0.5), torch.randn(3, 6)
    loss = F.linear(layer(x), layer.weight.t()).square().sum()
    assert layer.weight.shape == (4, 6)
    loss.backward()


# ---- Assignment, deletion, copies


def test_a_new_parameter_is_masked_and_its_memory_stays() -> None:
    mask = torch.rand(4, 6) < 0.5
    layer, x = MaskedLinear(6, 4, mask=mask), torch.randn(3, 6)
    given = torch.randn(4, 6)
    before = given.clone()
    layer.weight = parameter = nn.Parameter(given)
    assert layer.weight is parameter
    assert dict(layer.named_parameters())["weight"] is parameter
    assert torch.equal(given, before)
    assert torch.equal(layer.weight, before * mask)
    torch.testing.assert_close(layer(x), F.linear(x, before * mask, layer.bias))
    (layer(x).sum() + layer.weight.sum()).backward()
    assert (parameter.grad[~mask] == 0).all()
    with pytest.raises(ValueError, match=r"mask must have the shape of weight, \(6, 4\), got \(4, 6\)"):
        layer.weight = nn.Parameter(torch.randn(6, 4))
    assert layer.weight is parameter


def test_a_weight_that_is_tied_afterwards_is_masked_for_all() -> None:
    mask = torch.rand(6, 6) < 0.5
    a, b, c = MaskedLinear(6, 6, mask=mask), nn.Linear(6, 6), nn.Linear(6, 6)
    weight = b.weight.detach().clone()
    a.weight = b.weight
    c.weight = a.weight
    x = torch.randn(3, 6)
    for layer in (a, b, c):
        torch.testing.assert_close(layer(x), F.linear(x, weight * mask, layer.bias))
    (a(x) + b(x) + c(x)).square().sum().backward()
    assert (b.weight.grad[~mask] == 0).all()
    other = MaskedLinear(6, 6, mask=~mask)
    with pytest.raises(ValueError, match="weight is that of a layer with another mask"):
        other.weight = a.weight


def test_a_masked_weight_is_not_deleted() -> None:
    layer = MaskedLinear(6, 4)
    with pytest.raises(ValueError, match="cannot be deleted, nor parametrized: call blokern"):
        del layer.weight
    for norm in (parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm):
        with pytest.raises(ValueError, match="cannot be deleted, nor parametrized"):
            norm(layer)
    assert layer(torch.ones(1, 6)).shape == (1, 4)
    del to_dense(layer).weight


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("read", [False, True])
def test_copies_are_masked_on_their_own(copied: Any, read: bool) -> None:
    masked, dense, masks = masked_and_dense()
    if read:
        masked(images()).sum().backward()
    twin = copied(masked)
    x = images()
    twin.zero_grad()
    twin(x).square().sum().backward()
    want = torch.autograd.grad(dense_loss(dense, masks, x), list(dense.parameters()))
    for got, w in zip(twin.parameters(), want, strict=True):
        torch.testing.assert_close(got.grad, w)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    optimizer.step()
    assert_zero_where_masked(twin, masks)
    for got, w in zip(masked.parameters(), dense.parameters(), strict=True):
        assert torch.equal(got, w)  # the first one is as it was


def test_back_to_dense_the_gradient_is_whole() -> None:
    masked, _, masks = masked_and_dense()
    masked(images()).sum().backward()
    model = to_dense(masked)
    assert not any(p._backward_hooks for p in model.parameters())
    model.zero_grad()
    model(images()).square().sum().backward()
    assert any((model.get_parameter(name).grad[~mask] != 0).any() for name, mask in masks.items())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_frozen_weights_and_dtypes(requires_grad: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        masked, dense, masks = masked_and_dense(Reader())
        for net in (masked, dense):
            net.to(dtype).requires_grad_(requires_grad)
        x = images().to(dtype)
        torch.testing.assert_close(masked(x), dense(x), rtol=0.05, atol=0.05)
        assert_zero_where_masked(masked, masks)


def test_replicas_as_of_data_parallel() -> None:
    masked, _, masks = masked_and_dense()
    x = images()
    for name in masks:
        layer = masked.get_submodule(name.removesuffix(".weight"))
        replica = layer._replicate_for_data_parallel()
        replica._parameters, replica._buffers = {}, {k: b.clone() for k, b in layer._buffers.items()}
        weight = layer.weight * 1.0 + (~masks[name])  # no leaf
        replica.weight, replica.bias = weight, layer.bias * 1.0
        assert torch.equal(replica.weight, layer.weight)
        x_in = x if isinstance(layer, nn.Conv2d) else torch.randn(2, layer.in_features).double()
        torch.testing.assert_close(replica(x_in), layer(x_in))
    assert list(masks_of(masked)) == list(masks)


@pytest.mark.parametrize("read_before", [False, True])
def test_products_of_a_weight_that_a_parent_reads(read_before: bool) -> None:
    """By the tape where masked products alone read it, whoever has looked at it; else by autograd, through the hook."""
    torch.manual_seed(0)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.inner.weight, self.inner.bias).tanh()
            return self.last(F.linear(h, self.inner.weight.t()).sin())

    model = Parent().double()
    masks = {"inner.weight": torch.rand(4, 4) < 0.5, "last.weight": torch.rand(3, 4) < 0.5}
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    dense = dict(copy.deepcopy(model).named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        kept = {name: p * masks[name] if name in masks else p for name, p in values.items()}
        return F.cross_entropy(functional_call(model, kept, (x,)), y)

    want = torch.func.jvp(torch.func.grad(loss), (dense,), (v,))[1]
    masked = sparsify(copy.deepcopy(model), masks)
    if read_before:
        assert masked.inner.weight.grad is None
        assert masked.last.weight.grad is None
    got = hvp(masked, F.cross_entropy, x, y, v)
    for name, product in want.items():
        torch.testing.assert_close(got[name], product)

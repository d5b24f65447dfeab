"""Products of whole networks: against oracles, the full Hessian, closed forms, and the algebra that they must obey."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import models, sparse
from blokern.curvature import ggnvp, hvp, linearize, mixed_hvp

Problem = tuple[nn.Module, Tensor, Tensor]


def images(model: nn.Module, train: bool, size: int = 8) -> Problem:
    """A network in float64 with running statistics that are not the initial ones."""
    torch.manual_seed(1)
    model = model.double()
    x = torch.rand(4, 3, size, size, dtype=torch.float64)
    model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.train(train), x, torch.tensor([0, 3, 1, 1])


def small_net() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.LayerNorm(4),
        nn.Tanh(),
        nn.Linear(4, 3),
    ).double()
    return model, torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU("tanh"), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


NETS = {
    "small_cnn": lambda: models.small_cnn(width=2),
    "resnet18": lambda: models.resnet18(width=2),
    "resnet20": lambda: models.resnet20(width=2),
    "preact_resnet18": lambda: models.preact_resnet18(width=2),
    "preact_resnet50": lambda: models.preact_resnet50(width=1),
    "vgg16_bn": lambda: models.vgg16_bn(width=1),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_networks(name: str, train: bool) -> None:
    torch.manual_seed(0)
    model, x, y = images(NETS[name](), train)
    if name in (
        "resnet20",
        "preact_resnet50",
        "vgg16_bn",
    ):  # the stack and GGN of every op are seen elsewhere
        v = oracles.random_vector(model)
        product = oracles.on_tape(model, F.cross_entropy, x, y, input_gradient=False).hvp(v)
        oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, x, y, v), atol=1e-9)
    else:
        oracles.check_products(model, F.cross_entropy, x, y, atol=1e-9)


def test_sparse_network_of_any_layout() -> None:
    torch.manual_seed(0)
    model, x, y = images(models.preact_resnet18(width=2), train=True)
    masks = {
        f"{name}.weight": torch.rand_like(module.weight) < 0.6
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    sparse.sparsify(model, masks)
    oracles.check_products(model, F.cross_entropy, x, y, atol=1e-9)
    v, dense = oracles.random_vector(model), None
    dense = hvp(model, F.cross_entropy, x, y, v)
    oracles.assert_close(hvp(sparse.samples_innermost(model), F.cross_entropy, x, y, v), dense, atol=1e-9)


def test_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Block(), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 3)
    )
    x, y = torch.randn(2, 4, 8, dtype=torch.float64), torch.randint(3, (2, 4))

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.mT, y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        oracles.check_products(model.double(), loss_fn, x, y)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layouts(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x, y = images(models.small_cnn(width=2), train=True)
    model, x = model.to(memory_format=memory_format), x.to(memory_format=memory_format)
    oracles.check_products(model, F.cross_entropy, x, y)
    sliced = torch.rand(4, 3, 9, 9, dtype=torch.float64)[..., 1:, :-1]
    oracles.check_products(model, F.cross_entropy, sliced, y)


def test_full_hessian_column_by_column() -> None:
    model, x, y = small_net()
    parameters = oracles.trainable(model)
    count = sum(p.numel() for p in parameters.values())
    basis = torch.eye(count, dtype=torch.float64).split([p.numel() for p in parameters.values()], 1)
    columns = {
        name: b.reshape(count, *p.shape) for (name, p), b in zip(parameters.items(), basis, strict=True)
    }
    stacked = oracles.on_tape(model, F.cross_entropy, x, y, input_gradient=False).hvp(columns)
    hessian = torch.cat([t.flatten(1) for t in stacked.values()], 1)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        out = torch.func.functional_call(model, values | {k: b.clone() for k, b in model.named_buffers()}, x)
        return F.cross_entropy(out, y)

    expected = torch.autograd.functional.hessian(loss, oracles.flat(parameters).detach())
    assert (hessian - expected).abs().max() < 1e-9
    assert (hessian - hessian.T).abs().max() < 1e-12

    gauss_newton = oracles.on_tape(model, F.cross_entropy, x, y).ggnvp(columns)
    matrix = torch.cat([t.flatten(1) for t in gauss_newton.values()], 1)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_quadratic() -> None:
    """ℓ = ½ Σ (aᵢᵀ w − yᵢ)²: the Hessian is AᵀA wherever w is, and the Gauss-Newton matrix too."""
    a, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    v = {"weight": torch.randn(1, 4, dtype=torch.float64)}
    expected = {"weight": v["weight"] @ a.T @ a}

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(out, y, reduction="sum")

    oracles.assert_close(hvp(model, loss_fn, a, y, v), expected, rtol=1e-13)
    oracles.assert_close(ggnvp(model, loss_fn, a, y, v), expected, rtol=1e-13)


def test_softmax_regression() -> None:
    """H = 1/N Σ (diag p − ppᵀ) ⊗ xxᵀ, and ∇²_{θx} by hand."""
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    model = nn.Linear(4, 3, bias=False).double()
    v, u = {"weight": torch.randn(3, 4, dtype=torch.float64)}, torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        p = model(x).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        along = torch.einsum("nij,nj->ni", curvature, x @ v["weight"].T)
        expected = {"weight": along.T @ x / 6}
        moved = torch.einsum("nij,nj->ni", curvature, u @ model.weight.T)
        mixed = {"weight": (moved.T @ x + (p - F.one_hot(y)).T @ u) / 6}
    oracles.assert_close(hvp(model, F.cross_entropy, x, y, v), expected, rtol=1e-12)
    oracles.assert_close(ggnvp(model, F.cross_entropy, x, y, v), expected, rtol=1e-12)
    oracles.assert_close(mixed_hvp(model, F.cross_entropy, x, y, u), mixed, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_algebra(seed: int, a: float, b: float) -> None:
    model, x, y = small_net()
    at_x = linearize(model, F.cross_entropy, x, y)
    torch.manual_seed(seed)
    v, w, u = oracles.random_vector(model), oracles.random_vector(model), torch.randn_like(x)
    both = {name: a * v[name] + b * w[name] for name in v}
    for name in ("hvp", "ggnvp"):
        of_v, of_w, of_both = (oracles.flat(getattr(at_x, name)(t, retain_graph=True)) for t in (v, w, both))
        oracles.assert_close(of_both, a * of_v + b * of_w, atol=1e-10)
        oracles.assert_close(of_v @ oracles.flat(w), of_w @ oracles.flat(v), atol=1e-10)
    assert oracles.flat(v) @ oracles.flat(at_x.ggnvp(v, retain_graph=True)) >= 0
    one = oracles.flat(at_x.mixed_hvp(u, retain_graph=True)) @ oracles.flat(v)
    other = (u * at_x.mixed_hvp_transpose(v, retain_graph=True)).sum()
    oracles.assert_close(one, other, atol=1e-10)


def test_losses_that_do_not_depend_on_parameters_or_input() -> None:
    model, x, y = small_net()
    v = oracles.random_vector(model)
    stack = oracles.random_vector(model, 2)
    at_x = linearize(model, lambda out, y: out.detach().sum(), x, y)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.equal(at_x.grad_input, torch.zeros_like(x))
    for product in (at_x.hvp(v, retain_graph=True), at_x.ggnvp(v, retain_graph=True)):
        assert all(torch.equal(product[name], zeros[name]) for name in zeros)
    assert at_x.mixed_hvp(x, retain_graph=True).keys() == zeros.keys()
    assert at_x.mixed_hvp_transpose(stack).shape == (2, *x.shape)

    linear = nn.Linear(4, 1).double()  # no curvature at all
    x = torch.randn(3, 4, dtype=torch.float64)
    product = hvp(linear, lambda out, y: out.sum(), x, None, oracles.random_vector(linear))
    assert not any(t.any() for t in product.values())


def test_frozen_parameters_are_constants() -> None:
    model, x, y = small_net()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    oracles.check_products(model, F.cross_entropy, x, y)
    assert "0.weight" not in hvp(model, F.cross_entropy, x, y, oracles.random_vector(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    model, x, y = small_net()
    v = oracles.random_vector(model)
    expected = oracles.flat(hvp(model, F.cross_entropy, x, y, v))
    low = {name: t.to(dtype) for name, t in v.items()}
    product = hvp(model.to(dtype), F.cross_entropy, x.to(dtype), y, low)
    assert all(t.dtype == dtype for t in product.values())
    cosine = F.cosine_similarity(oracles.flat(product).double(), expected, dim=0)
    assert cosine > (0.97 if dtype == torch.bfloat16 else 1.0 - 1e-9)

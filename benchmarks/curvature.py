"""Hessian-vector products of whole networks against one gradient of the same loss, and what others take for them; and
the second derivative of the softmax cross-entropy by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.networks import images, network
from blokern import curvature, keep_freed_memory, ops
from blokern._race import Case

STACK = 8

Run = Callable[[], object]
Vector = dict[str, Tensor]


def cases() -> Iterator[Case]:
    keep_freed_memory()  # as `blokern train` does; it serves every rival
    yield _products("MLP 784-512-512-10, batch 128", _mlp(), torch.rand(128, 784))
    yield _products(
        "transformer, 4 layers of 128, batch 16, 64 tokens", _transformer(), torch.rand(16, 64, 128)
    )
    x, _ = images(32)
    yield _products("preact_resnet18, batch 32", network("preact_resnet18", x)[0].eval(), x)
    yield _training("preact_resnet18, batch 32", network("preact_resnet18", x)[0], x)
    yield _losses(128, 1000)
    yield _losses(4096, 32000)


# ---- Networks.


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ).eval()


def _transformer() -> nn.Module:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
            self.head = nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the only one that torch differentiates twice
                out: Tensor = self.head(self.encoder(x).mean(dim=1))
            return out

    torch.manual_seed(0)
    return Classifier()  # in train mode, where torch has no fused path without derivatives


def _problem(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Vector]:
    """Labels, a direction of x's shape and one of the parameters'."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(10, (len(x),), generator=generator)
    v = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    return y, torch.randn(x.shape, generator=generator), v


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    parameters = [*model.parameters()]
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def _double_backward(model: nn.Module, x: Tensor, y: Tensor, v: Vector) -> Run:
    parameters = [*model.parameters()]

    def run() -> object:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        return torch.autograd.grad(grads, parameters, [*v.values()])

    return run


def _mixed_double_backward(model: nn.Module, x: Tensor, y: Tensor, u: Tensor) -> Run:
    parameters = [*model.parameters()]

    def run() -> object:
        at = x.detach().requires_grad_()
        (by_x,) = torch.autograd.grad(F.cross_entropy(model(at), y), at, create_graph=True)
        return torch.autograd.grad(by_x, parameters, u)

    return run


def _forward_over_reverse(model: nn.Module, x: Tensor, y: Tensor, v: Vector) -> Run:
    at = {name: p.detach() for name, p in model.named_parameters()}
    gradient = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))
    return lambda: jvp(gradient, (at,), (v,))[1]


def _products(name: str, model: nn.Module, x: Tensor) -> Case:
    y, u, v = _problem(model, x)
    stacked = {key: torch.stack([value] * STACK) for key, value in v.items()}
    at_x = curvature.linearize(model, F.cross_entropy, x, y)
    data, parameters = [(x, y)], [*model.parameters()]
    flat = torch.cat([value.flatten() for value in v.values()])
    hessian, ggn = (
        peer(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        for peer in (HessianLinearOperator, GGNLinearOperator)
    )
    torch_func = _forward_over_reverse(model, x, y, v)
    rivals: dict[str, Run] = {
        "a gradient": _gradient(model, x, y),
        "hvp": lambda: curvature.hvp(model, F.cross_entropy, x, y, v),
        "hvp, linearized before": lambda: at_x.hvp(v, retain_graph=True),
        f"hvp, linearized before, {STACK} stacked": lambda: at_x.hvp(stacked, retain_graph=True),
        "hvp: double backward": _double_backward(model, x, y, v),
        "hvp: torch.func, jvp of grad": torch_func,
        "hvp: the same, compiled": torch.compile(torch_func, dynamic=False),
        "hvp: curvlinops": lambda: hessian @ flat,
        "ggnvp": lambda: curvature.ggnvp(model, F.cross_entropy, x, y, v),
        "ggnvp, linearized before": lambda: at_x.ggnvp(v, retain_graph=True),
        "ggnvp: curvlinops": lambda: ggn @ flat,
        "mixed_hvp": lambda: curvature.mixed_hvp(model, F.cross_entropy, x, y, u),
        "mixed_hvp, linearized before": lambda: at_x.mixed_hvp(u, retain_graph=True),
        "mixed_hvp: double backward": _mixed_double_backward(model, x, y, u),
    }
    return Case(f"{name}: products", rivals, "a gradient", memory=True)


def _training(name: str, model: nn.Module, x: Tensor) -> Case:
    y, u, v = _problem(model, x)
    rivals: dict[str, Run] = {
        "a gradient": _gradient(model, x, y),
        "hvp": lambda: curvature.hvp(model, F.cross_entropy, x, y, v),
        "hvp: double backward": _double_backward(model, x, y, v),
        "mixed_hvp": lambda: curvature.mixed_hvp(model, F.cross_entropy, x, y, u),
        "mixed_hvp: double backward": _mixed_double_backward(model, x, y, u),
    }
    return Case(f"{name}, batch statistics: products", rivals, "a gradient", memory=True)


# ---- Losses.


def _losses(samples: int, classes: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits, u = (torch.randn(samples, classes, generator=generator) for _ in range(2))
    y = torch.randint(classes, (samples,), generator=generator)
    at = logits.detach().requires_grad_()

    def autograd() -> tuple[Tensor, Tensor, Tensor]:
        loss = F.cross_entropy(at, y)
        (by_logits,) = torch.autograd.grad(loss, at, create_graph=True)
        return loss, by_logits, torch.autograd.grad(by_logits, at, u)[0]

    def formula(logits: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = F.log_softmax(logits, dim=1)
        p = log_p.exp()
        rows = torch.arange(len(y))
        by_logits = p / len(y)
        by_logits[rows, y] -= 1 / len(y)
        return -log_p[rows, y].mean(), by_logits, p * (u - (p * u).sum(dim=1, keepdim=True)) / len(y)

    compiled = torch.compile(formula, dynamic=False)
    name = "ops.softmax_cross_entropy_hvp"
    rivals: dict[str, Run] = {
        name: lambda: ops.softmax_cross_entropy_hvp(logits, u, y),
        "autograd, twice": autograd,
        "formula, eager": lambda: formula(logits, y, u),
        "formula, torch.compile": lambda: compiled(logits, y, u),
    }
    title = f"Softmax cross-entropy, {samples}×{classes}: value, gradient and product"
    return Case(title, rivals, name, bytes=4 * logits.nbytes)

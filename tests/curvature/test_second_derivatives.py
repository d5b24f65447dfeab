"""Where torch's own second derivatives are wrong, missing or lost: right all the same, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from test_rules import wavy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from blokern.curvature import hvp, linearize
from blokern.curvature.double_backward import DoubleBackward

pytestmark = pytest.mark.filterwarnings("ignore:no R-operator rule")

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 2, 1, 1, 0])


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2.0 * ctx.saved_tensors[0] * grad


class Once(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2.0 * ctx.saved_tensors[0] * grad


class Detached(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (2.0 * ctx.saved_tensors[0] * grad).detach()


class NoGrad(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            return 2.0 * ctx.saved_tensors[0] * grad


class NoGradient(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None


class Zero(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.zeros_like(grad)


class Scaled(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function
        self.scale, self.unused = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.function.apply(self.scale)  # type: ignore[no-untyped-call]
        return self.last(self.first(x).tanh() * scale)


LOSSES = {"curved": F.cross_entropy, "linear": lambda out, y: out.sum()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [Once, Detached, NoGrad])
def test_a_backward_that_cannot_be_differentiated_is_refused(
    function: type[torch.autograd.Function], loss: str
) -> None:
    model = Scaled(function)
    v, at_x = oracles.random_vector(model), linearize(model, LOSSES[loss], X, Y)
    for product in (at_x.hvp, at_x.ggnvp):
        with pytest.raises(RuntimeError, match=rf"{function.__name__}Backward .* by scale go through it"):
            product(v)
    oracles.assert_close(at_x.mixed_hvp(X), oracles.mixed_hvp(model, LOSSES[loss], X, Y, X))  # not twice


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [Square, NoGradient, Zero])
def test_what_is_constant_or_unused_has_zeros(function: type[torch.autograd.Function], loss: str) -> None:
    model = Scaled(function)
    v = oracles.random_vector(model)
    product = hvp(model, LOSSES[loss], X, Y, v)
    oracles.assert_close(product, oracles.hvp(model, LOSSES[loss], X, Y, v))
    assert not product["unused"].any()


class Elementary(nn.Module):
    """What weight_norm is, of a layer's parameters."""

    def __init__(self, layer: nn.Module, dim: int | None) -> None:
        super().__init__()
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1  # type: ignore[union-attr]
        self.g, self.v, self.bias, self.dim = (
            nn.Parameter(g.detach()),
            nn.Parameter(v.detach()),
            layer.bias,
            dim,
        )

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(self.v.dim()) if d != self.dim]
        weight = self.v * (self.g / self.v.square().sum(dims, keepdim=self.dim is not None).sqrt())
        return F.conv1d(x, weight, self.bias) if self.v.dim() == 3 else F.linear(x, weight, self.bias)


@pytest.mark.parametrize("act", [torch.tanh, torch.special.i0e], ids=["tape", "double backward"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(4, 3), lambda: nn.Conv1d(1, 3, 2)], ids=["linear", "conv"]
)
def test_weight_norm(build: Callable[[], nn.Module], dim: int | None, act: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(build().double(), dim=dim)  # type: ignore[arg-type]
    twin, x = Elementary(layer, dim), X if isinstance(layer, nn.Linear) else X.unsqueeze(1)
    names = {
        "g": "parametrizations.weight.original0",
        "v": "parametrizations.weight.original1",
        "bias": "bias",
    }

    def loss_fn(out: Tensor, y: Any) -> Tensor:
        return wavy(act(out), y)

    v = oracles.random_vector(twin)
    at_x = linearize(layer, loss_fn, x, None)
    named = {names[name]: t for name, t in v.items()}
    for product, oracle in ((at_x.hvp, oracles.hvp), (at_x.ggnvp, oracles.ggnvp)):
        found = product({name: named[name] for name in at_x._parameters})
        expected = oracle(twin, loss_fn, x, None, v)
        oracles.assert_close({name: found[names[name]] for name in v}, expected)


class Attention(nn.Module):
    """With a weight_norm, which is taken apart."""

    def __init__(self, checkpointed: bool, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)
        self.inner = parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.checkpointed, self.act = checkpointed, act

    def attend(self, h: Tensor) -> Tensor:
        h = self.inner(h)
        return self.act(self.attention(h, h, h, need_weights=False)[0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = checkpoint(self.attend, h, use_reentrant=False) if self.checkpointed else self.attend(h)
        return self.last(h).mean(1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("act", [torch.tanh, torch.sinc], ids=["tape", "double backward"])
def test_a_checkpoint_runs_again_as_it_ran(act: Callable[[Tensor], Tensor], autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    models = [Attention(checkpointed, act).to(dtype) for checkpointed in (True, False)]
    v, x = oracles.random_vector(models[0]), torch.randn(2, 5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ats = [linearize(model, F.cross_entropy, x, Y[:2]) for model in models]
    assert isinstance(ats[0]._products, DoubleBackward) == (act is torch.sinc)
    for name in ("hvp", "ggnvp"):
        found, expected = (getattr(at_x, name)(v) for at_x in ats)
        oracles.assert_close(found, expected, rtol=1e-5 if autocast else 1e-9)
    oracles.assert_close(ats[0].mixed_hvp(x), ats[1].mixed_hvp(x), rtol=1e-5 if autocast else 1e-9)
    if not autocast:
        with sdpa_kernel(SDPBackend.MATH):
            oracles.assert_close(
                ats[0].mixed_hvp(x), oracles.mixed_hvp(models[1], F.cross_entropy, x, Y[:2], x), atol=1e-9
            )


def test_a_reentrant_checkpoint_says_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    last = nn.Linear(6, 3).double()

    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = net, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.net, x, use_reentrant=True))

    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        linearize(Reentrant(), F.cross_entropy, X, Y)


class Shifted(nn.Module):
    """A norm, with a bias alone or with a weight of ones."""

    def __init__(self, norm: str, alone: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.bias = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(6))
        self.norm, self.weight = norm, None if alone else torch.ones(6, dtype=torch.float64)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.norm == "layer":
            h = F.layer_norm(h, (6,), self.weight, self.bias)
        elif self.norm == "group":
            h = F.group_norm(h, 2, self.weight, self.bias)
        else:
            h = F.batch_norm(h, None, None, self.weight, self.bias, True)
        return self.last(h)


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_norms_with_a_bias_alone(norm: str) -> None:
    oracles.check_products(Shifted(norm, True), F.cross_entropy, X, Y, twin=Shifted(norm, False))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)])
def test_labels_of_one_byte(weight: Tensor | None) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    oracles.check_products(model, lambda out, y: F.cross_entropy(out, y, weight), X, Y.to(torch.uint8))


def test_a_norm_at_zero_has_no_second_derivative() -> None:
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    v = oracles.random_vector(model)
    at_x = oracles.on_tape(model, lambda out, y: out.norm(dim=1).sum(), X, Y)
    assert all(t.isnan().all() for t in at_x.hvp(v).values())
    # Within normalize's eps the norm is not asked for.
    small = oracles.on_tape(model, lambda out, y: (F.normalize(out, eps=0.5) ** 2).sum(), X, Y).hvp(v)
    oracles.assert_close(small, oracles.hvp(model, lambda out, y: ((out / 0.5) ** 2).sum(), X, Y, v))


def test_complex_and_lazy_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3).to(torch.complex128))
    with pytest.raises(TypeError, match=r"parameters must be real, got complex 0\.weight, 0\.bias"):
        linearize(model, F.cross_entropy, X, Y)
    with pytest.raises(ValueError, match=r"got lazy weight, bias: run the model once before"):
        linearize(nn.LazyLinear(3), F.cross_entropy, X, Y)


def test_a_parameter_frozen_on_the_way_is_named() -> None:
    def freeze(module: nn.Module, args: Any, out: Tensor) -> None:
        module.weight.requires_grad_(False)

    model = nn.Linear(4, 3).double()
    model.register_forward_hook(freeze)
    with pytest.raises(ValueError, match="weight stopped requiring a gradient during the forward pass"):
        linearize(model, F.cross_entropy, X, Y)


def test_a_loss_that_is_not_finite_is_told_of_a_model_that_keeps_activations() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.log = nn.Linear(4, 3).double(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.kept = [self.first(x)]
            return self.log(self.kept[0].square().neg().log())

    with pytest.raises(FloatingPointError, match="module 'log' is the first that is not finite"):
        linearize(Keeps(), F.cross_entropy, X, Y)

"""What an op reads is what it was when the op ran, whatever happens to the tensor later; or the tape is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from test_rules import CASES, Applied, wavy
from torch import Tensor, nn
from torch.nn import functional as F

from blokern.curvature import linearize
from blokern.curvature.double_backward import DoubleBackward

Forward = Callable[["Net", Tensor], Tensor]
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.run = nn.Linear(4, 6), nn.Linear(6, 3), forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def squeezed(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).tanh())[:, :1].clone().squeeze_(1)


def unsqueezed_after_use(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    k = h.tanh() * h
    h.unsqueeze_(0)
    return net.last((h * k).squeeze_(0))


def turned_after_use(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).sin()
    k = h * h
    h.t_()
    return net.last(h.t() * k)


def transposed_after_use(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).sin()
    k = h * h
    h.transpose_(0, 1)
    return net.last((h @ h.t() @ h).t() + k)


def parameter_replaced(net: Net, x: Tensor) -> Tensor:
    net.first.weight.data = net.first.weight.data * 1.0
    return net.last(net.first(x).sin())


def parameter_clamped(net: Net, x: Tensor) -> Tensor:
    net.first.weight.data.clamp_(-0.3, 0.3)
    return net.last(net.first(x).sin())


def view_changed(net: Net, x: Tensor) -> Tensor:
    h = net.first(x.view(5, 1, 4))  # a view of a product
    return net.last(F.relu_(h).squeeze(1))


ON_TAPE: list[Forward] = [
    squeezed,
    parameter_replaced,
    parameter_clamped,
    view_changed,
]


def constant_resized(net: Net, x: Tensor) -> Tensor:
    c = torch.full((5, 6), 0.5, dtype=x.dtype)
    h = net.first(x).sin() * c
    c.resize_(3, 2)
    return net.last(h * h)


def constant_set(net: Net, x: Tensor) -> Tensor:
    c = torch.full((5, 6), 0.5, dtype=x.dtype)
    h = net.first(x) * c
    c.set_(torch.full((5, 6), 7.0, dtype=x.dtype))
    return net.last(h.sin() * c)


def constant_unsqueezed(net: Net, x: Tensor) -> Tensor:
    c = torch.linspace(0.5, 1.5, 30, dtype=x.dtype).view(5, 6).clone()
    h = net.first(x) * c
    c.unsqueeze_(0)
    return net.last(h.sin() * c[0])


def indices_zeroed(net: Net, x: Tensor) -> Tensor:
    i = torch.tensor([0, 2, 4, 4, 1])
    h = net.first(x).sin()[i]
    i.zero_()
    return net.last(h * h)


def gather_zeroed(net: Net, x: Tensor) -> Tensor:
    i = torch.tensor([[0, 2, 4, 4, 1, 1]] * 5)
    h = net.first(x).sin().gather(0, i)
    i.zero_()
    return net.last(h * h)


def rows_zeroed(net: Net, x: Tensor) -> Tensor:
    i = torch.tensor([0, 2, 4, 4, 1])
    h = F.embedding(i, net.first.weight)
    i.zero_()
    return net.last(h @ net.first.weight.t()) * x.sum()


def mask_filled(net: Net, x: Tensor) -> Tensor:
    mask, h = torch.tensor([True, False] * 3), net.first(x)
    h = h.masked_fill(mask, 0.0).sin() + h * torch.where(mask, h, 1.0)
    mask.fill_(True)
    return net.last(h * h)


#: torch itself has lost what its backward pass would need.
ONLY_ON_TAPE: list[Forward] = [
    unsqueezed_after_use,
    turned_after_use,
    transposed_after_use,
    constant_resized,
    constant_set,
    constant_unsqueezed,
    indices_zeroed,
    gather_zeroed,
    rows_zeroed,
    mask_filled,
]


@pytest.mark.parametrize("forward", ON_TAPE)
def test_products_equal_double_backward(forward: Forward) -> None:
    oracles.check_products(Net(forward), wavy, X, None)


@pytest.mark.parametrize("forward", ONLY_ON_TAPE)
def test_products_are_differences_of_losses(forward: Forward) -> None:
    model, h = Net(forward), 1e-4
    v, u = oracles.random_vector(model), oracles.random_vector(model)
    product = oracles.on_tape(model, wavy, X, None).hvp(v)

    def loss(along_u: int, along_v: int) -> Tensor:
        moved = Net(forward)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(along_u * h * u[name] + along_v * h * v[name])
            return wavy(moved(X), None)

    difference = (loss(1, 1) - loss(1, -1) - loss(-1, 1) + loss(-1, -1)) / (4 * h * h)
    oracles.assert_close(oracles.flat(u) @ oracles.flat(product), difference, rtol=1e-5, atol=1e-5)


class Dirty(torch.autograd.Function):
    """Nine times a's gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.mark_dirty(a)
        return a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 9.0 * grad


class DirtyProduct(Dirty):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.mark_dirty(a)
        return a.mul_(3.0)


class Same(Dirty):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a


class Row(Dirty):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.view(1, 5, 6)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 9.0 * grad[0]


class Differentiable(Dirty):
    """Whose forward autograd records, in vain."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        with torch.enable_grad():
            return a.mul(3.0)


def old_hook(net: Net, x: Tensor) -> Tensor:
    def twice(module: nn.Module, grads: tuple[Any, ...], outs: Any) -> tuple[Any, ...]:
        return tuple(None if g is None else 2.0 * g for g in grads)

    handle = net.first.register_backward_hook(twice)
    out: Tensor = net.last(net.first(x).tanh())
    handle.remove()
    return out


def node_hook(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    assert h.grad_fn is not None
    h.grad_fn.register_hook(lambda grads, outs: (2.0 * outs[0],))
    return net.last(h)


def data_replaced(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).sin()
    h.data = h.data * 2.0
    return net.last(h * h)


REFUSED: dict[str, Forward] = {
    **{
        f.__name__: lambda net, x, f=f: net.last(f.apply(net.first(x)).sin())
        for f in (Dirty, DirtyProduct, Same, Row, Differentiable)
    },
    "old hook": old_hook,
    "node hook": node_hook,
    "data replaced": data_replaced,
}


@pytest.mark.filterwarnings("ignore:no R-operator rule")
@pytest.mark.parametrize("case", REFUSED)
def test_what_only_autograd_follows_is_left_to_it(case: str) -> None:
    model = Net(REFUSED[case])
    v, at_x = oracles.random_vector(model), linearize(model, wavy, X, None)
    assert isinstance(at_x._products, DoubleBackward)
    oracles.assert_close(at_x.hvp(v), oracles.hvp(model, wavy, X, None, v))
    oracles.assert_close(at_x.mixed_hvp(X), oracles.mixed_hvp(model, wavy, X, None, X))


@pytest.mark.parametrize("what", ["index", "labels"])
def test_arguments_changed_since_are_noticed(what: str) -> None:
    given = {"index": torch.tensor([0, 2, 4, 4, 1]), "labels": torch.tensor([0, 2, 1, 1, 0])}
    model = Net(lambda net, x: net.last(net.first(x).tanh()[given["index"]]))
    at_x = oracles.on_tape(model, F.cross_entropy, X, given["labels"])
    given[what].zero_()
    named = {"index": r"aten\.index\.Tensor", "labels": r"aten\.nll_loss_forward"}[what]
    with pytest.raises(RuntimeError, match=rf"{named}.* read or made was changed in place since"):
        at_x.mixed_hvp(X)


def test_an_op_keeps_tensors_where_they_are_guarded() -> None:
    for f, shapes in CASES.values():
        torch.manual_seed(0)
        model = Applied(f, *shapes)
        at_x = oracles.on_tape(model, wavy, torch.randn(shapes[0], dtype=torch.float64), None)
        for op in at_x._products.tape.ops:
            found = {name: t for name, t in vars(op).items() if name != "saved" and _has_tensor(t)}
            assert not found, (op.func, found)


def _has_tensor(tree: Any) -> bool:
    return isinstance(tree, Tensor) or (isinstance(tree, tuple | list) and any(map(_has_tensor, tree)))

"""What may run while a tape is written: anything; and what then comes of it is right, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blokern.curvature import HessianOperator, ggnvp, hvp, linearize
from blokern.curvature.double_backward import DoubleBackward

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Three linear layers, and whatever forward a test has in mind."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("seen", torch.zeros(6))
        self.run = forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 2, 1, 1, 0])


class Doubled(torch.autograd.Function):
    """Twice a's gradient, which no op in its forward would tell."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad


def in_place(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh_()
    h = net.second(h).mul_(3.0).add_(net.frozen).relu_()
    out = net.last(h)
    out += 0.1 * x.sum()
    return out


def in_place_after_read(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    k = h + 1.0
    square = k * k
    k.mul_(k.detach()).add_(square)
    h += k.square()
    return net.last(h)


def out_of_place_after_read(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    k = h + 1.0
    k = k * k.detach() + k * k
    return net.last(h + k.square())


def in_place_multiply(net: Net, x: Tensor) -> Tensor:
    h, k = net.first(x), net.second.weight.sum(1)
    return net.last(h.mul_(k).sigmoid_())


def buffer_changed_after_use(net: Net, x: Tensor) -> Tensor:
    net.seen.fill_(0.5)
    h = net.first(x).tanh() * (net.seen + 1.0)
    net.seen.fill_(9.0)
    return net.last(h * net.frozen.clone().mul_(2.0))


def unsaved_change_under_no_grad(net: Net, x: Tensor) -> Tensor:
    h = net.first(x) + 1.0
    with torch.no_grad():
        h.clamp_(-0.5, 0.5)
    return net.last(h * net.frozen)


def loops(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    while h.norm() < 50.0:
        h = net.second(h).tanh() + 1.5 * h
    return net.last(h if h.sum() > 0 else -h)


def tied(net: Net, x: Tensor) -> Tensor:
    h = F.linear(net.first(x), net.second.weight).tanh()
    return net.last(F.linear(h, net.second.weight.t()).tanh())


def detached(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    with torch.no_grad():
        scale = net.second(h).square().mean()
    return net.last(h * scale + net.second(h).detach() + net.second(h).data)


def written_into(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    buffer = torch.zeros(5, 6, dtype=x.dtype)
    buffer.copy_(h)
    return net.last(buffer.add_(h * h))


def checkpointed(net: Net, x: Tensor) -> Tensor:
    h = checkpoint(lambda t: net.second(net.first(t)).tanh(), x, use_reentrant=False)
    return net.last(h)


def random_mask(net: Net, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return net.last(F.dropout(net.first(x).tanh(), 0.4))


def foreign_leaf(net: Net, x: Tensor) -> Tensor:
    stranger = torch.ones(6, dtype=x.dtype, requires_grad=True)
    return net.last(net.first(x).tanh() * stranger)


def forward_hooks(net: Net, x: Tensor) -> Tensor:
    handles = [
        net.first.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,)),
        net.first.register_forward_hook(lambda module, args, out: out.sin()),
    ]
    h = net.first(x)
    for handle in handles:
        handle.remove()
    return net.last(h)


ON_TAPE: list[Forward] = [
    in_place,
    in_place_multiply,
    buffer_changed_after_use,
    unsaved_change_under_no_grad,
    loops,
    tied,
    detached,
    written_into,
    checkpointed,
    random_mask,
    foreign_leaf,
    forward_hooks,
]


@pytest.mark.parametrize("forward", ON_TAPE)
def test_products_are_right(forward: Forward) -> None:
    oracles.check_products(Net(forward), F.cross_entropy, X, Y)


def test_a_tape_keeps_values_that_autograd_would_have_lost() -> None:
    model, twin = Net(in_place_after_read), Net(out_of_place_after_read)
    oracles.check_products(model, F.cross_entropy, X, Y, twin=twin)


def custom_function(net: Net, x: Tensor) -> Tensor:
    return net.last(Doubled.apply(net.first(x).tanh()))


def custom_function_of_parameter(net: Net, x: Tensor) -> Tensor:
    return net.last(net.first(x).tanh() @ Doubled.apply(net.second.weight))


def tensor_hook(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh()
    out: Tensor = net.last(h)
    h.register_hook(lambda grad: 2.0 * grad)
    return out


def module_hook(net: Net, x: Tensor) -> Tensor:
    handle = net.second.register_full_backward_hook(lambda module, grads, outs: (2.0 * grads[0],))
    out: Tensor = net.last(net.second(net.first(x)).tanh())
    handle.remove()
    return out


def view_written(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh() + 0.0
    h[:, :2].mul_(3.0)
    return net.last(h)


def base_written(net: Net, x: Tensor) -> Tensor:
    h = net.first(x).tanh() + 0.0
    view = h.view(-1)
    h.mul_(3.0)
    return net.last(view.view(5, 6) * h)


def alias_written(net: Net, x: Tensor) -> Tensor:
    h = net.first(x) + 0.0
    h.detach().clamp_(-0.2, 0.2)
    return net.last(h)


def written_into_slice(net: Net, x: Tensor) -> Tensor:
    buffer = torch.zeros(5, 6, dtype=x.dtype)
    buffer[:, 1:5] = net.first(x).tanh()[:, 1:5]
    return net.last(buffer)


def unknown_op(net: Net, x: Tensor) -> Tensor:
    return net.last(torch.special.i0e(net.first(x)).tanh() + torch.atan2(net.first(x), net.frozen))


def unknown_in_place(net: Net, x: Tensor) -> Tensor:
    return net.last((net.first(x) * 0.1).sinc_())


def inner_gradient(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    (force,) = torch.autograd.grad(h.tanh().sum(), h, create_graph=True)
    return net.last(force)


REFUSED: dict[Forward, str] = {
    custom_function: "DoubledBackward",
    custom_function_of_parameter: "DoubledBackward",
    tensor_hook: "a hook on a gradient",
    module_hook: "a look at autograd's graph",
    view_written: "in place",
    base_written: "in place",
    alias_written: "in place",
    written_into_slice: "CopySlices",
    unknown_op: "aten.special_i0e|aten.atan2",
    unknown_in_place: "aten.sinc_",
    inner_gradient: "aten.tanh_backward",
}


@pytest.mark.parametrize("forward", REFUSED)
def test_what_a_tape_cannot_hold_is_done_by_autograd_and_said_once(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blokern.curvature.linearization._warned", set())
    model = Net(forward)
    v, u = oracles.random_vector(model), torch.randn_like(X)
    with pytest.warns(UserWarning, match=REFUSED[forward]):
        at_x = linearize(model, F.cross_entropy, X, Y)
    assert isinstance(at_x._products, DoubleBackward)
    problem = (model, F.cross_entropy, X, Y)
    stack = {name: torch.stack([t, -2.0 * t]) for name, t in v.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(*problem)
        oracles.assert_close(at_x.hvp(v, retain_graph=True), oracles.hvp(*problem, v))
        oracles.assert_close(at_x.mixed_hvp(u, retain_graph=True), oracles.mixed_hvp(*problem, u))
        oracles.assert_close(
            at_x.mixed_hvp_transpose(v, retain_graph=True), oracles.mixed_hvp_transpose(*problem, v)
        )
        oracles.assert_close(
            oracles.element(at_x.hvp(stack, retain_graph=True), 1),
            oracles.hvp(*problem, oracles.element(stack, 1)),
        )
        if forward is not module_hook:  # whose hook goes by calls
            oracles.assert_close(at_x.ggnvp(v), oracles.ggnvp(*problem, v))


def test_a_hook_on_a_parameters_gradient_is_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blokern.curvature.linearization._warned", set())
    model = Net(tied)
    model.last.weight.register_hook(lambda grad: 2.0 * grad)
    v = oracles.random_vector(model)
    with pytest.warns(UserWarning, match=r"a hook on the gradient of last\.weight"):
        product = hvp(model, F.cross_entropy, X, Y, v)
    oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, X, Y, v))


@pytest.mark.filterwarnings("ignore:no R-operator rule")
@pytest.mark.parametrize("forward", [tied, custom_function])
def test_the_model_runs_once(forward: Forward) -> None:
    model = Net(forward)
    calls, runs = [], model.run
    model.run = lambda net, x: calls.append(1) or runs(net, x)
    norm = nn.Sequential(model, nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    state = torch.random.get_rng_state()
    norm(X)
    expected, after = norm[1].running_mean.clone(), torch.random.get_rng_state()
    norm[1].reset_running_stats()
    torch.random.set_rng_state(state)
    calls.clear()
    at_x = linearize(norm, F.cross_entropy, X, Y)
    at_x.mixed_hvp(X)
    assert calls == [1]
    assert torch.equal(norm[1].running_mean, expected)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_running_statistics_may_move_before_a_product() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    expected = oracles.mixed_hvp(model, F.cross_entropy, X, Y, X)
    at_x = oracles.on_tape(model, F.cross_entropy, X, Y)
    model.train()(2.0 * X)
    oracles.assert_close(at_x.mixed_hvp(X), expected)


def test_parameters_changed_since_are_noticed() -> None:
    model = Net(tied)
    at_x = linearize(model, F.cross_entropy, X, Y)
    with torch.no_grad():
        model.second.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place since the forward pass"):
        at_x.mixed_hvp(X)


def test_outputs_of_any_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(tied)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.net(x), "more": [self.net.first(x).tanh(), None, 3]}

    def loss_fn(out: dict[str, Any], y: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"], y) + out["more"][0].square().mean()

    def flat_loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out[:, :3], y) + out[:, 3:].square().mean()

    class Flat(Two):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return torch.cat([out["logits"], out["more"][0]], 1)

    model, flat = Two(), Flat()
    v = oracles.random_vector(model)
    at_x = oracles.on_tape(model, loss_fn, X, Y)
    oracles.assert_close(at_x.hvp(v, retain_graph=True), oracles.hvp(model, loss_fn, X, Y, v))
    oracles.assert_close(at_x.ggnvp(v), oracles.ggnvp(flat, flat_loss, X, Y, v))


def test_integers_in_where_only_parameters_matter() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    tokens = torch.tensor([[1, 2], [9, 0], [1, 1], [4, 3], [2, 2]])
    v = oracles.random_vector(model)
    product = oracles.on_tape(model, F.cross_entropy, tokens, Y, input_gradient=False).hvp(v)
    oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, tokens, Y, v))


def test_a_tape_holds_no_graph() -> None:
    at_x = oracles.on_tape(Net(tied), F.cross_entropy, X, Y)
    assert all(not t.requires_grad for op in at_x._products.tape.ops for t in op.saved)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_constants_are_left_to_autograd(
    layout: torch.layout, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adjacency = (torch.rand(5, 5) < 0.5).double() * torch.rand(5, 5, dtype=torch.float64)
    sparse = adjacency.to_sparse(layout=layout)

    def forward(a: Tensor) -> Forward:
        def graph_layer(net: Net, x: Tensor) -> Tensor:
            h = net.first(x)
            h.mul_(2)
            return net.last(torch.tanh(a @ h))

        return graph_layer

    model, twin = Net(forward(sparse)).double(), Net(forward(adjacency)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    v = oracles.random_vector(model)
    expected = oracles.hvp(twin, F.cross_entropy, x, y, v)
    monkeypatch.setattr("blokern.curvature.linearization._warned", set())
    with pytest.warns(UserWarning, match="mm.default of sparse tensors"):
        oracles.assert_close(HessianOperator(model, F.cross_entropy, [(x, y)], keep=keep) @ v, expected)
    oracles.assert_close(
        ggnvp(model, F.cross_entropy, x, y, v), oracles.ggnvp(twin, F.cross_entropy, x, y, v)
    )

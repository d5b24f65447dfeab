"""Products leave a model as it was, whatever its forward pass changes, and what others have of it stays good."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blokern.curvature import GGNOperator, HessianOperator, cg_solve, hvp, inverse_hvp, lanczos, linearize
from blokern.curvature.preservation import ModelState, RandomState
from blokern.curvature.vectors import flatten, unflatten


class Net(nn.Module):
    """A small network that scales its hidden layer by a buffer, which subclasses change in their ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5]))
        self.double()

    def change(self, x: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.last(torch.tanh(self.first(x) * self.scale))


class InPlace(Net):
    def change(self, x: Tensor) -> None:
        self.scale.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)


class InPlaceAfterUse(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        with torch.no_grad():
            self.scale.mul_(0.5)
        return out


class ThroughData(Net):
    def change(self, x: Tensor) -> None:
        self.scale.data.mul_(0.9)


class Assigned(Net):
    def change(self, x: Tensor) -> None:
        self.scale = 0.9 * self.scale + 0.1 * x.detach().mean(0)


class AssignedWithGraph(Net):
    def change(self, x: Tensor) -> None:
        self.scale = self.scale * (1 + self.first.weight.sum(0))


class NotPersistent(InPlace):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", self.scale.clone(), persistent=False)


class PlainTensor(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def change(self, x: Tensor) -> None:
        self.scale.mul_(0.9)


class Registered(Net):
    """Makes a buffer, and says so, in its first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.made = False

    def change(self, x: Tensor) -> None:
        if not self.made:
            self.register_buffer("extra", x.detach().mean(0), persistent=False)
            self.made = True
        self.extra.mul_(2)
        self.scale = self.scale + self.extra


class Grown(Net):
    def change(self, x: Tensor) -> None:
        self.scale = torch.cat([self.scale, self.scale[:1]])

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.last(torch.tanh(self.first(x) * self.scale[:3]))


class Resized(Grown):
    def change(self, x: Tensor) -> None:
        self.scale.resize_(self.scale.numel() + 5).fill_(2.0)


class OtherMemory(Grown):
    def change(self, x: Tensor) -> None:
        self.scale.data = torch.cat([self.scale, self.scale])


class Expanded(Net):
    def change(self, x: Tensor) -> None:
        self.scale = self.scale.expand(len(x), -1)


class Squeezed(Net):
    def change(self, x: Tensor) -> None:
        self.scale.unsqueeze_(0)


class Gone(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.scale = None
        return out


class Deleted(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        del self.scale
        return out


class Counts(Net):
    """Python's numbers, lists, dicts and sets, which decide what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last_seen = 0, [], deque(maxlen=2)
        self.named, self.sizes = {"calls": 0}, {0}

    def change(self, x: Tensor) -> None:
        self.calls += 1
        self.seen.append(len(x))
        self.last_seen.append(len(x))
        self.named["calls"] += 1
        self.sizes.add(len(x))
        times = self.calls + len(self.seen) + len(self.last_seen) + self.named["calls"] + len(self.sizes)
        self.scale = self.scale * times


class InContainers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.states = [torch.ones(3, dtype=torch.float64)]
        self.by_name = {"a": torch.ones(3, dtype=torch.float64)}
        self.pair = (torch.ones(3, dtype=torch.float64), 1)

    def change(self, x: Tensor) -> None:
        for t in (self.states[0], self.by_name["a"], self.pair[0]):
            t.mul_(1.5)
        self.scale = self.scale * self.states[0] * self.by_name["a"] * self.pair[0]


class SharedMemory(Net):
    """Two buffers, in two modules, that see the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_buffer("same", self.scale)
        self.last.register_buffer("part", self.scale[1:])

    def change(self, x: Tensor) -> None:
        self.last.part.mul_(1.5)
        self.first.same.add_(1.0)


class NewModule(Net):
    def change(self, x: Tensor) -> None:
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3).double()


class Normalised(Net):
    """BatchNorm's kernels write running statistics without a new version."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False).double()

    def change(self, x: Tensor) -> None:
        self.norm(x)
        self.scale = self.scale * self.norm.running_var


NETS: list[type[Net]] = [
    Net,
    InPlace,
    InPlaceAfterUse,
    ThroughData,
    Assigned,
    AssignedWithGraph,
    NotPersistent,
    PlainTensor,
    Registered,
    Grown,
    Resized,
    OtherMemory,
    Expanded,
    Squeezed,
    Gone,
    Deleted,
    Counts,
    InContainers,
    SharedMemory,
    NewModule,
    Normalised,
]


def batches() -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=gen, dtype=torch.float64), torch.randint(2, (n,), generator=gen))
        for n in (5, 3)
    ]


def snapshot(model: nn.Module, versions: bool = True) -> dict[str, Any]:
    """All that a model holds: objects, values, and versions of what graphs may have saved."""

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            version = value._version if versions and value.is_floating_point() else None
            return id(value), value.detach().clone(), version, value.shape, value.stride()
        if isinstance(value, list | tuple | deque):
            return [told(each) for each in value]
        if isinstance(value, dict):
            return {key: told(each) for key, each in value.items()}
        return set(value) if isinstance(value, set) else value

    return {
        f"{name}.{key}": told(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def assert_same(now: Any, before: Any) -> None:
    assert type(now) is type(before)
    if isinstance(now, dict):
        assert [*now] == [*before]
        now, before = [*now.values()], [*before.values()]
    if isinstance(now, list | tuple):
        assert len(now) == len(before)
        for a, b in zip(now, before, strict=True):
            assert_same(a, b)
    elif isinstance(now, Tensor):
        assert torch.equal(now, before)
    else:
        assert now == before


def exact(kind: type[Net]) -> Tensor:
    """The mean of the batches' Hessians, each of a model of its own."""
    if kind is InPlaceAfterUse:  # which torch itself refuses
        kind = Net
    like = oracles.trainable(kind())

    def loss(row: Tensor, x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(kind(), unflatten(row, like), x)
        return F.cross_entropy(out, y, reduction="sum")

    point = flatten(like, like).detach()
    parts = [
        torch.autograd.functional.hessian(lambda row, x=x, y=y: loss(row, x, y), point) for x, y in batches()
    ]
    return torch.stack(parts).sum(0) / 8


def dense(operator: Any) -> Tensor:
    n = operator.shape[0]
    return flatten(
        operator @ unflatten(torch.eye(n, dtype=torch.float64), operator.parameters), operator.parameters
    )


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:no R-operator rule")
def test_products_are_right_and_leave_no_trace(kind: type[Net], keep: bool) -> None:
    model = kind()
    versions = (
        kind is not InContainers or not keep
    )  # kept graphs that had read them must not take them for the same
    before = snapshot(model, versions)
    operator = HessianOperator(model, F.cross_entropy, batches(), keep=keep)
    for _ in range(2):
        oracles.assert_close(dense(operator), exact(kind))
        assert_same(snapshot(model, versions), before)


def pending(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss whose backward is still to come, and its gradients."""
    parameters = [*model.parameters()]
    with ModelState(model).kept():
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    return F.cross_entropy(model(x), y), dict(zip(oracles.trainable(model), expected, strict=True))


@pytest.mark.parametrize("kind", [Net, InPlace, ThroughData, Assigned, Normalised, SharedMemory, PlainTensor])
@pytest.mark.parametrize("keep", [False, True])
def test_earlier_graphs_stay_good(kind: type[Net], keep: bool) -> None:
    """The user's own loss, and an earlier linearisation."""
    model, (x, y) = kind(), batches()[0]
    v = oracles.random_vector(model)
    expected = hvp(kind(), F.cross_entropy, x, y, v)
    at_x = linearize(model, F.cross_entropy, x, y)
    HessianOperator(model, F.cross_entropy, batches(), keep=keep) @ v
    oracles.assert_close(at_x.hvp(v), expected)
    model = kind()
    loss, gradients = pending(model, x, y)
    HessianOperator(model, F.cross_entropy, batches(), keep=keep) @ v
    for p, expected_p in zip(model.parameters(), gradients.values(), strict=True):
        (gradient,) = torch.autograd.grad(loss, p, retain_graph=True)
        oracles.assert_close(gradient, expected_p)


@pytest.mark.parametrize("kind", [Net, InPlace, Assigned, Normalised, Registered, Counts])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_solvers_take_models_with_buffers(kind: type[Net], curvature: Any) -> None:
    model = kind()
    b = oracles.random_vector(model)
    solution = inverse_hvp(model, F.cross_entropy, batches(), b, damping=30.0, curvature=curvature, tol=1e-10)
    operator = {"hessian": HessianOperator, "ggn": GGNOperator}[curvature](
        kind(), F.cross_entropy, batches(), damping=30.0
    )
    oracles.assert_close(
        flatten(solution.x, b), torch.linalg.solve(dense(operator), flatten(b, b)), atol=1e-8
    )


class Fails(InPlace):
    """Raises in the middle of the second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.fails and len(x) == 3:
            self.scale = None
            torch.rand(5)
            raise OverflowError("as a test")
        return out


@pytest.mark.parametrize("keep", [False, True])
def test_an_error_leaves_no_trace_while_it_is_held(keep: bool) -> None:
    model = Fails()
    v, before, state = oracles.random_vector(model), snapshot(model), torch.random.get_rng_state()
    operator = HessianOperator(model, F.cross_entropy, batches(), keep=keep)
    with pytest.raises(OverflowError) as error:
        operator @ v
    assert error.value.__traceback__ is not None  # which holds all frames
    assert_same(snapshot(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    before_flag, model.fails = model.fails, False
    assert before_flag
    oracles.assert_close(
        dense(operator), exact(InPlace)
    )  # of all batches, not of those that were kept by then


def test_a_checkpoint_that_runs_in_a_product_leaves_no_trace() -> None:
    """Autograd's graph of a checkpointed module runs it again in every product."""

    class Checkpointed(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(
                checkpoint(lambda t: F.elu(self.norm(self.first(t))) ** 3, x, use_reentrant=False)
            )

    model = Checkpointed()
    operator = HessianOperator(model, lambda out, y: F.cross_entropy(out.sinc(), y), batches(), keep=True)
    before, v = snapshot(model), oracles.random_vector(model)
    first = operator @ v
    assert_same(snapshot(model), before)
    again = HessianOperator(model, lambda out, y: F.cross_entropy(out.sinc(), y), batches()) @ v
    oracles.assert_close(first, again)
    oracles.assert_close(operator @ v, again)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.scale.fill_(3.0), "'scale'"),
        (lambda m: setattr(m, "scale", m.scale * 2), "'scale'"),
        (lambda m: setattr(m.first.weight, "data", m.first.weight.detach() * 2), "'first.weight'"),
        (lambda m: nn.utils.vector_to_parameters(torch.zeros(20).double(), m.parameters()), "'first.weight'"),
        (lambda m: m.eval(), "the mode of ''"),
        (lambda m: nn.init.zeros_(m.first.weight), "changed in place"),
    ],
)
def test_kept_batches_are_not_used_for_another_model(change: Callable[[Any], Any], what: str) -> None:
    model = Net()
    v, operator = oracles.random_vector(model), HessianOperator(model, F.cross_entropy, batches(), keep=True)
    operator @ v
    change(model)
    with pytest.raises(RuntimeError, match=what):
        operator @ v


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight.detach())),
            "'weight' has been replaced",
        ),
        (lambda m: setattr(m, "first", nn.Linear(3, 3).double()), "'first' has been replaced"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.first), "'weight' has been replaced"),
        (lambda m: m.first.weight.requires_grad_(False), "'first.weight' no longer requires a gradient"),
    ],
)
def test_parameters_that_are_gone_are_no_zeros(change: Callable[[Any], Any], what: str, keep: bool) -> None:
    model = Net()
    v, operator = oracles.random_vector(model), HessianOperator(model, F.cross_entropy, batches(), keep=keep)
    operator @ v
    change(model)
    with pytest.raises(RuntimeError, match=what):
        operator @ v


def test_products_follow_the_model() -> None:
    model = Net()
    operator = HessianOperator(model, F.cross_entropy, batches())
    first = dense(operator)
    with torch.no_grad():
        model.scale.mul_(2)
        model.last.weight.mul_(0.5)
    second = dense(operator)
    assert (first - second).abs().max() > 1e-3
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    v = oracles.random_vector(model)
    oracles.assert_close(operator @ v, oracles.hvp(model, F.cross_entropy, x, y, v))


def test_random_numbers_are_those_of_the_first_product() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    operator = HessianOperator(model, F.cross_entropy, batches())
    first = dense(operator)
    torch.rand(3)
    oracles.assert_close(dense(operator), first)
    oracles.assert_close(first, first.T)
    assert lanczos(operator, 5).values.isfinite().all()
    state, drawn = RandomState([torch.device("cpu")]), torch.rand(3)
    with state.replayed():
        assert torch.equal(torch.rand(3), drawn)


def test_memory_that_cannot_be_written() -> None:
    """A buffer of a read-only file: an unchanged one is not written, which would end the process."""
    values = np.ones(3)
    values.flags.writeable = False
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it cannot be written, once a process
        model.scale = torch.from_numpy(values)
    operator = HessianOperator(model, F.cross_entropy, batches())
    assert operator @ oracles.random_vector(model)
    solution = cg_solve(
        HessianOperator(model, F.cross_entropy, batches(), damping=1.0), oracles.random_vector(model)
    )
    assert solution.converged

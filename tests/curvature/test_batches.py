"""Batches of any make: unpacked, counted and moved right, or refused."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from blokern.curvature import GGNOperator, HessianOperator, inverse_hvp
from blokern.curvature.batches import moved, tensors
from blokern.curvature.vectors import flatten

Pair = namedtuple("Pair", ["first", "second"])


class Encoding(UserDict):
    """As transformers' BatchEncoding: not a dict, and moved in place."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: t.to(device) for key, t in self.data.items()}
        return self


@dataclass(frozen=True)
class Record:
    first: Tensor
    second: Tensor
    name: str = "record"


class ReadOnly(Mapping):  # a mapping that nothing can be assigned to
    def __init__(self, entries: dict[str, Tensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Reads(nn.Module):
    """Adds up what it finds of two inputs."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.first, self.second = read, nn.Linear(3, 4), nn.Linear(2, 4)
        self.last = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Any) -> Tensor:
        a, b = self.read(x)
        return self.last(torch.tanh(self.first(a) + self.second(b)))


def inputs(*sizes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, generator=gen, dtype=torch.float64),
            torch.randn(n, 2, generator=gen, dtype=torch.float64),
            torch.randint(3, (n,), generator=gen),
        )
        for n in sizes
    ]


def by_name(x: Any) -> tuple[Tensor, Tensor]:
    return x["first"], x["second"]


def by_attribute(x: Any) -> tuple[Tensor, Tensor]:
    return x.first, x.second


def by_place(x: Any) -> tuple[Tensor, Tensor]:
    return x[0], x[1]


def nested(x: Any) -> tuple[Tensor, Tensor]:
    return x["a"][0].first, x["a"][0].second


MAKES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dict": (lambda a, b: {"first": a, "second": b}, by_name),
    "OrderedDict": (lambda a, b: OrderedDict(first=a, second=b), by_name),
    "UserDict": (lambda a, b: UserDict(first=a, second=b), by_name),
    "BatchEncoding": (lambda a, b: Encoding(first=a, second=b), by_name),
    "MappingProxy": (lambda a, b: MappingProxyType({"first": a, "second": b}), by_name),
    "read-only mapping": (lambda a, b: ReadOnly({"first": a, "second": b}), by_name),
    "tuple": (lambda a, b: (a, b), by_place),
    "list": (lambda a, b: [a, b], by_place),
    "namedtuple": (Pair, by_attribute),
    "dataclass": (Record, by_attribute),
    "nested": (lambda a, b: UserDict(a=[Record(a, b)], b="text"), nested),
}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_batches_of_any_make_are_weighed_by_their_samples(kind: Any, make: str) -> None:
    build, read = MAKES[make]
    model, parts = Reads(read), inputs(4, 1)
    v = oracles.random_vector(model)
    product = kind(model, F.cross_entropy, [(build(a, b), y) for a, b, y in parts]) @ v
    a, b, y = (torch.cat(each) for each in zip(*parts, strict=True))
    oracles.assert_close(product, kind(model, F.cross_entropy, [(build(a, b), y)]) @ v)
    once = oracles.hvp if kind is HessianOperator else oracles.ggnvp
    oracles.assert_close(product, once(model, F.cross_entropy, build(a, b), y, v))


@pytest.mark.parametrize("make", MAKES)
def test_batches_of_any_make_are_moved(make: str) -> None:
    batch = MAKES[make][0](torch.ones(2, 3), torch.ones(2, 2))
    assert moved(batch, torch.device("cpu")) is batch
    there = moved(batch, torch.device("meta"))
    assert type(there) is type(batch)
    assert [t.device.type for t in tensors(there)] == ["meta", "meta"]
    assert [t.device.type for t in tensors(batch)] == ["cpu", "cpu"]  # the loader's is left alone
    assert [t.shape for t in tensors(there)] == [t.shape for t in tensors(batch)]


def test_what_is_moved_and_what_is_not() -> None:
    class Graph:
        def __init__(self, device: str) -> None:
            self.device = device

        def to(self, device: torch.device) -> Graph:
            return Graph(str(device))

    class Odd(tuple):
        def __new__(cls, *, entries: tuple[Any, ...]) -> Odd:
            return super().__new__(cls, entries)

    there = moved(({"graph": Graph("cpu")}, [torch.ones(2)], "text", 3, None), torch.device("meta"))
    assert there[0]["graph"].device == "meta"
    assert there[2:] == ("text", 3, None)
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert moved(packed, torch.device("meta")).data.device.type == "meta"
    with pytest.raises(TypeError, match="a batch's Odd cannot be copied to another device"):
        moved(Odd(entries=(torch.ones(2),)), torch.device("meta"))


class Tokens(nn.Module):
    """Says a class for every token of padded sequences [N, T]; 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x))).movedim(-1, 1)


def sequences(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(2)
    found = []
    for shape in shapes:
        x = torch.randint(1, 9, shape, generator=gen)
        x[0, 1:] = 0
        y = torch.randint(3, shape, generator=gen)
        found.append((x, y.where(x != 0, -100)))
    return found


def joined(model: nn.Module, parts: list[tuple[Any, Tensor]], loss_fn: Any, v: dict[str, Tensor]) -> Any:
    """The product of the sum over all batches, and what the losses are means of, added up."""
    products = [oracles.hvp(model, loss_fn, x, y, v) for x, y in parts]
    return {name: sum(product[name] for product in products) for name in v}


@pytest.mark.parametrize(
    "batch_size",
    [
        lambda x: (x != 0).sum(),
        lambda x: float((x != 0).sum()),
        lambda x, y: int((y != -100).sum()),
        lambda x, pad=0: (x != pad).sum().item(),
        lambda *args: (args[0] != 0).sum(),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_means_over_tokens_can_be_said(batch_size: Any, keep: bool) -> None:
    model, parts = Tokens(), sequences((4, 5), (2, 3))
    v = oracles.random_vector(model)
    product = HessianOperator(model, F.cross_entropy, parts, batch_size=batch_size, keep=keep) @ v
    tokens = sum(int((x != 0).sum()) for x, _ in parts)
    whole = joined(model, parts, partial(F.cross_entropy, reduction="sum"), v)
    oracles.assert_close(product, {name: t / tokens for name, t in whole.items()})
    solution = inverse_hvp(
        model, F.cross_entropy, parts, v, damping=3.0, batch_size=batch_size, tol=1e-9, curvature="ggn"
    )
    assert solution.converged


def test_class_weights_can_be_said() -> None:
    weight = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    model, parts = Reads(by_place), [((a, b), y) for a, b, y in inputs(4, 2)]
    v = oracles.random_vector(model)
    product = (
        HessianOperator(model, nn.CrossEntropyLoss(weight), parts, batch_size=lambda x, y: weight[y].sum())
        @ v
    )
    whole = joined(model, parts, nn.CrossEntropyLoss(weight, reduction="sum"), v)
    total = sum(weight[y].sum() for _, y in parts)
    oracles.assert_close(product, {name: t / total for name, t in whole.items()})


class TimeFirst(nn.Module):
    """Of sequences [T, N, 3]: a class each, or for every step."""

    def __init__(self, every_step: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.every_step = nn.RNN(3, 4), nn.Linear(4, 3), every_step
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x)[0]
        return self.head(h).movedim(-1, 1) if self.every_step else self.head(h[-1])


def time_first(every_step: bool, *shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(*shape, 3, generator=gen, dtype=torch.float64),
            torch.randint(3, shape if every_step else shape[1:], generator=gen),
        )
        for shape in shapes
    ]


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.filterwarnings("ignore:no R-operator rule")
def test_time_first_sequences(every_step: bool) -> None:
    model = TimeFirst(every_step)
    v = oracles.random_vector(model)
    alike, differ = time_first(every_step, (5, 4), (5, 4)), time_first(every_step, (5, 4), (5, 1))
    for parts in (alike, differ):
        product = HessianOperator(model, F.cross_entropy, parts, batch_size=lambda x: x.shape[1]) @ v
        x, y = torch.cat([x for x, _ in parts], 1), torch.cat([y for _, y in parts], -1)
        oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, x, y, v))
    oracles.assert_close(
        HessianOperator(model, F.cross_entropy, alike) @ v,
        HessianOperator(model, F.cross_entropy, alike, batch_size=len) @ v,
    )
    with pytest.raises(ValueError, match=r"what a batch weighs .* batch_size=lambda x"):
        HessianOperator(model, F.cross_entropy, differ) @ v


class Weighted(nn.Module):
    """A loss of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 4.0]).double())

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.inner(out, y)
        return loss


DOUBTFUL: dict[str, tuple[Any, Any, list[tuple[Any, Any]], str]] = {
    "ignored": (Tokens(), F.cross_entropy, sequences((4, 5), (3, 5)), "-100, which losses ignore"),
    "ignored by a module": (
        Tokens(),
        nn.CrossEntropyLoss(ignore_index=1),
        [(x, y.clamp(min=0)) for x, y in sequences((4, 5), (4, 5))],
        "1, which losses ignore",
    ),
    "lengths": (
        Tokens(),
        F.cross_entropy,
        [(x, y.clamp(min=0)) for x, y in sequences((4, 5), (4, 3))],
        "targets are sequences",
    ),
    "class weights": (
        Reads(by_place),
        nn.CrossEntropyLoss(torch.ones(3).double()),
        [((a, b), y) for a, b, y in inputs(4, 4)],
        "class weights",
    ),
    "class weights of a loss within": (
        Reads(by_place),
        Weighted(),
        [((a, b), y) for a, b, y in inputs(4, 4)],
        "class weights",
    ),
    "class weights of a bound method": (
        Reads(by_place),
        Weighted().forward,
        [((a, b), y) for a, b, y in inputs(4, 4)],
        "class weights",
    ),
    "a sum": (
        Reads(by_place),
        nn.CrossEntropyLoss(reduction="sum"),
        [((a, b), y) for a, b, y in inputs(4, 4)],
        "loss_fn is a sum",
    ),
    "a partial sum": (
        Reads(by_place),
        partial(F.cross_entropy, reduction="sum"),
        [((a, b), y) for a, b, y in inputs(4, 3)],
        "loss_fn is a sum",
    ),
    "no tensor": (
        Reads(lambda x: (x.first, x.second)),
        F.cross_entropy,
        [(type("Inputs", (), {"first": a, "second": b})(), list(y)) for a, b, y in inputs(4, 1)],
        "x has no tensor",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_weights_are_refused(name: str) -> None:
    model, loss_fn, parts, message = DOUBTFUL[name]
    if name == "no tensor":

        def loss_fn(out: Tensor, y: list[Tensor]) -> Tensor:
            return F.cross_entropy(out, torch.stack(y))

    v = oracles.random_vector(model)
    with pytest.raises(ValueError, match=message):
        HessianOperator(model, loss_fn, parts) @ v
    for one in parts:  # alone, its weight is of no account
        assert HessianOperator(model, loss_fn, [one]) @ v
    weighed = HessianOperator(model, loss_fn, parts, batch_size=lambda x: 1) @ v
    halves = [HessianOperator(model, loss_fn, [one]) @ v for one in parts]
    oracles.assert_close(weighed, {key: (halves[0][key] + halves[1][key]) / 2 for key in v})


def test_sums_add_up() -> None:
    model, parts = Reads(by_place), [((a, b), y) for a, b, y in inputs(4, 1)]
    v = oracles.random_vector(model)
    for loss_fn in (nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")):
        product = HessianOperator(model, loss_fn, parts, reduction="sum") @ v
        oracles.assert_close(product, joined(model, parts, loss_fn, v))


def test_several_inputs_of_which_the_first_has_the_samples() -> None:
    """Coordinates that are no samples do not matter where x's first tensor and y agree."""
    model = Reads(lambda x: (x[0], x[1][:1].expand(len(x[0]), -1)))
    grid = torch.randn(7, 2, dtype=torch.float64)
    parts = [((a, grid), y) for a, _, y in inputs(4, 1)]
    v = oracles.random_vector(model)
    product = HessianOperator(model, F.cross_entropy, parts) @ v
    whole = joined(model, parts, partial(F.cross_entropy, reduction="sum"), v)
    oracles.assert_close(product, {name: t / 5 for name, t in whole.items()})


def test_batches_that_weigh_nothing_are_left_out() -> None:
    model = Tokens()
    (x, y), empty = sequences((4, 5))[0], (torch.zeros(2, 5).long(), torch.full((2, 5), -100))
    v = oracles.random_vector(model)
    weigh = {"batch_size": lambda x: (x != 0).sum()}
    product = HessianOperator(model, F.cross_entropy, [empty, (x, y), empty], **weigh) @ v
    oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, x, y, v))
    with pytest.raises(ValueError, match="loader gave no batch, or none that weighs anything"):
        HessianOperator(model, F.cross_entropy, [empty], **weigh) @ v


@pytest.mark.parametrize(
    ("batch_size", "error", "message"),
    [
        (4, TypeError, "batch_size must be a function of x .*, got int"),
        (lambda x: "4", TypeError, "batch_size must return a number, got str"),
        (lambda x: torch.ones(2), TypeError, "batch_size must return a number, got Tensor"),
        (lambda x: -1, ValueError, "batch_size must return how many samples x has, got -1"),
        (lambda x: float("nan"), ValueError, "got nan"),
    ],
)
def test_wrong_batch_sizes(batch_size: Any, error: type[Exception], message: str) -> None:
    model, parts = Reads(by_place), [((a, b), y) for a, b, y in inputs(4)]
    with pytest.raises(error, match=message):
        HessianOperator(model, F.cross_entropy, parts, batch_size=batch_size) @ oracles.random_vector(model)


X, Y = torch.randn(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([X], r"must be a pair \(x, y\), got a tensor of shape \(2, 4\)"),
        (DataLoader(X, batch_size=2), r"got a tensor of shape \(2, 4\)"),
        ((X, Y), r"got a tensor of shape \(2, 4\); one batch alone is the loader \[\(x, y\)\]"),
        ([{"x": X, "y": Y}], r"got dict with 'x', 'y'; where the model takes it whole, let the loader give"),
        ([UserDict(x=X, y=Y)], "got UserDict with 'x', 'y'"),
        ([(X, Y, Y)], r"got tuple of 3; several inputs are one x: \(\(a, b\), y\)"),
        ([[X]], "got list of 1"),
        (DataLoader(TensorDataset(X), batch_size=2), "got list of 1"),
        (["xy"], "got str"),
        ([None], "got NoneType"),
        (X, r"loader must give batches \(x, y\), such as a list of them, got Tensor"),
        ({"x": X, "y": Y}, "loader must give batches .* got dict"),
        ("xy", "got str"),
        (3, "got int"),
    ],
)
def test_what_is_no_batch(loader: Any, message: str) -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match=message):
        HessianOperator(model, F.cross_entropy, loader) @ oracles.random_vector(model)


class Once:
    """Says nothing to whoever comes again."""

    def __init__(self, batches: list[Any]) -> None:
        self.left = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.left


class Loader:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        yield from self.make()


def data(n: int = 11) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(4)
    return torch.randn(n, 4, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)


def random_loaders() -> dict[str, Any]:
    x, y = data()
    shuffled = DataLoader(
        TensorDataset(x, y), 4, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
    )
    numbers = random.Random(0)
    return {
        "once": Once([(x, y)]),
        "drops another rest": shuffled,
        "augments": Loader(lambda: [(x + numbers.random(), y)]),
        "flips": Loader(lambda: [(x.flip(1) if numbers.random() < 0.5 else x, y) for _ in range(20)]),
        "another label": Loader(lambda: [(x, y.roll(int(1e9 * numbers.random())))]),
    }


@pytest.mark.parametrize("name", random_loaders())
def test_loaders_that_give_something_else_in_the_next_pass_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    with pytest.raises(ValueError, match=r"loader and model must be the same in every pass, got .* and then"):
        HessianOperator(model, F.cross_entropy, random_loaders()[name])
    operator = HessianOperator(model, F.cross_entropy, random_loaders()[name], check_deterministic=False)
    assert operator @ oracles.random_vector(model)
    if name == "once":
        with pytest.raises(ValueError, match="loader gave no batch"):
            operator @ oracles.random_vector(model)


def test_batch_norm_sees_other_batches_of_a_shuffled_loader() -> None:
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="the same in every pass"):
        HessianOperator(model, F.cross_entropy, loader)
    model.eval()  # the order is of no account
    v = oracles.random_vector(model)
    product = HessianOperator(model, F.cross_entropy, loader) @ v
    oracles.assert_close(product, oracles.hvp(model, F.cross_entropy, x, y, v))


class Noisy(Dataset):
    """Noise by torch's own random numbers, which are replayed."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(4).double(), index % 3


def test_loaders_that_draw_from_torch_are_replayed() -> None:
    model = nn.Linear(4, 3).double()
    state = torch.random.get_rng_state()
    operator = HessianOperator(model, F.cross_entropy, DataLoader(Noisy(), 4, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    v = oracles.random_vector(model)
    first = operator @ v
    torch.rand(3)
    oracles.assert_close(operator @ v, first)


def test_models_that_draw_elsewhere_are_refused() -> None:
    class Drops(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random()

    x, y = data()
    model = Drops(4, 3).double()
    with pytest.raises(ValueError, match="the same in every pass"):
        HessianOperator(model, F.cross_entropy, DataLoader(TensorDataset(x, y), 4))


def test_the_check_leaves_no_trace() -> None:
    x, y = data()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    HessianOperator(model, F.cross_entropy, DataLoader(TensorDataset(x, y), 4))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "loader", [[], (), DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0).long()))]
)
def test_empty_loaders(loader: Any) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="loader gave no batch"):
        HessianOperator(model, F.cross_entropy, loader) @ oracles.random_vector(model)


def test_samples_of_a_dataset_are_batches_of_one() -> None:
    x, y = data()
    model = nn.Linear(4, 3).double()
    v = oracles.random_vector(model)
    product = HessianOperator(model, F.cross_entropy, TensorDataset(x, y)) @ v
    oracles.assert_close(flatten(product, v), flatten(oracles.hvp(model, F.cross_entropy, x, y, v), v))

"""Where a Gauss-Newton product takes a loss apart: right, or an error, on the tape and by double backward alike."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern.curvature import ggnvp, linearize
from blokern.curvature.double_backward import DoubleBackward

pytestmark = pytest.mark.filterwarnings("ignore:no R-operator rule")

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 2, 1, 1, 0])
Pair = namedtuple("Pair", "hidden logits")
#: With a rule, and without.
ACTS = {"tape": torch.exp, "double backward": torch.special.i0e}


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None


class Net(nn.Module):
    """Returns pack(hidden activations, logits)."""

    def __init__(self, act: Callable[[Tensor], Tensor], pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.act, self.pack = act, pack
        self.double()

    def forward(self, x: Tensor) -> Any:
        self.hidden = self.act(self.first(x).tanh())
        return self.pack(self.hidden, self.last(self.hidden))


def of_both(hidden: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, Y) + hidden.pow(3).mean()


PACKED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda h, o: (h, o), lambda out: out),
    "namedtuple": (Pair, lambda out: (out.hidden, out.logits)),
    "dataclass": (lambda h, o: Output(o, [h]), lambda out: (out.hidden[0], out.logits)),
    "mapping": (lambda h, o: UserDict(h=h, o={"o": o}), lambda out: (out["h"], out["o"]["o"])),
    "one twice": (lambda h, o: {"h": h, "again": h, "o": o}, lambda out: (out["again"], out["o"])),
    "views": (lambda h, o: (h.view(-1), o, o.t()), lambda out: (out[0].view(5, 6), out[2].t())),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("packed", PACKED)
def test_outputs_that_others_depend_on_count_once(act: str, packed: str) -> None:
    pack, unpack = PACKED[packed]
    model = Net(ACTS[act], pack)
    flat = Net(ACTS[act], lambda h, o: torch.cat([h, o], 1))
    v = oracles.random_vector(model)
    at_x = linearize(model, lambda out, y: of_both(*unpack(out)), X, Y)
    assert isinstance(at_x._products, DoubleBackward) == (act != "tape")
    expected = oracles.ggnvp(flat, lambda out, y: of_both(out[:, :6], out[:, 6:]), X, Y, v)
    oracles.assert_close(at_x.ggnvp(v), expected)
    stack = {name: torch.stack([t, -2.0 * t]) for name, t in v.items()}
    oracles.assert_close(
        at_x.ggnvp(stack), {name: torch.stack([t, -2.0 * t]) for name, t in expected.items()}
    )


@pytest.mark.parametrize("act", ACTS)
def test_a_loss_that_changes_the_output_in_place(act: str) -> None:
    model = Net(ACTS[act], lambda h, o: o)
    v = oracles.random_vector(model)
    product = ggnvp(model, lambda out, y: F.cross_entropy(out.mul_(2.0), y), X, Y, v)
    oracles.assert_close(product, oracles.ggnvp(model, lambda out, y: F.cross_entropy(2.0 * out, y), X, Y, v))


def with_loss(h: Tensor, o: Tensor) -> Output:
    return Output(o, loss=F.cross_entropy(o, Y))


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Net, Any], Tensor], str]] = {
    "the model's own loss": (with_loss, lambda net, out: out.loss, "a scalar which the model returned"),
    "that as one entry, as under DataParallel": (
        lambda h, o: Output(o, loss=F.cross_entropy(o, Y)[None]),
        lambda net, out: out.loss.mean(),
        "a scalar which the model returned",
    ),
    "half of it, and more": (
        with_loss,
        lambda net, out: 0.5 * out.loss + out.logits.square().mean(),
        "a scalar which the model returned",
    ),
    "a penalty": (
        lambda h, o: o,
        lambda net, out: F.cross_entropy(out, Y) + 0.1 * net.first.weight.square().sum(),
        r"reads first\.weight, or",
    ),
    "an activation": (
        lambda h, o: o,
        lambda net, out: F.cross_entropy(out, Y) + net.hidden.square().mean(),
        r"reads first\.weight, first\.bias, or",
    ),
    "an object": (
        lambda h, o: SimpleNamespace(logits=o),
        lambda net, out: F.cross_entropy(out.logits, Y),
        r"tensors are not looked for in: SimpleNamespace",
    ),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_zero_or_lost_is_refused(act: str, case: str) -> None:
    pack, loss, message = REFUSED[case]
    model = Net(ACTS[act], pack)
    v = oracles.random_vector(model)
    at_x = linearize(model, lambda out, y: loss(model, out), X, Y)
    with pytest.raises(ValueError, match=message):
        at_x.ggnvp(v)
    expected = oracles.hvp(model, lambda out, y: loss(model, out), X, Y, v)
    oracles.assert_close(at_x.hvp(v), expected)  # a refusal costs nothing


@pytest.mark.parametrize("act", ACTS)
def test_a_returned_loss_may_stay_unread(act: str) -> None:
    model, plain = Net(ACTS[act], with_loss), Net(ACTS[act], lambda h, o: o)
    v = oracles.random_vector(model)
    product = ggnvp(model, lambda out, y: F.cross_entropy(out.logits, y), X, Y, v)
    oracles.assert_close(product, oracles.ggnvp(plain, F.cross_entropy, X, Y, v))

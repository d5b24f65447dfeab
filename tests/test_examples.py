"""The examples in the docstrings of ops, sparse networks and curvature run as they stand, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blokern import curvature, ops, sparse

ROOMS = (ops, sparse, curvature)
#: What a reader of an example has imported.
NAMES = {"torch": torch, "nn": nn, "F": F, "ops": ops} | {
    n: getattr(room, n) for room in ROOMS for n in room.__all__
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def own_words() -> dict[str, object]:
    """What a reader of the curvature's examples has of his own."""
    torch.manual_seed(0)
    model, x, y = Net(), torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    return {
        "model": model,
        "x": x,
        "y": y,
        "u": torch.randn_like(x),
        "v": v,
        "gradient": v,
        "loader": loader,
    }


def examples(room: ModuleType) -> list[doctest.DocTest]:
    modules = [
        importlib.import_module(f"{room.__name__}.{m.name}") for m in pkgutil.iter_modules(room.__path__)
    ]
    found = [
        test
        for module in modules
        for test in doctest.DocTestFinder(exclude_empty=True).find(
            module, globs=NAMES | vars(module) | (own_words() if room is curvature else {})
        )
    ]
    return sorted((test for test in found if test.examples), key=lambda test: test.name)


EXAMPLES = [test for room in ROOMS for test in examples(room)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_an_example_gives_what_it_says(example: doctest.DocTest) -> None:
    told: list[str] = []
    torch.manual_seed(0)
    failed = doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed
    assert not failed, "".join(told)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_public_name_has_an_example_or_says_whose_it_shares(room: ModuleType) -> None:
    shown = {test.name.rpartition(".")[2] for test in EXAMPLES}
    for name in set(room.__all__) - shown:
        documented = getattr(room, name)
        if inspect.isclass(documented) or inspect.isfunction(documented):
            assert "as :" in (documented.__doc__ or ""), name

"""The examples in the docstrings of ops and of sparse networks run as they stand, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

from blokern import ops, sparse

#: What a reader of an example has imported.
NAMES = {"torch": torch, "nn": nn, "ops": ops} | {
    n: getattr(room, n) for room in (ops, sparse) for n in room.__all__
}


def examples(room: ModuleType) -> list[doctest.DocTest]:
    modules = [
        importlib.import_module(f"{room.__name__}.{m.name}") for m in pkgutil.iter_modules(room.__path__)
    ]
    found = [
        test
        for module in modules
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=NAMES | vars(module))
    ]
    return sorted((test for test in found if test.examples), key=lambda test: test.name)


EXAMPLES = [test for room in (ops, sparse) for test in examples(room)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_an_example_gives_what_it_says(example: doctest.DocTest) -> None:
    told: list[str] = []
    torch.manual_seed(0)
    failed = doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed
    assert not failed, "".join(told)


@pytest.mark.parametrize("room", [ops, sparse], ids=lambda room: room.__name__)
def test_every_public_name_has_an_example_or_says_whose_it_shares(room: ModuleType) -> None:
    shown = {test.name.rpartition(".")[2] for test in EXAMPLES}
    for name in set(room.__all__) - shown:
        documented = getattr(room, name)
        if inspect.isclass(documented) or inspect.isfunction(documented):
            assert "as :" in (documented.__doc__ or ""), name

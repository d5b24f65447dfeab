"""README and docs: their Python runs, their links lead somewhere, and their tables are the results'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import blokern
from benchmarks import tables
from blokern import ops

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
MAPS = sorted(SOURCES.rglob("README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), *MAPS]


def blocks(page: Path) -> list[tuple[int, str]]:
    """The page's Python, each with the line that it starts after."""
    text = page.read_text()
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)
    ]


def readers_names() -> dict[str, object]:
    """What a reader of a page has of his own: a network with masks and a vector, a batch, a loader."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    x, y = torch.rand(8, 3, 8, 8), torch.randint(10, (8,))
    parameters = dict(model.named_parameters())
    return {
        **{"torch": torch, "nn": nn, "F": F, "ops": ops, "model": model, "x": x, "y": y},
        **{"loader": [(x[:4], y[:4]), (x[4:], y[4:])], "x_adv": x.clone(), "grad": torch.randn_like(x)},
        "masks": {name: torch.rand_like(p) < 0.2 for name, p in parameters.items() if p.dim() > 1},
        "v": {name: torch.randn_like(p) for name, p in parameters.items()},
        "optimizer": torch.optim.SGD(parameters.values(), lr=0.1),
    }


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(blokern, "keep_freed_memory", lambda: True)  # it could not be taken back


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path, monkeypatch)
    names = readers_names()
    for line, block in blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), names)


def test_the_tutorials_make_networks_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path, monkeypatch)
    page = ROOT / "docs" / "tutorials" / "prune_and_run_faster.md"
    names = readers_names()
    for _, block in blocks(page)[:3]:
        exec(block, names)
    assert names["evaluate"](names["model"], names["test"], {}).clean_accuracy > 0.8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", tables.pages(), ids=lambda p: p.name)
def test_tables_are_the_results(page: Path) -> None:
    """If not: python -m benchmarks.tables."""
    assert page.read_text() == tables.filled(page.read_text())


def test_every_table_is_somewhere() -> None:
    shown = set(re.findall(r"<!-- table: (\w+) -->", "".join(page.read_text() for page in tables.pages())))
    assert shown == set(tables.TABLES)


def test_the_maps_of_the_kernels_have_every_op_and_no_file_that_is_gone() -> None:
    ops_there = set(re.findall(r'^ +"(\w+)\(', (SOURCES / "library.cpp").read_text(), re.M))
    named = set()
    for page in MAPS:
        for word in re.findall(r"`([\w./]+)`", page.read_text()):
            named.add(word)
            if re.search(r"\.(h|cpp|cu|cuh|py)$", word):
                assert any((root / word).exists() for root in (page.parent, SOURCES, ROOT)), (page, word)
    assert len(ops_there) > 40
    assert ops_there <= named, sorted(ops_there - named)

"""The benchmarks' rivals compute the same, and run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import curvature, pruning, sparse
from benchmarks.networks import network
from blokern._race import Case, run_case
from blokern.bilevel.masking import prunable

LAYERS = [
    sparse.linear(12, 8),
    sparse.linear(12, 8, 5),
    sparse.conv(6, 4, 7, 1),
    sparse.conv(6, 4, 7, 1, stride=2),
    sparse.conv(3, 4, 9, 3),
    sparse.conv(3, 4, 9, 7, stride=2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_rival_of_a_layer_runs(layer: sparse.Layer, batch: int) -> None:
    cases = list(sparse._layer(layer, batch, 50))
    assert [case.name.rpartition("sparse, ")[2] for case in cases] == [
        *("forward", "backward", "refresh", "refresh, forward and backward")
    ]
    for case in cases:
        assert case.ours in case.rivals
        for rival in case.rivals.values():
            rival()


@pytest.mark.parametrize("layer", LAYERS[:3], ids=lambda layer: layer.name)
def test_csr_computes_the_same(layer: sparse.Layer) -> None:
    forward, backward, *_ = sparse._layer(layer, 3, 50)
    features = 1 if len(layer.weight) == 4 else -1

    def columns(t: torch.Tensor) -> torch.Tensor:
        return t.movedim(features, 0).flatten(1)

    want = columns(forward.rivals[forward.ours]())
    for name in ("torch CSR", "scipy CSR"):
        torch.testing.assert_close(torch.as_tensor(forward.rivals[name]()), want)
    by_x, by_weight = backward.rivals[backward.ours]()
    csr_by_x, csr_by_weight = backward.rivals["torch CSR"]()
    torch.testing.assert_close(csr_by_x, columns(by_x))
    torch.testing.assert_close(csr_by_weight.to_dense(), by_weight.flatten(1))


def test_released_bip_prunes_and_moves_weights_and_scores_alike() -> None:
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model, optimizer = network("small_cnn", x)
    weights = prunable(model)
    scores = [nn.Parameter(weight.data) for weight in weights.values()]
    before = [score.detach().clone() for score in scores]
    pruning.released_bip(model, weights, optimizer, torch.optim.SGD(scores, lr=0.1), (x, y), (x, y))
    for weight, score, old in zip(weights.values(), scores, before, strict=True):
        assert weight.data_ptr() == score.data_ptr()
        assert not torch.equal(score, old)


def _flat(product: object) -> torch.Tensor:
    parts = product.values() if isinstance(product, dict) else product
    return torch.cat([torch.as_tensor(part).flatten() for part in parts])


@pytest.mark.parametrize("kind", ["hvp", "ggnvp", "mixed_hvp"])
def test_every_rival_of_a_product_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 10))
    case = curvature._products("small", model, torch.rand(6, 5))
    products = {name: run for name, run in case.rivals.items() if name.startswith(kind)}
    want = _flat(products.pop(kind)())
    for name, run in products.items():
        got = run()
        if "stacked" in name:
            got = {key: value[-1] for key, value in got.items()}
        torch.testing.assert_close(_flat(got), want, msg=lambda text, name=name: f"{name}: {text}")


def test_every_rival_of_the_cross_entropy_computes_the_same() -> None:
    ours, *rivals = (run() for run in curvature._losses(3, 5).rivals.values())
    for rival in rivals:
        torch.testing.assert_close(rival, ours)


def test_memory_is_that_of_the_tensors_that_were_alive_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.zeros(1000, dtype=torch.float64)
        second = first.neg()
        del first
        return second.neg()

    (row,) = run_case(Case("sum", {"ours": run}, "ours", memory=True), rounds=1)
    assert row.peak_bytes == 16000

"""The benchmarks' rivals compute the same, and run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import pruning, sparse
from benchmarks.networks import network
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

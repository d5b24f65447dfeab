"""Which weights can have a mask, who says so, and that a refusal changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from blokern.sparse import (
    MaskedConv2d,
    MaskedLinear,
    from_torch_prune,
    masks_of,
    pack,
    sparsify,
    to_dense,
    to_torch_prune,
)
from blokern.sparse.modules import maskable, why_not_maskable


class Standardised(nn.Conv2d):
    pass


def sparse_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.eye(4).to_sparse())
    return layer


def expanded_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 1).expand(4, 4))
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu": (nn.ReLU, r"an nn\.Linear or nn\.Conv2d, got ReLU"),
    "subclass": (
        lambda: Standardised(2, 2, 3),
        "got Standardised, a subclass, which may use it in another way",
    ),
    "lazy": (lambda: nn.LazyLinear(3), "got LazyLinear, a subclass"),
    "embedding": (lambda: nn.Embedding(3, 4), "got Embedding"),
    "circular": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        "pads with zeros, got 'circular'",
    ),
    "complex": (
        lambda: nn.Linear(4, 4, dtype=torch.complex64),
        r"floats of 16 bits or more, got torch\.complex64",
    ),
    "sparse": (sparse_weight, r"must be a dense tensor, got layout torch\.sparse_coo"),
    "expanded": (expanded_weight, "memory of its own for each entry, got strides"),
    "weight_norm": (
        lambda: weight_norm(nn.Linear(4, 4)),
        r"WeightNorm computes it: call .*remove_weight_norm",
    ),
    "spectral_norm": (
        lambda: spectral_norm(nn.Linear(4, 4)),
        "SpectralNorm computes it: call .*remove_spectral_norm",
    ),
    "new weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        r"parametrized by _WeightNorm: call .*remove_parametrizations\(layer, 'weight'\)",
    ),
    "new spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)),
        "parametrized by _SpectralNorm",
    ),
    "pruned": (lambda: pruned(nn.Linear(4, 4)), r"prune computes it: take blokern\.sparse\.from_torch_prune"),
}


def mask_like(layer: nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None)
    shape = (1, 1) if weight is None or isinstance(weight, nn.UninitializedParameter) else weight.shape
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_masked_is_told_and_nothing_changes(name: str) -> None:
    make, reason = REFUSED[name]
    model = nn.ModuleList([nn.Linear(4, 4), make()])
    with pytest.raises(ValueError, match=rf"masks: '1\.weight' .*{reason}"):
        sparsify(model, {"0.weight": torch.eye(4) > 0, "1.weight": mask_like(model[1])})
    assert type(model[0]) is nn.Linear
    assert list(maskable(model).weights) == ["0.weight"]
    assert all(name.startswith("1.") for name in maskable(model).skipped)
    assert why_not_maskable(model[0]) is None
    assert why_not_maskable(model[1]) is not None


def test_all_matrices_of_a_network_are_masked_or_skipped_by_name() -> None:
    tied = nn.Linear(5, 5)
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "masked": MaskedConv2d(2, 2, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(3, 4),
            "conv1": nn.Conv1d(2, 2, 3),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "pruned": pruned(nn.Linear(4, 4)),
            "tied": nn.ModuleList([tied, nn.Linear(5, 5)]),
        }
    )
    model["tied"][1].weight = tied.weight
    weights, skipped = maskable(model)
    assert weights == {"fc.weight": model["fc"].weight, "masked.weight": model["masked"].weight}
    assert skipped.keys() == {
        *("attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
        *("conv1.weight", "normed.weight", "pruned.weight", "tied.0.weight", "tied.1.weight"),
    }
    assert skipped["tied.0.weight"] == "is shared between 'tied.0' and 'tied.1'; untie it first"
    assert "got LSTM" in skipped["lstm.weight_hh_l0"]


# ---- All or nothing


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4))


def circular(model: nn.Module) -> None:
    model.append(pruned(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")))


def tie(model: nn.Module) -> None:
    model[2].weight_orig = model[0].weight_orig


def prune_a_bias(model: nn.Module) -> None:
    prune.l1_unstructured(model[3], "bias", 0.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (circular, r"'4\.weight' is pruned, and must be a layer that pads with zeros, got 'circular'"),
        (tie, r"'0\.weight' is pruned, and is shared between '0' and '2'; untie it first"),
        (prune_a_bias, r"'3\.bias' is pruned, and must be the weight of"),
    ],
)
def test_from_torch_prune_checks_all_first(spoil: Callable[[nn.Module], None], message: str) -> None:
    model = net()
    for i in (0, 2, 3):
        pruned(model[i])
    spoil(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        from_torch_prune(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert prune.is_pruned(model[0])
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("undo", [to_dense, to_torch_prune, lambda model: pack(model, max_density=1.0)])
@pytest.mark.parametrize("norm", [weight_norm, pruned])
def test_a_masked_weight_that_others_compute_stays_as_it_is(
    norm: Callable[[nn.Module], nn.Module], undo: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = net().eval(), torch.randn(3, 6)
    masks = {f"{i}.weight": torch.rand_like(model[i].weight) < 0.5 for i in (0, 2)}
    sparsify(model, masks)
    norm(model[2])
    y = model(x)
    product = model[0](x).relu() @ (model[2].weight * masks["2.weight"]).t() + model[2].bias
    torch.testing.assert_close(y, model[3](product))
    assert (model[2].weight[~masks["2.weight"]] == 0).all()
    keys = model.state_dict().keys()
    with pytest.raises(
        ValueError, match=r"model: '2\.weight' must be a parameter of its layer, and .* computes it"
    ):
        undo(model)
    assert type(model[0]) is MaskedLinear
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(x), y)


def test_norms_may_go_again() -> None:
    model, x = net().eval(), torch.randn(3, 6)
    mask = torch.rand(6, 6) < 0.5
    sparsify(model, {"2.weight": mask})
    weight = model[2].weight.detach().clone()
    for put, remove in (
        (weight_norm, nn.utils.remove_weight_norm),
        (pruned, lambda layer: prune.remove(layer, "weight")),
    ):
        put(model[2])
        model(x).sum().backward()
        remove(model[2])
        assert isinstance(model[2].weight, nn.Parameter)
        assert (model[2].weight[~mask] == 0).all()
    assert torch.allclose(model[2].weight, weight) or (model[2].weight == 0).sum() > (weight == 0).sum()
    y = model(x)
    dense = to_dense(copy.deepcopy(model))
    torch.testing.assert_close(dense(x), y)


def test_round_trips_keep_outputs_for_readers_too() -> None:
    encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    for layer in (encoder.linear1, encoder.linear2):
        prune.random_unstructured(layer, "weight", 0.6)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = encoder(x)
        torch.testing.assert_close(from_torch_prune(encoder)(x), y)
        torch.testing.assert_close(to_torch_prune(encoder)(x), y)
        torch.testing.assert_close(to_dense(from_torch_prune(encoder))(x), y)
    assert masks_of(encoder) == {}

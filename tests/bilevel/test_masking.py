import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blokern import ops
from blokern.bilevel.masking import PruningSettings, masks_from_scores, prunable
from blokern.models import small_cnn
from blokern.sparse import sparsify


def scores(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def net():
    torch.manual_seed(0)
    return small_cnn(num_classes=3, in_channels=1, width=2)


# --- prunable -----------------------------------------------------------------------------------------------


def test_prunable_are_all_linear_and_conv_weights():
    model = net()
    wanted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    found = prunable(model)
    assert set(found) == wanted
    assert all(weight is model.get_parameter(name) for name, weight in found.items())
    masks = masks_from_scores(found, PruningSettings(density=0.5))
    assert list(prunable(sparsify(model, masks))) == list(found)


def test_a_layer_alone_is_a_model():
    assert list(prunable(nn.Linear(3, 2))) == ["weight"]


def test_a_module_used_twice_is_one_layer():
    layer = nn.Linear(3, 3)
    assert list(prunable(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]


def test_tied_weights_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'1.weight' is shared between '0' and '1'; untie it first"):
        prunable(model)


def test_a_model_without_an_eligible_layer_is_refused():
    with pytest.raises(ValueError, match=r"an nn\.Linear or nn\.Conv2d to prune, got Sequential"):
        prunable(nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2)))


# --- masks_from_scores --------------------------------------------------------------------------------------


@given(st.floats(0.01, 1.0))
def test_global_counts_are_exact_and_the_highest_are_kept(density):
    given_scores = scores(a=(4, 3, 3, 3), b=(5, 7))
    masks = masks_from_scores(given_scores, PruningSettings(density=density))
    assert sum(mask.kept for mask in masks.values()) == round(density * (108 + 35))
    bits = torch.cat([mask.to_dense().flatten() for mask in masks.values()])
    values = torch.cat([score.flatten() for score in given_scores.values()])
    if bits.any() and not bits.all():
        assert values[bits].min() > values[~bits].max()


def test_layer_scope_counts_in_each_layer():
    masks = masks_from_scores(scores(a=(4, 3, 3, 3), b=(5, 8)), PruningSettings(density=0.25, scope="layer"))
    assert [mask.kept for mask in masks.values()] == [27, 10]


def test_filters_are_kept_whole_and_layers_that_are_named_keep_all():
    given_scores = scores(a=(4, 3, 3, 3), b=(6, 4), c=(5, 6))
    masks = masks_from_scores(given_scores, PruningSettings(density=0.5, granularity="filter"), ["c"])
    for name in "ab":
        assert torch.equal(masks[name].to_dense(), ops.filter_mask(given_scores[name], 0.5))
    assert masks["c"].density == 1


def test_channels_are_kept_whole_and_layers_that_are_named_or_have_one_keep_all():
    given_scores = scores(a=(4, 3, 3, 3), b=(6, 4), c=(5, 6), depthwise=(5, 1, 3, 3))
    masks = masks_from_scores(given_scores, PruningSettings(density=0.5, granularity="channel"), ["a"])
    for name in "bc":
        assert torch.equal(masks[name].to_dense(), ops.channel_mask(given_scores[name], 0.5))
    assert masks["a"].density == masks["depthwise"].density == 1


def test_n_of_m_input_channels_are_kept_and_what_does_not_divide_stays_dense():
    given_scores = scores(a=(4, 3, 3, 3), b=(6, 8, 3, 3), c=(5, 6))
    masks = masks_from_scores(given_scores, PruningSettings(density=0.5, granularity="2:4"))
    kept = masks["b"].to_dense()
    assert torch.equal(kept.view(6, 2, 4, 9).sum(2), torch.full((6, 2, 9), 2))
    assert torch.equal(kept, ops.nm_mask(given_scores["b"], 2, 4, dim=1))
    assert masks["a"].density == masks["c"].density == 1


def test_n_of_m_that_fits_no_layer_is_refused():
    with pytest.raises(ValueError, match="granularity 2:4 needs a layer with a multiple of 4 input channels"):
        masks_from_scores(scores(a=(4, 3, 3, 3)), PruningSettings(density=0.5, granularity="2:4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", ["weight", "filter", "2:4"])
def test_scores_that_are_no_numbers_are_refused_by_name(bad, granularity):
    given_scores = scores(a=(4, 8), b=(6, 4))
    given_scores["b"][2, 1] = bad
    with pytest.raises(ValueError, match="scores of 'b' must be finite, got NaN or infinity"):
        masks_from_scores(given_scores, PruningSettings(density=0.5, granularity=granularity))


# --- PruningSettings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
        ({"density": float("nan")}, ValueError, "density must be in"),
        ({"density": "0.1"}, TypeError, "density must be a float, got '0.1'"),
        ({"density": True}, TypeError, "density must be a float, got True"),
        ({"scope": "lyer"}, ValueError, "scope must be one of .*did you mean 'layer'"),
        ({"granularity": "filters"}, ValueError, "granularity must be one of .*did you mean 'filter'"),
        ({"granularity": "n:m"}, ValueError, "granularity must be one of"),
        ({"granularity": None}, ValueError, "granularity must be one of"),
        ({"granularity": "5:4"}, ValueError, "granularity must be n:m with 1 <= n <= m, got 5:4"),
        ({"granularity": "0:4"}, ValueError, "granularity must be n:m with 1 <= n <= m, got 0:4"),
        (
            {"granularity": "2:4", "density": 0.1},
            ValueError,
            "density must be 0.5 for granularity 2:4, got 0.1",
        ),
    ],
)
def test_wrong_settings_name_the_word(words, error, message):
    with pytest.raises(error, match=message):
        PruningSettings(**words)

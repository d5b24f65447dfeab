"""Pruning methods against plain-torch twins of the formulas, small cases by hand, and what they must leave alone."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from blokern import models
from blokern.bilevel import (
    IMP,
    OMP,
    PRUNERS,
    SNIP,
    GraSP,
    GraSPSettings,
    Hydra,
    HydraSettings,
    IMPSettings,
    OMPSettings,
    RandomPruning,
    RandomPruningSettings,
    SNIPSettings,
    SynFlow,
    SynFlowSettings,
)
from blokern.bilevel.masking import prunable
from blokern.sparse import masks_of, sparsify, to_dense

ONE_SHOT = {name: pair for name, pair in PRUNERS.items() if name != "imp"}
SHORT = {"synflow": {"rounds": 5}, "hydra": {"score_epochs": 2}}


def net(dtype=torch.float64):
    """A trained network's state: BatchNorm statistics off their start, one module in eval mode, gradients there."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)),
    ).to(dtype)
    x, y = batches(dtype=dtype)[0]
    F.cross_entropy(model(x), y).backward()
    model[4].eval()
    return model


def batches(count=2, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def settings(name, **words):
    return PRUNERS[name][1](**SHORT.get(name, {}), **words)


def scores_of(pruner, model, data):
    """What a method ranks by, before the selection."""
    twin = to_dense(copy.deepcopy(model))
    scores = pruner._scores(twin, prunable(twin), data)
    return {name: score.detach() for name, score in scores.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-10, atol=1e-14)


# --- Every method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_SHOT)
def test_counts_are_exact_and_nothing_of_the_model_changes(name):
    model = net()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    asked = [p.requires_grad for p in model.parameters()]
    data = batches()

    masks = PRUNERS[name][0](settings(name, density=0.1)).masks(model, data)

    assert list(masks) == ["0.weight", "3.weight", "7.weight"]
    assert sum(mask.kept for mask in masks.values()) == round(0.1 * (72 + 288 + 216))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(not x.requires_grad for x, _ in data)
    assert all(mask.shape == model.get_parameter(key).shape for key, mask in masks.items())


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ({"density": 0.25, "scope": "layer"}, [18, 72, 54]),
        ({"density": 0.5, "granularity": "filter"}, [36, 144, 216]),
        ({"density": 0.5, "granularity": "channel"}, [72, 144, 108]),
        ({"density": 0.5, "granularity": "2:4"}, [72, 144, 108]),
    ],
)
def test_every_method_prunes_at_every_granularity(name, words, kept):
    masks = PRUNERS[name][0](settings(name, **words)).masks(net(), batches())
    assert [mask.kept for mask in masks.values()] == kept


@pytest.mark.parametrize("name", ONE_SHOT)
def test_methods_work_where_gradients_are_switched_off(name):
    model = net().requires_grad_(False)
    with torch.no_grad():
        masks = PRUNERS[name][0](settings(name, density=0.1)).masks(model, batches())
    expected = PRUNERS[name][0](settings(name, density=0.1)).masks(net(), batches())
    assert masks == expected


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "hydra"])
def test_a_network_of_the_library_in_float32(name):
    torch.manual_seed(0)
    model = models.small_cnn(num_classes=3, in_channels=2, width=4)
    masks = PRUNERS[name][0](settings(name, density=0.2)).masks(model, batches(dtype=torch.float32))
    total = sum(weight.numel() for weight in prunable(model).values())
    assert sum(mask.kept for mask in masks.values()) == round(0.2 * total)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_what_a_masked_model_has_pruned_stays_pruned(name):
    model = net()
    first = OMP(OMPSettings(density=0.5)).masks(model)
    sparsify(model, first)
    for layer in (model[0], model[3], model[7]):
        layer.weight.data[~layer.mask.to_dense()] = 1e3  # whatever a masked weight holds
    second = PRUNERS[name][0](settings(name, density=0.2)).masks(model, batches())
    assert sum(mask.kept for mask in second.values()) == round(0.2 * 576)
    for key, mask in second.items():
        assert not (mask.to_dense() & ~first[key].to_dense()).any()
    assert masks_of(model) == first
    for words in ({"granularity": "2:4"}, {"granularity": "filter"}, {"granularity": "channel"}):
        sparsify(model, OMP(OMPSettings(density=0.5, **words)).masks(model))
        first = masks_of(model)
        again = PRUNERS[name][0](settings(name, density=0.5, **words)).masks(model, batches())
        assert again == first


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "hydra"])
def test_no_batches_are_refused(name):
    with pytest.raises(ValueError, match="batches must give at least one"):
        PRUNERS[name][0](settings(name)).masks(net(), [])


@pytest.mark.parametrize("name", ["grasp", "hydra"])
def test_batches_that_are_gone_after_one_pass_are_refused(name):
    with pytest.raises(ValueError, match="whenever iterated over, got none"):
        PRUNERS[name][0](settings(name)).masks(net(), iter(batches()))


def test_labels_that_do_not_fit_are_refused():
    x, y = batches()[0]
    with pytest.raises(ValueError, match=r"y must have 8 samples to fit x, got shape \(7,\)"):
        SNIP(SNIPSettings()).masks(net(), [(x, y[:7])])


@pytest.mark.parametrize("name", ["omp", "snip", "grasp", "synflow"])
def test_a_weight_that_is_not_finite_is_named(name):
    model = net()
    model[3].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"scores of '\d.weight' must be finite"):
        PRUNERS[name][0](settings(name)).masks(model, batches())


def test_a_model_with_nothing_to_prune_or_tied_weights_is_refused():
    with pytest.raises(ValueError, match="to prune, got ReLU"):
        OMP(OMPSettings()).masks(nn.ReLU())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="is shared between '0' and '1'"):
        OMP(OMPSettings()).masks(tied)


@pytest.mark.parametrize("name", PRUNERS)
def test_settings_of_another_method_are_refused(name):
    other = SNIPSettings() if name == "omp" else OMPSettings()
    with pytest.raises(TypeError, match=f"settings must be .*, got {type(other).__name__}"):
        PRUNERS[name][0](other)


@pytest.mark.parametrize(
    ("kind", "words", "error", "message"),
    [
        (OMPSettings, {"density": 0.0}, ValueError, r"density must be in \(0, 1\]"),
        (IMPSettings, {"rate": 1.0}, ValueError, r"rate must be in \(0, 1\), got 1.0"),
        (IMPSettings, {"rewind_epoch": -1}, ValueError, "rewind_epoch must be at least 0, got -1"),
        (GraSPSettings, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        (SynFlowSettings, {"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        (SynFlowSettings, {"rounds": 1.5}, TypeError, "rounds must be an int, got 1.5"),
        (HydraSettings, {"score_epochs": 0}, ValueError, "score_epochs must be at least 1, got 0"),
        (HydraSettings, {"score_lr": math.inf}, ValueError, "score_lr must be positive and finite, got inf"),
        (HydraSettings, {"score_momentum": 1.0}, ValueError, r"score_momentum must be in \[0, 1\), got 1.0"),
        (RandomPruningSettings, {"seed": True}, TypeError, "seed must be an int, got True"),
        (IMPSettings, {"rate": "0.2"}, TypeError, "rate must be a number, got '0.2'"),
        (GraSPSettings, {"temperature": None}, TypeError, "temperature must be a number, got None"),
        (HydraSettings, {"score_momentum": "x"}, TypeError, "score_momentum must be a number, got 'x'"),
    ],
)
def test_wrong_settings_name_the_word(kind, words, error, message):
    with pytest.raises(error, match=message):
        kind(**words)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_what_is_no_model_is_named(name):
    kind, settings = ONE_SHOT[name]
    with pytest.raises(TypeError, match="model must be of type Module, got OrderedDict"):
        kind(settings()).masks(net().state_dict(), batches())


# --- OMP, RandomPruning -------------------------------------------------------------------------------------


def test_omp_keeps_the_largest_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, -5.0], [0.5, 3.0]])
    model[1].weight.data = torch.tensor([[-4.0, 2.0]])
    masks = OMP(OMPSettings(density=0.5)).masks(model)
    assert masks["0.weight"].to_dense().tolist() == [[False, True], [False, True]]
    assert masks["1.weight"].to_dense().tolist() == [[True, False]]


def test_random_masks_depend_on_the_seed_alone():
    one = RandomPruning(RandomPruningSettings(density=0.3, seed=1))
    masks = one.masks(net())
    torch.manual_seed(5)
    assert one.masks(net()) == masks
    assert RandomPruning(RandomPruningSettings(density=0.3, seed=2)).masks(net()) != masks


def test_random_pruning_is_uniform_over_layers():
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 100))
    masks = RandomPruning(RandomPruningSettings(density=0.3)).masks(model)
    # Five standard deviations of the hypergeometric law.
    assert masks["0.weight"].density == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 60_000))


# --- SNIP ---------------------------------------------------------------------------------------------------


def test_snip_is_the_sensitivity_to_a_multiplicative_mask():
    model, data = net(), batches(size=5)
    twin = copy.deepcopy(model).train()
    ones = {name: torch.ones_like(weight).requires_grad_() for name, weight in prunable(twin).items()}
    loss = 0.0
    for x, y in data:
        masked = {name: weight.detach() * ones[name] for name, weight in prunable(twin).items()}
        loss = loss + F.cross_entropy(torch.func.functional_call(twin, masked, (x,)), y) / len(data)
    expected = dict(zip(ones, torch.autograd.grad(loss, list(ones.values())), strict=True))
    found = scores_of(SNIP(SNIPSettings()), model, data)
    assert_close(found, {name: g.abs() for name, g in expected.items()})


def test_snip_of_one_neuron_by_hand():
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    x, y = torch.tensor([[3.0, 1.0]], dtype=torch.float64), torch.tensor([0])
    p = math.exp(2) / (math.exp(3) + math.exp(2))  # of class 1
    found = scores_of(SNIP(SNIPSettings()), model, [(x, y)])
    assert_close(found, {"weight": torch.tensor([[3 * p, 0.0], [0.0, 2 * p]], dtype=torch.float64)})


def test_without_batchnorm_the_batching_does_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = batches(count=1, size=9)
    x, y = data[0]
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    for pruner in (SNIP(SNIPSettings()), GraSP(GraSPSettings())):
        assert_close(scores_of(pruner, model, data), scores_of(pruner, model, parts))


# --- GraSP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_weight_times_hessian_times_gradient(temperature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    ((x, y),) = batches(count=1)
    names = list(prunable(model))
    shapes = [weight.shape for weight in prunable(model).values()]
    theta = torch.cat([weight.detach().flatten() for weight in prunable(model).values()])

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)) / temperature, y)

    hessian = torch.autograd.functional.hessian(loss, theta)
    gradient = torch.autograd.functional.jacobian(loss, theta)
    expected = (theta * (hessian @ gradient)).split([shape.numel() for shape in shapes])
    found = scores_of(GraSP(GraSPSettings(temperature=temperature)), model, [(x, y)])
    assert_close(found, {n: e.view(s) for n, e, s in zip(names, expected, shapes, strict=True)})


def test_grasp_is_what_the_released_code_ranks_by():
    """Through BatchNorm, over two batches; the released code prunes the highest of the negative."""
    model, data = net(), batches()
    twin = copy.deepcopy(model).train()
    weights = list(prunable(twin).values())
    first = [0.0] * len(weights)
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(twin(x) / 200, y), weights)
        first = [total + g for total, g in zip(first, grads, strict=True)]
    twin.zero_grad()
    for x, y in data:
        grads = torch.autograd.grad(F.cross_entropy(twin(x) / 200, y), weights, create_graph=True)
        sum((v * g).sum() for v, g in zip(first, grads, strict=True)).backward()
    removed = torch.cat([(-w * w.grad).detach().flatten() for w in weights])
    kept = torch.cat(
        [mask.to_dense().flatten() for mask in GraSP(GraSPSettings(density=0.25)).masks(model, data).values()]
    )
    assert kept.sum() == round(0.25 * 576)
    assert removed[kept].max() < removed[~kept].min()


def test_grasp_ranks_filters_by_sums():
    model, data = net(), batches()
    signed = scores_of(GraSP(GraSPSettings()), model, data)["3.weight"].sum((1, 2, 3))
    masks = GraSP(GraSPSettings(density=0.5, granularity="filter")).masks(model, data)
    kept = masks["3.weight"].to_dense().flatten(1).all(1)
    assert kept.sum() == 4
    assert signed[kept].min() > signed[~kept].max()


# --- SynFlow ------------------------------------------------------------------------------------------------


def test_synflow_scores_by_hand():
    """Two linear layers: a weight's flow is the sum over all paths through it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[1].weight.data = torch.tensor([[-5.0, 6.0]])
    found = scores_of(SynFlow(SynFlowSettings(rounds=1)), model, [(torch.zeros(1, 2), torch.tensor([0]))])
    assert found["0.weight"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert found["1.weight"].tolist() == [[15.0, 42.0]]


def test_synflow_at_the_initialisation_is_the_released_loop():
    torch.manual_seed(0)
    model = models.small_cnn(num_classes=3, in_channels=2, width=4).double()
    pruner = SynFlow(SynFlowSettings(density=0.05, rounds=20))

    twin = copy.deepcopy(model).eval()
    for tensor in twin.state_dict().values():
        tensor.abs_()
    weights = list(prunable(twin).values())
    for i in range(1, 21):
        twin.zero_grad()
        twin(torch.ones(1, 2, 8, 8, dtype=torch.float64)).sum().backward()
        flow = torch.cat([(w * w.grad).detach().flatten() for w in weights])
        k = round(0.05 ** (i / 20) * len(flow))
        kept = torch.zeros_like(flow, dtype=torch.bool)
        kept[flow.topk(k).indices] = True
        for w, part in zip(weights, kept.split([w.numel() for w in weights]), strict=True):
            w.data *= part.view(w.shape)
    found = pruner.masks(model, batches())
    assert torch.equal(torch.cat([mask.to_dense().flatten() for mask in found.values()]), kept)


def test_synflow_keeps_every_layer_alive_where_one_shot_methods_may_not():
    torch.manual_seed(0)
    model = models.vgg16_bn(num_classes=3, in_channels=2, width=4)
    data = batches(count=1, dtype=torch.float32)
    with torch.no_grad():
        model(data[0][0])  # BatchNorm's running statistics leave their start
    masks = SynFlow(SynFlowSettings(density=0.01)).masks(model, data)
    assert all(mask.kept for mask in masks.values())
    assert not all(mask.kept for mask in SNIP(SNIPSettings(density=0.01)).masks(model, data).values())


# --- Hydra --------------------------------------------------------------------------------------------------


def test_hydra_steps_are_sgd_on_the_mask():
    """The released layer: mask of |s| forward, straight-through backward; weights stand still."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    data = batches()
    words = {"density": 0.3, "scope": "layer", "score_epochs": 3, "score_lr": 0.5, "score_momentum": 0.8}
    found = scores_of(Hydra(HydraSettings(**words)), model, data)

    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    s = {n: math.sqrt(6 / w.shape[1]) * w.abs() / w.abs().max() for n, w in weights.items()}
    velocity = {n: torch.zeros_like(w) for n, w in weights.items()}
    for epoch in range(3):
        lr = 0.5 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        for x, y in data:
            masks = {}
            for n, score in s.items():
                masks[n] = torch.zeros_like(score).flatten()
                masks[n][score.abs().flatten().topk(round(0.3 * score.numel())).indices] = 1.0
                masks[n] = masks[n].view(score.shape).requires_grad_()
            masked = {n: weights[n] * masks[n] for n in s}
            F.cross_entropy(torch.func.functional_call(model, masked, (x,)), y).backward()
            for n in s:
                velocity[n] = 0.8 * velocity[n] + masks[n].grad * s[n].sign()
                s[n] = s[n] - lr * velocity[n]
    assert_close(found, {n: score.abs() for n, score in s.items()})


def test_hydra_finds_the_weights_that_matter():
    """Class 1 exactly where the second pixel is bright; the first, on which the larger weights are, is noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 2, generator=generator)
    y = (x[:, 1] > 0.5).long()
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.2, -1.0], [-1.2, 1.0]])
    masks = Hydra(HydraSettings(density=0.5, score_epochs=20)).masks(model, [(x, y)])
    assert masks["weight"].to_dense().tolist() == [[False, True], [False, True]]
    assert OMP(OMPSettings(density=0.5)).masks(model)["weight"].to_dense().tolist() == [[True, False]] * 2


def test_hydra_starts_from_a_layer_of_zeros_without_a_nan():
    model = net()
    model[0].weight.data.zero_()
    masks = Hydra(HydraSettings(density=0.5, score_epochs=1)).masks(model, batches())
    assert sum(mask.kept for mask in masks.values()) == 288


# --- IMP ----------------------------------------------------------------------------------------------------


def test_imp_prunes_a_fifth_a_round_and_lands_on_the_density():
    assert IMP(IMPSettings(density=0.5)).densities() == [0.8, 0.64, 0.512, 0.5]
    assert IMP(IMPSettings(density=0.512)).densities() == [0.8, 0.64, 0.512]
    assert IMP(IMPSettings(density=1.0)).densities() == [1.0]
    assert IMP(IMPSettings(density=0.5, granularity="1:2")).densities() == [0.5]


@given(st.floats(0.001, 1.0), st.floats(0.05, 0.9))
def test_imp_densities_fall_by_the_rate_at_most(density, rate):
    densities = [1.0, *IMP(IMPSettings(density=density, rate=rate)).densities()]
    assert densities[-1] == density
    for before, after in pairwise(densities):
        assert before * (1 - rate) <= after * (1 + 1e-6)
        assert after < before or density == 1.0


def test_imp_rewinds_and_prunes_the_trained_weights_that_are_left():
    model = net()
    early = copy.deepcopy(model.state_dict())
    imp = IMP(IMPSettings(density=0.5))

    def train(model):
        for weight in prunable(model).values():
            weight.data += torch.rand(weight.shape, generator=generator, dtype=weight.dtype)

    generator = torch.Generator().manual_seed(0)
    train(model)
    before = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()}
    for density in imp.densities():
        trained = {name: weight.detach() * before[name] for name, weight in prunable(model).items()}
        masks = imp.masks(model, density)
        kept = torch.cat([mask.to_dense().flatten() for mask in masks.values()])
        sizes = torch.cat([weight.abs().flatten() for weight in trained.values()])
        assert kept.sum() == round(density * 576)
        assert sizes[kept].min() > sizes[~kept].max()
        to_dense(model).load_state_dict(early)
        sparsify(model, masks)
        before = {name: mask.to_dense() for name, mask in masks.items()}
        assert all(torch.equal(w, early[name] * before[name]) for name, w in prunable(model).items())
        train(model)

"""What of a network can be pruned, what is said of the rest, and what surrounds the call."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from blokern.bilevel import (
    OMP,
    PRUNERS,
    SNIP,
    GraSP,
    GraSPSettings,
    IMPSettings,
    OMPSettings,
    RandomPruning,
    RandomPruningSettings,
    SNIPSettings,
    SynFlow,
    SynFlowSettings,
)
from blokern.bilevel.masking import kept_of, prunable
from blokern.sparse import masks_of, sparsify, to_dense

SHORT = {"synflow": {"rounds": 3}, "hydra": {"score_epochs": 1}}


def one_shot(name, **words):
    method, settings = PRUNERS[name]
    return method(settings(**SHORT.get(name, {}), **words))


class Standardised(nn.Conv2d):
    """A weight-standardised convolution, as timm's."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias, padding=1)


class Zoo(nn.Module):
    """One layer of each kind that cannot be masked, and two that can."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.standardised = Standardised(8, 8, 3)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.line, self.volume = nn.Conv1d(8, 8, 3, padding=1), nn.Conv3d(2, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent, self.gated = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.words, self.bilinear = nn.Embedding(9, 8), nn.Bilinear(8, 8, 8)
        self.parametrized = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = weight_norm(nn.Linear(8, 8))
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
        self.tied = nn.Linear(8, 9)
        self.tied.weight = self.words.weight

    def forward(self, x):
        h = self.up(self.circular(self.standardised(self.stem(x).relu())))
        h = self.line(h.flatten(2)[..., :16]).transpose(1, 2)
        h = self.gated(self.recurrent(self.attention(h, h, h)[0])[0])[0]
        h = h + self.words(self.tied(h).argmax(-1))
        h = self.bilinear(h, self.pruned(self.hooked(self.parametrized(h))))
        return self.head(h.mean(1))


SKIPPED = {
    "standardised.weight": "got Standardised, a subclass, which may use it in another way",
    "circular.weight": "must be a layer that pads with zeros, got 'circular'",
    "line.weight": "got Conv1d",
    "volume.weight": "got Conv3d",
    "up.weight": "got ConvTranspose2d",
    "attention.in_proj_weight": "got MultiheadAttention",
    "attention.out_proj.weight": "got NonDynamicallyQuantizableLinear",
    "recurrent.weight_ih_l0": "got LSTM",
    "gated.weight_ih_l0": "got GRU",
    "words.weight": "got Embedding",
    "bilinear.weight": "got Bilinear",
    "parametrized.weight": "remove_parametrizations",
    "hooked.weight": "remove_weight_norm",
    "pruned.weight": "from_torch_prune",
    "tied.weight": "is shared between 'words' and 'tied'; untie it first",
}


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "imp"])
def test_masks_are_of_what_sparsify_takes_and_the_rest_is_named(name):
    if name == "synflow":
        pytest.skip("the network has no synaptic flow: test_synflow_is_refused_where_there_is_no_flow")
    model, x = Zoo().train(), torch.rand(4, 3, 6, 6)
    model(x)  # hooks leave weights with a history
    with pytest.warns(
        UserWarning, match=r"% of the model's weights cannot be masked, and stay dense"
    ) as told:
        masks = one_shot(name, density=0.25).masks(model, [(x, torch.arange(4))])
    (message,) = {str(w.message) for w in told if "cannot be masked" in str(w.message)}
    for weight, why in SKIPPED.items():
        assert why in message, weight
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert message.startswith(f"{100 * (total - 216 - 40) / total:.3g} % ")
    assert list(masks) == ["stem.weight", "head.weight"]

    before = sum(p.numel() for p in model.parameters())
    sparsify(model, masks)
    kept = kept_of(model)
    assert kept.masked == (64, 256)
    assert kept.parameters == (before - 192, before)


def test_a_whole_network_of_subclasses_says_what_its_density_is_of():
    layers = [Standardised(3, 32, 3), nn.ReLU(), Standardised(32, 32, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32 * 36, 2, bias=False))
    with pytest.warns(UserWarning, match=r"81.*% of .* cannot be masked.*'0.weight' and 1 more must be"):
        sparsify(model, OMP(OMPSettings(density=0.1)).masks(model))
    kept = kept_of(model)
    assert kept.masked == (230, 2304)
    every = sum(p.numel() for p in model.parameters())
    assert kept.parameters == (every - 2074, every)
    share = f"{100 * (every - 2074) / every:.4g} % of all {every:,} parameters"
    assert str(kept) == f"9.983 % of the 2,304 masked weights kept, {share}"


# --- exclude ------------------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 4))


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "imp"])
def test_what_is_excluded_has_no_mask_and_density_is_of_the_rest(name):
    model, batch = mlp(), (torch.rand(5, 6), torch.arange(5) % 4)
    for exclude in (["1"], (model[1],), ["1.0", "1.1.weight"], [model[1][0], "1.1"]):
        masks = one_shot(name, density=0.25, exclude=exclude).masks(model, [batch])
        assert list(masks) == ["0.weight", "2.weight"]
        assert sum(mask.kept for mask in masks.values()) == 20


def test_imp_excludes_too():
    masks = PRUNERS["imp"][0](IMPSettings(exclude=["0"])).masks(mlp(), 0.5)
    assert list(masks) == ["1.0.weight", "1.1.weight", "2.weight"]


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        ("head", TypeError, "exclude must be a tuple of names or modules, got 'head'"),
        ([3], TypeError, r"exclude must be a tuple of names or modules, got \[3\]"),
        (["1.2"], ValueError, r"no module or parameter '1\.2'; did you mean '1\.\d"),
        ([nn.ReLU()], ValueError, "exclude: the model has no such module, ReLU"),
        (["0", "1", "2"], ValueError, "to prune, got Sequential, and all others are excluded"),
    ],
)
def test_what_cannot_be_excluded_is_told(exclude, error, message):
    with pytest.raises(error, match=message):
        OMP(OMPSettings(exclude=exclude)).masks(mlp())


# --- Networks in all states -------------------------------------------------------------------------------


def batch_norms():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


IMAGES = [(torch.rand(4, 2, 6, 6), torch.arange(4) % 3)]


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "imp"])
def test_what_surrounds_the_call_changes_nothing(name):
    pruner = one_shot(name, density=0.3)
    expected = pruner.masks(batch_norms(), IMAGES)
    model = batch_norms().requires_grad_(False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert pruner.masks(model, IMAGES) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "imp"])
def test_half_precision_counts_in_float32(name, dtype):
    model = batch_norms().to(dtype)
    x, y = IMAGES[0]
    masks = one_shot(name, density=0.3).masks(model, [(x.to(dtype), y)])
    wide = one_shot(name, density=0.3).masks(batch_norms().to(dtype).float(), [(x.to(dtype).float(), y)])
    assert masks == wide
    assert all(p.dtype == dtype for p in model.parameters())


def test_a_layer_called_twice_is_scored_by_both_calls():
    class Twice(nn.Module):
        def __init__(self, layer, again):
            super().__init__()
            self.layer, self.again, self.head = layer, again, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.again(torch.tanh(self.layer(x)))))

    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model, x, y = Twice(layer, layer), torch.rand(5, 4), torch.arange(5) % 3
    weights = [model.layer.weight, model.head.weight]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    found = SNIP(SNIPSettings())._scores(model, prunable(model), [(x, y)])
    for score, weight, grad in zip(found.values(), weights, grads, strict=True):
        torch.testing.assert_close(score, (weight * grad).abs().detach())


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "imp"])
def test_layers_without_weights_are_left_out(name):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.none, self.some = nn.Linear(0, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.some(x) + self.none(x[:, :0])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = Empty()
    masks = one_shot(name, density=0.5).masks(model, [(torch.rand(2, 4), torch.arange(2))])
    assert [(n, mask.kept) for n, mask in masks.items()] == [("some.weight", 6)]


def test_weights_without_values_or_shapes_are_refused():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(
        ValueError, match=r"'0\.weight' is on the meta device, without values; load them first"
    ):
        OMP(OMPSettings()).masks(model)
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet; run the model once"):
        OMP(OMPSettings()).masks(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))


def test_a_layer_that_the_loss_does_not_reach_scores_nothing():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    batch = torch.rand(6, 4), torch.arange(6) % 3
    for name in ("snip", "hydra", "grasp", "synflow"):
        masks = one_shot(name, density=0.5, scope="global").masks(Unused(), [batch])
        assert sum(mask.kept for mask in masks.values()) == 12
        if name in ("snip", "synflow"):
            assert masks["used.weight"].density == 1


@pytest.mark.parametrize(
    ("scope", "whose"), [("global", "all layers"), ("layer", r"'0\.weight'")], ids=["global", "layer"]
)
def test_weights_kept_for_their_place_are_told(scope, whose):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    with pytest.warns(
        UserWarning, match=f"scores of {whose}: .* kept for their place alone, as the score 0.5"
    ):
        OMP(OMPSettings(density=0.25, scope=scope)).masks(model)


def test_distinct_scores_are_kept_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scope in ("global", "layer"):
            OMP(OMPSettings(density=0.1, scope=scope)).masks(nn.Linear(64, 64).bfloat16())
        OMP(OMPSettings(density=1.0)).masks(nn.Linear(64, 64))


def test_pruning_a_masked_network_less_than_it_is_is_told():
    model = mlp()
    sparsify(model, OMP(OMPSettings(density=0.2)).masks(model))
    for pruner in (OMP(OMPSettings(density=0.5)), RandomPruning(RandomPruningSettings(density=0.5))):
        with pytest.warns(UserWarning, match="kept for their place alone"):
            masks = pruner.masks(model)
        assert all((m.to_dense() >= masks_of(model)[n].to_dense()).all() for n, m in masks.items())


def test_grasp_does_not_bring_back_pruned_filters_of_score_zero():
    torch.manual_seed(0)
    model = mlp()
    batch = torch.rand(32, 6), torch.randint(4, (32,))
    words = {"density": 0.5, "granularity": "filter"}
    sparsify(model, GraSP(GraSPSettings(**words)).masks(model, [batch]))
    for seed in range(5):
        batch = torch.rand(32, 6, generator=torch.Generator().manual_seed(seed)), torch.randint(4, (32,))
        assert GraSP(GraSPSettings(**words)).masks(model, [batch]) == masks_of(model)


def test_n_of_m_leaves_depthwise_layers_dense():
    layers = [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 4, 4))
    masks = OMP(OMPSettings(density=0.5, granularity="2:4")).masks(model)
    assert [mask.density for mask in masks.values()] == [0.5, 1.0, 0.5, 0.5]
    channels = OMP(OMPSettings(density=0.5, granularity="channel")).masks(
        model, [(torch.rand(1, 4, 6, 6), None)]
    )
    assert [mask.density for mask in channels.values()] == [1.0, 1.0, 0.5, 0.5]


# --- SynFlow ------------------------------------------------------------------------------------------------


class Buffered(nn.Module):
    """Tokens, and buffers that are not floats."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("order", torch.tensor([3, 2, 1, 0], dtype=torch.uint8))

    def forward(self, ids):
        h = self.words(ids) * self.mask.unsqueeze(1)
        return self.b(torch.relu(self.a(h[:, self.order.long()]).mean(1)))


@pytest.mark.filterwarnings("ignore:.*cannot be masked")
def test_synflow_of_tokens_starts_at_the_embeddings():
    model = Buffered()
    twin = Buffered()
    batch = torch.randint(9, (5, 4)), torch.arange(5) % 3
    score = SynFlow(SynFlowSettings(rounds=1))._scores(twin, prunable(twin), [batch])
    a, b = (p.detach().double().abs().requires_grad_() for p in (model.a.weight, model.b.weight))
    mean = 0.75  # of ones where the mask is True
    h = (torch.full((4,), mean, dtype=torch.float64) @ a.t()) + model.a.bias.double().abs()
    out = (h @ b.t()).sum()
    for found, weight, grad in zip(score.values(), (a, b), torch.autograd.grad(out, (a, b)), strict=True):
        torch.testing.assert_close(found, (weight * grad).detach())
    masks = SynFlow(SynFlowSettings(density=0.2)).masks(model, [batch])
    assert sum(mask.kept for mask in masks.values()) == round(0.2 * 42)


class Attention(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.q, self.k, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.temperature = temperature

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2) * self.temperature
        return self.head((torch.exp(scores) @ x).mean(1))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
            torch.rand(2, 4),
            "is not negative, got",
        ),
        (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
            torch.rand(2, 2, 6, 6),
            "not monotone in absolute values",
        ),
        (Attention(1e4), torch.rand(2, 5, 4), "finite, got NaN or infinity: .*exp and softmax overflow"),
    ],
    ids=["LayerNorm", "GroupNorm", "exp"],
)
def test_synflow_is_refused_where_there_is_no_flow(model, x, message):
    with pytest.raises(ValueError, match=f"scores of '.*weight' must be .*{message}"):
        SynFlow(SynFlowSettings()).masks(model, [(x, torch.arange(2))])


def test_synflow_of_several_outputs_flows_to_all():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return {"out": self.a(x), "aux": [self.b(x)], "best": self.a(x).argmax(1)}

    scores = SynFlow(SynFlowSettings(rounds=1))._scores(
        twin := Two(), prunable(twin), [(torch.rand(1, 4), None)]
    )
    for name, weight in prunable(twin).items():
        torch.testing.assert_close(scores[name], weight.detach())


def test_imp_rewinds_by_the_recipe_of_its_docstring():
    """Early weights come from the state_dict: what masked layers hold of pruned weights is of no account."""
    model = mlp()
    early = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    imp = PRUNERS["imp"][0](IMPSettings(density=0.5))
    before = None
    for density in imp.densities():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        masks = imp.masks(model, density)
        to_dense(model).load_state_dict(early)
        sparsify(model, masks)
        dense = to_dense(mlp_of(model)).state_dict()
        for name, mask in masks.items():
            assert torch.equal(dense[name], early[name] * mask.to_dense())
            assert before is None or (mask.to_dense() <= before[name].to_dense()).all()
        before = masks


def mlp_of(model):
    twin = mlp()
    sparsify(twin, masks_of(model))
    twin.load_state_dict(model.state_dict())
    return twin

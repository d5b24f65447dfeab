"""Compacted networks: the same outputs, fewer channels."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import models, ops
from blokern.sparse import MaskedConv2d, compact, masks_of, samples_innermost, sparsify, to_dense

Masking = Callable[[Tensor, float], Tensor]


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, its BatchNorms with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.double().modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.data.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return model


def masked(model: nn.Module, masking: Masking, density: float = 0.5, but: str = "none") -> nn.Module:
    scores = {name: p for name, p in model.named_parameters() if p.dim() > 1 and name != but}
    return sparsify(model, {name: masking(p, density) for name, p in scores.items()})


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def memory(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()} - {0}


def check(model: nn.Module, *shape: int) -> nn.Module:
    """Compact in both modes; returns the one in eval mode."""
    x = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        small = compact(model.train(mode))
        assert small.training == mode
        assert not memory(small) & memory(model)
        assert all(map(torch.equal, model.state_dict().values(), before.values()))
        torch.testing.assert_close(small(x), copy.deepcopy(model)(x), rtol=1e-10, atol=1e-10)
        assert [p.shape for p in compact(small).parameters()] == [p.shape for p in small.parameters()]
    return small


@pytest.mark.parametrize("masking", [ops.filter_mask, ops.channel_mask])
@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "preact_resnet50", "vgg16_bn"])
def test_networks(name: str, masking: Masking) -> None:
    torch.manual_seed(0)
    model = masked(scattered(models.build(name, width=4, num_classes=3)), masking, but="head.2.weight")
    small = check(model, 3, 3, 16, 16)
    assert size(small) < 0.8 * size(model)
    assert type(small) is type(model)
    assert {*small.state_dict()} - {*model.state_dict()} <= {f"{n}.bias" for n, _ in small.named_modules()}
    torch.testing.assert_close(
        pickle.loads(pickle.dumps(small)).state_dict(), small.state_dict(), rtol=0, atol=0
    )
    back = samples_innermost(copy.deepcopy(small))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(back(x), model(x), rtol=1e-10, atol=1e-10)
    assert [p.shape for p in compact(samples_innermost(model)).parameters()] == [
        p.shape for p in small.parameters()
    ]


@pytest.mark.parametrize("given_over", [False, True], ids=["dense", "masked before"])
def test_masks_that_the_model_does_not_have(given_over: bool) -> None:
    torch.manual_seed(0)
    model = scattered(models.build("resnet18", width=4, num_classes=3)).eval()
    masks = {
        name: ops.filter_mask(p, 0.5) if name.endswith("conv1.weight") else torch.rand_like(p) < 0.7
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    if given_over:
        sparsify(model, {name: torch.rand(mask.shape) < 0.5 for name, mask in masks.items()})
    want = compact(sparsify(copy.deepcopy(model), masks))
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    small = compact(model, masks)
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert [type(module) for module in small.modules()] == [type(module) for module in want.modules()]
    torch.testing.assert_close(dict(small.state_dict()), dict(want.state_dict()), rtol=0, atol=0)


def test_layers_that_the_graph_does_not_show_take_their_masks() -> None:
    mask = torch.rand(2, 4) < 0.5
    layer = nn.Linear(4, 2)
    assert torch.equal(masks_of(compact(layer, {"weight": mask}))["weight"].to_dense(), mask)
    net = Wrapped(torch.relu)
    net.idle = nn.Linear(4, 2)
    small = compact(net, {"idle.weight": mask})
    assert torch.equal(masks_of(small)["idle.weight"].to_dense(), mask)
    assert type(layer) is type(net.idle) is nn.Linear


def test_masks_that_do_not_fit_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match=r"masks: '2\.weight' must be the weight of .*, got no such module"):
        compact(net, {"2.weight": torch.ones(1, 1) > 0})
    with pytest.raises(ValueError, match="mask"):
        compact(net, {"0.weight": torch.ones(8, 3) > 0})
    with pytest.warns(UserWarning, match="keeps no weight") as told:
        compact(net, {"0.weight": torch.zeros(8, 3, 3, 3) > 0})
    assert told[0].filename == __file__


def test_removed_filters_take_their_readers_along() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    model = masked(scattered(net), ops.filter_mask, but="10.weight")
    small = check(model, 4, 3, 8, 8)
    assert masks_of(small) == {}
    shapes = [(4, 3, 3, 3), (3, 4, 1, 1), (2, 3 * 16), (2, 2)]
    assert [p.shape for p in small.parameters() if p.dim() > 1] == shapes
    assert small[10].bias is not None  # tanh of a BatchNorm's constant
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (4, 4, 4)
    assert (small[7].in_features, small[7].out_features, small[8].num_features) == (48, 2, 2)


def test_a_constant_beside_padding_stays_unless_it_is_zero() -> None:
    def net(bias: float, mode: str = "zeros") -> nn.Module:
        reader = nn.Conv2d(2, 1, 3, padding=1, padding_mode=mode)
        model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), reader).double()
        nn.init.constant_(model[0].bias, bias)
        return sparsify(model, {"0.weight": torch.eye(2, 1)[..., None, None].expand(2, 2, 3, 3) > 0})

    assert check(net(-1.0), 2, 2, 5, 5)[2].in_channels == 1
    assert check(net(1.0, "circular"), 2, 2, 5, 5)[2].in_channels == 1
    kept = check(net(1.0), 2, 2, 5, 5)
    assert kept[2].in_channels == 2
    assert type(kept[0]) is MaskedConv2d


class Branches(nn.Module):
    """Concatenation, a residual add, a depthwise convolution, functional pools, and sizes asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.left = nn.Conv2d(4, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.right = nn.Conv2d(4, 3, 1, bias=False)
        self.mixed = nn.Conv2d(7, 4, 1)
        self.pool = nn.AvgPool2d(2, padding=1)
        self.hidden = nn.Linear(16, 5)
        self.drop = nn.Dropout(0.0)
        self.out = nn.Linear(5 + 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem((x - 0.5) / 0.25), 0.1)
        y = x + self.depthwise(F.relu(self.norm(self.left(x))))
        y = torch.cat([y, torch.sigmoid(self.right(y)) * 0.5], 1)
        y = self.mixed(F.max_pool2d(y, 2)).relu()
        h = F.adaptive_avg_pool2d(self.pool(y), (2, 2))
        h = self.drop(self.hidden(h.view(h.size(0), -1)))
        return self.out(torch.cat([h, y.mean((2, 3))], dim=1))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**20), st.floats(0.1, 1.0), st.floats(0.1, 1.0), st.floats(0.3, 1.0))
def test_random_masks(seed: int, filters: float, channels: float, weights: float) -> None:
    torch.manual_seed(seed)
    model = scattered(Branches(), seed)
    masks = {
        name: ops.filter_mask(p, filters)
        & ops.channel_mask(p, channels)
        & ops.topk_mask(torch.rand(p.shape), weights)
        for name, p in model.named_parameters()
        if p.dim() > 1 and torch.rand(()) < 0.8
    }
    check(sparsify(model, {name: mask for name, mask in masks.items() if mask.any()}), 3, 2, 9, 9)


def test_a_sum_keeps_what_either_branch_needs() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.branch(x))

    def rows(*kept: int) -> Tensor:
        return torch.tensor([i in kept for i in range(4)])[:, None, None, None]

    model = sparsify(
        Residual().double(),
        {
            "stem.weight": rows(0, 1).expand(4, 1, 1, 1),
            "branch.weight": rows(1, 2).expand(4, 4, 1, 1),
            "head.weight": rows(0, 1, 2).transpose(0, 1).expand(1, 4, 1, 1),
        },
    )
    small = check(model, 2, 1, 3, 3)
    assert small.stem.out_channels == small.branch.out_channels == small.head.in_channels == 3
    assert type(small.branch) is MaskedConv2d


def test_at_least_one_channel_stays() -> None:
    with pytest.warns(UserWarning, match="keeps no weight"):
        model = sparsify(
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).double(),
            {"0.weight": torch.zeros(4, 2, 3, 3, dtype=torch.bool)},
        )
    small = check(model, 2, 2, 8, 8)
    assert small[2].in_channels == 1


def test_junk_in_masked_weights_is_not_read() -> None:
    model = masked(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).double(), ops.topk_mask, 0.3
    )
    with torch.no_grad():
        for name, mask in masks_of(model).items():
            model.get_parameter(name)[~mask.to_dense()] = torch.nan
    x = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(compact(model)(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_dense_model_and_a_single_layer_stay() -> None:
    model = to_dense(models.build("small_cnn"))
    assert [p.shape for p in compact(model).parameters()] == [p.shape for p in model.parameters()]
    layer = nn.Linear(3, 2)
    assert torch.equal(compact(layer).weight, layer.weight)


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(2, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def test_a_layer_that_is_called_twice_and_one_that_is_tied_are_cut_alike() -> None:
    first, last, shared, tied = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    net = nn.Sequential(first, nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), tied, last).double()
    tied.weight = shared.weight
    for conv in (first, shared, tied):
        nn.init.constant_(conv.bias, -1.0)
    rows = torch.tensor([True, True, False, True])[:, None, None, None]
    small = check(
        sparsify(
            net, {"0.weight": rows.expand(4, 2, 1, 1), "7.weight": rows.view(1, 4, 1, 1).expand(2, 4, 1, 1)}
        ),
        2,
        2,
        5,
        5,
    )
    assert small[6].weight is small[2].weight


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow": (
        lambda: Wrapped(lambda x: x if x.sum() > 0 else -x),
        r"model: it cannot be compacted: its forward reads a number from a tensor that depends on the input",
    ),
    "values taken out": (
        lambda: Wrapped(lambda x: x * float(x.detach().numpy().max())),
        r"takes values that depend on the input out of torch, by Tensor\.numpy",
    ),
    "sizes": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(3, 4, 1)),
        r"example: .* give one, such as",
    ),
    "no tensors": (lambda: Wrapped(lambda x: None), r"its forward returns no tensors"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_why(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(make())


def test_an_example_of_another_dtype_is_told() -> None:
    """Also where float64, in which it is planned, would take it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    masks = {"0.weight": (torch.arange(8) < 4).view(8, 1, 1, 1).expand(8, 3, 3, 3)}
    with pytest.raises(
        ValueError, match=r"model: it cannot be compacted: its forward fails on the example: .*double"
    ):
        compact(net, masks, torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_a_network_in_train_mode_says_that_eval_mode_differs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        net[1].bias.fill_(0.5)
        net[1].running_mean.fill_(-1.0)
    masks, x = {"0.weight": ops.filter_mask(net[0].weight, 0.5)}, torch.rand(4, 3, 8, 8)
    with pytest.warns(
        UserWarning, match=r"in eval mode the smaller copy's outputs differ.* call model.eval\(\)"
    ):
        compact(net, masks, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = compact(net.eval(), masks, x)
        torch.testing.assert_close(small(x), sparsify(net, masks)(x))
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        compact(plain.train(), masks, x)

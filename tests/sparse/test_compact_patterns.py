"""Compaction of what other people's networks do: the masked network's outputs, fewer weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from blokern import ops
from blokern.sparse import compact, sparsify


class Net(nn.Module):
    """Parts, and a forward that uses them."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def conv(inputs: int, outputs: int, size: int = 1, **options: object) -> nn.Conv2d:
    """One by one: beside padding, constants that are not zero stay."""
    return nn.Conv2d(inputs, outputs, size, **options)  # type: ignore[arg-type]


def head(inputs: int) -> nn.Linear:
    return nn.Linear(inputs, 3)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with parameters and statistics of any value: a dead filter's constant is seldom zero."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for tensor in model.parameters():
        tensor.data.normal_(std=0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model


def halved(model: nn.Module, but: tuple[str, ...] = ()) -> nn.Module:
    """Masks of half the filters for all layers that can have one, but for the named ones and heads."""
    masks = {
        f"{path}.weight": ops.filter_mask(module.weight.detach(), 0.5)
        for path, module in model.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear)
        and path not in ("out", *but)
        and isinstance(module.weight, nn.Parameter)
        and "weight" in module._parameters
    }
    return sparsify(model, masks)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check(model: nn.Module, x: Tensor, *, smaller: bool = True) -> nn.Module:
    """Compact in both modes, on another input too, and run the copy in the other mode; returns the eval one."""
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        small = compact(model.train(mode), example=x)
        assert all(map(torch.equal, model.state_dict().values(), before.values()))
        assert type(small) is type(model)
        for inputs in (x, torch.flip(x, (-1,)) * 2):
            got, want = copy.deepcopy(small)(inputs), copy.deepcopy(model)(inputs)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        copy.deepcopy(small).train(not mode)(x)
        assert {*small.state_dict()} - {*model.state_dict()} <= {
            f"{n}.bias" for n, _ in small.named_modules()
        }
        if smaller:
            assert size(small) < size(model)
    return small


def images(*shape: int) -> Tensor:
    return torch.rand(
        *(shape or (3, 3, 8, 8)), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


# --- In place ----------------------------------------------------------------------------------------------


def residual(act: nn.Module) -> nn.Module:
    return Net(
        lambda self, x: self.out(pooled(self.stem(x) + self.b(self.act(self.a(self.act(self.stem(x))))))),
        stem=conv(3, 8), a=conv(8, 8), b=conv(8, 8), act=act, out=head(8),
    )  # fmt: skip


def read_again(self: Net, x: Tensor) -> Tensor:
    x = self.stem(x)
    y = x + self.b(self.act(self.a(self.act(x))))  # act has changed x
    return self.out(pooled(y))


def through_a_view(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    x[:, :4].relu_()
    x[:, 2:6].mul_(0.5).add_(1.0)
    x.view(x.shape[0], -1)[:, ::2] += 1.0
    return self.out(pooled(self.b(x)))


def view_read_after(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    view = x[:, 2:]
    x.sub_(3.0)
    return self.out(pooled(self.b(x)) + F.pad(view.sum((2, 3)), (0, 2)))


def first_half_in_place(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    first, second = x[:, :4], x[:, 4:]
    first.tanh_()
    second += first
    return self.out(pooled(self.b(x)))


def assigned(self: Net, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype)
    y[:, :4] = self.a(x)[:, 4:]
    y[:, 4:] = 2.0
    return self.out(pooled(self.b(y)))


def data_written(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    x.data.add_(1.0)
    return self.out(pooled(self.b(x)))


def into_out(self: Net, x: Tensor) -> Tensor:
    x = self.a(x)
    with torch.no_grad():
        torch.exp(x, out=x)
    return self.out(pooled(self.b(x)))


def squeezed(self: Net, x: Tensor) -> Tensor:
    x = self.b(self.a(x).relu_()).mean((2, 3), keepdim=True)
    return self.out(x.squeeze_(3).squeeze_(2))


IN_PLACE = {
    "fault 3": lambda: Net(
        read_again, stem=conv(3, 8), a=conv(8, 8), b=conv(8, 8), act=nn.ReLU(inplace=True), out=head(8)
    ),
    "residual": lambda: residual(nn.ReLU(inplace=True)),
    "squeezed": lambda: Net(squeezed, a=conv(3, 8), b=conv(8, 8), out=head(8)),
    "hardswish": lambda: residual(nn.Hardswish(inplace=True)),
    **{
        function.__name__: lambda function=function: Net(function, a=conv(3, 8), b=conv(8, 8), out=head(8))
        for function in (through_a_view, view_read_after, first_half_in_place, assigned, data_written, into_out)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str) -> None:
    check(halved(randomised(IN_PLACE[name]())), images(), smaller=name != "view_read_after")


def test_a_dead_filter_of_negative_bias_before_an_activation_in_place() -> None:
    model = randomised(IN_PLACE["fault 3"]())
    for layer in (model.stem, model.a):
        nn.init.constant_(layer.bias, -1.0)
    small = check(halved(model), images())
    assert small.a.out_channels == 4


# --- The list of crashes -----------------------------------------------------------------------------------


def without_affine(**options: bool) -> nn.Module:
    norm = nn.BatchNorm2d(8, affine=False, **options)
    return nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_batch_norm_without_affine(options: dict[str, bool]) -> None:
    small = check(halved(randomised(without_affine(**options)), but=("3",)), images())
    assert small[0].out_channels == small[3].in_channels == 4
    if not options:
        assert small[1].num_features == 4


def test_means_of_one_dimension_each() -> None:
    model = Net(lambda self, x: self.out(self.a(x).relu().mean(3).mean(2)), a=conv(3, 8), out=head(8))
    assert check(halved(randomised(model)), images()).out.in_features == 4


WEIGHTS = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "weight_norm hook": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm hook": lambda layer: torch.nn.utils.spectral_norm(layer),
    "prune": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_a_neighbour_whose_weight_is_made_of_others(
    make: Callable[[nn.Module], nn.Module], place: int
) -> None:
    net = nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(8 * 36, 3)
    )
    model = randomised(net)
    make(model[place])
    model = halved(model.eval(), but=("6",))
    small = compact(model, example=images(3, 3, 6, 6))
    torch.testing.assert_close(small(images(2, 3, 6, 6)), model(images(2, 3, 6, 6)), rtol=1e-9, atol=1e-9)
    assert size(small) < size(model)
    assert parametrize.is_parametrized(small[place]) == parametrize.is_parametrized(model[place])


def test_batch_norm_over_positions() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(8, 4))
    check(
        halved(randomised(model), but=("3",)), images(7, 5, 6), smaller=False
    )  # what is constant differs by position


class Auxiliary(nn.Module):
    """A head that only train mode uses, and one that only eval mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body, self.out = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8), head(8)
        self.training_only = nn.Sequential(conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 2))
        self.evaluation_only = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        y = pooled(self.body(x))
        return self.out(y), self.training_only(x) if self.training else self.evaluation_only(y)


def test_heads_of_one_mode_follow() -> None:
    small = check(halved(randomised(Auxiliary()), but=("evaluation_only", "training_only.3")), images())
    assert small.training_only[0].in_channels == small.stem.out_channels < 8
    assert small.evaluation_only.in_features == small.body.out_channels < 8


# --- Structures --------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv(width, width // 2), conv(width // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu_(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class StandardisedConv(nn.Conv2d):
    """As in weight-standardised ResNets: the weight that counts is made of the parameter in forward."""

    def forward(self, input: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        )
        return F.conv2d(input, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Scaled(nn.Module):
    """ConvNeXt's block: depthwise, LayerNorm over the last dimension, two linear layers, a scale, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention over the pixels, by a product of all three projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.project = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = (
            self.qkv(y).reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.project(y).transpose(1, 2).view(n, c, h, w)


def sequential(*middle: nn.Module, width: int = 8, after: int | None = None) -> Callable[[], nn.Module]:
    """A stem, something, and a reader of its channels."""

    def make() -> nn.Module:
        made = [copy.deepcopy(layer) for layer in middle]
        reader = conv(after or width, 6)
        return nn.Sequential(conv(3, width), *made, reader, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(6))

    return make


def between(function: Callable[[Tensor], Tensor], after: int = 8, width: int = 8) -> Callable[[], nn.Module]:
    return sequential(Net(lambda self, x: function(x)), width=width, after=after)


def shuffle(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


STRUCTURES = {
    "squeeze and excite": sequential(nn.ReLU(), SqueezeExcite(8)),
    "PReLU": sequential(nn.PReLU(8)),
    "PReLU of one": sequential(nn.PReLU()),
    "depthwise": sequential(nn.Conv2d(8, 8, 1, groups=8)),
    "depthwise multiplied": sequential(nn.Conv2d(8, 16, 1, groups=8), after=16),
    "transposed": sequential(nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), after=6),
    "transposed depthwise": sequential(nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=8)),
    "LayerNorm block": sequential(nn.ReLU(), Scaled(8)),
    "attention": sequential(nn.ReLU(), Attention(8, 2), conv(8, 8), nn.ReLU()),
    "instance norm": sequential(nn.InstanceNorm2d(8, affine=True)),
    "group norm of one": sequential(nn.GroupNorm(8, 8)),
    "upsampled": sequential(nn.Upsample(scale_factor=2)),
    "bilinear": sequential(nn.Upsample(scale_factor=2, mode="bilinear")),
    "reflection": sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
    "circular": sequential(nn.CircularPad2d(1), nn.Conv2d(8, 8, 3)),
    "max pool": sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)),
    "GLU": sequential(nn.GLU(1), after=4),
    "softmax of pixels": between(lambda x: x.flatten(2).softmax(-1).view_as(x)),
    "chunk": between(lambda x: torch.mul(*x.chunk(2, 1)), after=4),
    "split and cat": between(lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1)),
    "cat of itself": between(lambda x: torch.cat([x, x.relu(), x[:, :2]], 1), after=18),
    "channel shuffle": between(shuffle),
    "nn.ChannelShuffle": sequential(nn.ChannelShuffle(2)),
    "pixel shuffle": sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    "stacked": between(lambda x: torch.stack([x, x.relu()], 1).sum(1)),
    "crelu": between(lambda x: torch.cat([x.relu(), (-x).relu()], 1), after=16),
    "padded channels": between(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), after=12),
    "einsum": between(lambda x: torch.einsum("nchw,nchw->nchw", x, x.sigmoid())),
    "masked fill": between(lambda x: x.masked_fill(x < 0, 0.0) + torch.where(x > 1, x, 0.5 * x)),
    "flattened and back": between(lambda x: x.flatten(2).unflatten(2, x.shape[2:])),
    "reshaped by size": between(lambda x: x.reshape(x.shape[0], x.shape[1], -1).view(*x.shape)),
    "batch in channels": between(lambda x: x.reshape(1, -1, *x.shape[2:]).reshape(x.shape)),
    "expanded": between(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)),
    "repeated": between(lambda x: x.repeat(1, 2, 1, 1), after=16),
    "rolled pixels": between(lambda x: x.roll((1, 1), (2, 3)).flip(3)),
    "one channel gates": between(lambda x: x * x.mean(1, keepdim=True).sigmoid() + x.amax(1, keepdim=True)),
    "dense layers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), head(8)),
    "one channel left": lambda: nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 6), nn.ReLU(), nn.Flatten(), head(384)),
}  # fmt: skip

#: Whose channels all stay, here: they are mixed, or go as groups.
WHOLE = {"attention", "one channel gates", "assertion"}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    check(halved(randomised(STRUCTURES[name]())), images(), smaller=name not in WHOLE)


def test_weights_that_are_made_in_forward() -> None:
    net = nn.Sequential(
        StandardisedConv(3, 8, 3), nn.ReLU(), conv(8, 8), nn.ReLU(), StandardisedConv(8, 4, 1)
    )
    model = randomised(net)
    masks = {"2.weight": ops.filter_mask(model[2].weight.detach(), 0.5)}
    check(sparsify(model, masks), images(), smaller=False)


def test_layouts_stay() -> None:
    model = STRUCTURES["squeeze and excite"]().to(memory_format=torch.channels_last)
    small = check(halved(randomised(model)), images())
    assert small[0].weight.stride() == (3, 1, 3, 3)


def test_groups_go_as_a_whole() -> None:
    net = nn.Sequential(
        conv(3, 8),
        nn.ReLU(),
        conv(8, 8, groups=4),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        conv(8, 6, bias=False),
        nn.Flatten(),
    )
    model = randomised(net)
    rows = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1])[:, None, None, None] > 0
    masks = {"0.weight": rows.expand(8, 3, 1, 1), "2.weight": rows.expand(8, 2, 1, 1)}
    small = check(sparsify(model, masks), images(2, 3, 8, 8))
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (6, 6, 3)
    assert (small[3].num_groups, small[3].num_channels, small[5].in_channels) == (3, 6, 6)
    assert small[5].bias is not None  # what GroupNorm makes of constants


# --- Forwards that have sizes as numbers ---------------------------------------------------------------------

NUMBERS = {
    "view": between(lambda x: x.view(-1, 8, 64).relu().view(-1, 8, 8, 8)),
    "groups": between(lambda x: x.view(x.shape[0], 4, 2, *x.shape[2:]).flip(1).flatten(1, 2)),
    "slice": between(lambda x: x[:, 3:7], after=4),
    "split": between(lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1)),
    "index": between(lambda x: x * x[:, 5:6] + x[:, 2].unsqueeze(1)),
    "expand": between(lambda x: x + x.new_zeros(8).view(1, 8, 1, 1).expand(x.shape[0], 8, 8, 8)),
    "assertion": between(lambda x: x if x.shape[1] == 8 else x[:, :1]),
    "asked for": between(lambda x: x * (x.shape[1] ** 0.5)),
    "permuted by a list": between(lambda x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]]),
    "depthwise": between(lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3, dtype=x.dtype), groups=8)),
    "group norm": between(lambda x: F.group_norm(x, 2)),
    "layer norm": between(lambda x: F.layer_norm(x, x.shape[1:])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_forward_has_as_a_number_stays(name: str) -> None:
    check(halved(randomised(NUMBERS[name]())), images(), smaller=name not in WHOLE)

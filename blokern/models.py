"""Convolutional classifiers: NCHW images in [0, 1] in, logits [N, num_classes] out.

Every network is an ``nn.Sequential`` of named parts, the first of which normalises the images; so attacks and
their ε live in [0, 1]. ReLUs are never in place, which keeps double backward safe.

>>> model = preact_resnet18(num_classes=10, width=64)
>>> logits = model(torch.rand(8, 3, 32, 32))
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from blokern._names import unknown_name

__all__ = [
    "BUILDERS",
    "NAMES",
    "BasicBlock",
    "Normalize",
    "PreActBlock",
    "PreActBottleneck",
    "build",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "resnet18",
    "resnet20",
    "resnet56",
    "small_cnn",
    "vgg16_bn",
    "wide_resnet28_10",
]

#: One float a channel in [0, 1] units, or None for a mean of 0 or a standard deviation of 1.
Stats: TypeAlias = Sequence[float] | None


class Normalize(nn.Module):
    """``(x - mean) / std`` for each channel of x [N, C, H, W], with ``mean`` and ``std`` as buffers.

    Args:
        channels: C.
        mean, std: C floats in [0, 1] units, or None for 0 and 1.

    Raises:
        ValueError: not C floats, or a ``std`` that is not positive.

    >>> normalize = Normalize(1, mean=(0.286,), std=(0.353,))
    >>> z = normalize(torch.rand(8, 1, 28, 28))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: Stats = None, std: Stats = None) -> None:
        super().__init__()
        mean = [0.0] * channels if mean is None else [float(value) for value in mean]
        std = [1.0] * channels if std is None else [float(value) for value in std]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"{name} must have one value for each of {channels} channels, got {values}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(in_width: int, out_width: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the image size at stride 1. No bias: a BatchNorm always follows."""
    return nn.Conv2d(in_width, out_width, size, stride, padding=size // 2, bias=False)


def _conv_bn_relu(in_width: int, out_width: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(in_width, out_width, stride=stride), nn.BatchNorm2d(out_width), nn.ReLU()]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and a shortcut; ReLU after the sum (He et al., 2015)."""

    expansion: ClassVar[int] = 1
    preact: ClassVar[bool] = False

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_width, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(_conv(in_width, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))
        return out


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and nothing after the sum (He et al., 2016).

    Where the shape changes, the shortcut starts after the first ReLU.
    """

    expansion: ClassVar[int] = 1
    preact: ClassVar[bool] = True

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(in_width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(width, width)
        changes = stride != 1 or in_width != width
        self.shortcut = _conv(in_width, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.relu2(self.bn2(out)))
        return out + shortcut


class PreActBottleneck(nn.Module):
    """As :class:`PreActBlock`, with 1x1, 3x3 and 1x1 convolutions, the last to 4 times the width."""

    expansion: ClassVar[int] = 4
    preact: ClassVar[bool] = True

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = self.expansion * width
        self.bn1 = nn.BatchNorm2d(in_width)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(in_width, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(width, width, stride=stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.conv3 = _conv(width, out_width, 1)
        changes = stride != 1 or in_width != out_width
        self.shortcut = _conv(in_width, out_width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.relu2(self.bn2(out)))
        out = self.conv3(self.relu3(self.bn3(out)))
        return out + shortcut


_Block: TypeAlias = type[BasicBlock] | type[PreActBlock] | type[PreActBottleneck]


def small_cnn(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 16
) -> nn.Module:
    """Four convolutions and two linear layers, 83 thousand parameters; for images from 8x8 up."""
    _check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
    # Pooling to 4x4 rather than to one pixel: a net this shallow needs to know where in the image a thing is.
    features = nn.Sequential(
        *_conv_bn_relu(in_channels, width),
        *_conv_bn_relu(width, width, stride=2),
        *_conv_bn_relu(width, 2 * width),
        *_conv_bn_relu(2 * width, 2 * width, stride=2),
        nn.AdaptiveAvgPool2d(4),
    )
    head = nn.Sequential(
        nn.Flatten(), nn.Linear(2 * width * 16, 8 * width), nn.ReLU(), nn.Linear(8 * width, num_classes)
    )
    return _network(Normalize(in_channels, mean, std), features=features, head=head)


def resnet18(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 64
) -> nn.Module:
    """ResNet-18 with a 3x3 stem for small images, 11.2 million parameters."""
    return _resnet(BasicBlock, (2, 2, 2, 2), width, num_classes, in_channels, mean, std)


def resnet20(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 16
) -> nn.Module:
    """The CIFAR ResNet-20, with 1x1 convolutions on the shortcuts, 0.27 million parameters."""
    return _resnet(BasicBlock, (3, 3, 3), width, num_classes, in_channels, mean, std)


def resnet56(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 16
) -> nn.Module:
    """The CIFAR ResNet-56, with 1x1 convolutions on the shortcuts, 0.86 million parameters."""
    return _resnet(BasicBlock, (9, 9, 9), width, num_classes, in_channels, mean, std)


def preact_resnet18(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 64
) -> nn.Module:
    """Pre-activation ResNet-18 with a 3x3 stem, 11.2 million parameters; usual in adversarial training."""
    return _resnet(PreActBlock, (2, 2, 2, 2), width, num_classes, in_channels, mean, std)


def preact_resnet34(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 64
) -> nn.Module:
    """Pre-activation ResNet-34 with a 3x3 stem, 21.3 million parameters."""
    return _resnet(PreActBlock, (3, 4, 6, 3), width, num_classes, in_channels, mean, std)


def preact_resnet50(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 64
) -> nn.Module:
    """Pre-activation ResNet-50 (bottlenecks) with a 3x3 stem, 23.5 million parameters."""
    return _resnet(PreActBottleneck, (3, 4, 6, 3), width, num_classes, in_channels, mean, std)


def wide_resnet28_10(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, widen: int = 10
) -> nn.Module:
    """WideResNet-28 (Zagoruyko and Komodakis, 2016), without dropout, 36.5 million parameters at widen 10."""
    _check_counts(widen=widen)
    return _resnet(PreActBlock, (4, 4, 4), 16 * widen, num_classes, in_channels, mean, std, stem_width=16)


def vgg16_bn(
    num_classes: int = 10, in_channels: int = 3, mean: Stats = None, std: Stats = None, width: int = 64
) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer, as usual for CIFAR, 14.7 million parameters."""
    _check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
    layers: list[nn.Module] = []
    in_width = in_channels
    for depth, multiple in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        for _ in range(depth):
            layers += _conv_bn_relu(in_width, multiple * width)
            in_width = multiple * width
        # Rounding up leaves a pixel of any image after five halvings, and changes nothing at 32x32.
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return _network(
        Normalize(in_channels, mean, std),
        features=nn.Sequential(*layers),
        head=_pool_and_classify(in_width, num_classes),
    )


def _resnet(
    block: _Block,
    depths: Sequence[int],
    width: int,
    num_classes: int,
    in_channels: int,
    mean: Stats,
    std: Stats,
    stem_width: int | None = None,
) -> nn.Module:
    """A 3x3 stem, one stage of blocks for each depth, a head.

    Each stage but the first halves the image and doubles the width; the stem has the first stage's width
    unless told otherwise.
    """
    _check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
    in_width = stem_width or width
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    # The BatchNorm and ReLU that the blocks do not have: before the first one, or after the last.
    if block.preact:
        parts["stem"] = _conv(in_channels, in_width)
    else:
        parts["stem"] = nn.Sequential(*_conv_bn_relu(in_channels, in_width))
    for number, depth in enumerate(depths):
        blocks = []
        for index in range(depth):
            stride = 2 if number > 0 and index == 0 else 1
            blocks.append(block(in_width, width * 2**number, stride))
            in_width = block.expansion * width * 2**number
        parts[f"stage{number + 1}"] = nn.Sequential(*blocks)
    if block.preact:
        parts["norm"] = nn.Sequential(nn.BatchNorm2d(in_width), nn.ReLU())
    parts["head"] = _pool_and_classify(in_width, num_classes)
    return _network(Normalize(in_channels, mean, std), **parts)


def _pool_and_classify(width: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def _network(normalize: Normalize, **parts: nn.Module) -> nn.Module:
    """Chain the parts after ``normalize``, with He et al.'s (2015) initial weights."""
    model = nn.Sequential(OrderedDict(normalize=normalize, **parts))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _timm(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Stats = None,
    std: Stats = None,
    **kwargs: Any,
) -> nn.Module:
    """A network of the timm library behind our normalisation; ``kwargs`` go to ``timm.create_model``."""
    _check_counts(num_classes=num_classes, in_channels=in_channels)
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(f"timm:{name} is built by timm: pip install 'blokern[vision]' ({error})") from error
    except Exception as error:  # a torchvision for another torch raises anything
        raise ImportError(
            f"timm:{name} is built by timm, which cannot be imported beside torch {torch.__version__}: {error}; "
            "install the torchvision that belongs to that torch"
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"name: timm {timm.__version__} has no model {name!r}; timm.list_models() lists all")
    try:
        network = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **kwargs)
    # What timm's constructors raise for settings that a network does not take; some say so by NotImplementedError.
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        asked = ", ".join(f"{key}={value!r}" for key, value in {"in_chans": in_channels, **kwargs}.items())
        raise ValueError(f"name: timm makes no {name} with {asked}: {error}") from error
    return nn.Sequential(OrderedDict(normalize=Normalize(in_channels, mean, std), network=network))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        small_cnn,
        resnet18,
        resnet20,
        resnet56,
        preact_resnet18,
        preact_resnet34,
        preact_resnet50,
        wide_resnet28_10,
        vgg16_bn,
    )
}

#: The names that :func:`build` knows, besides ``timm:NAME``.
NAMES = tuple(BUILDERS)


def build(name: str, **kwargs: Any) -> nn.Module:
    """The network called ``name``, one of :data:`NAMES`, or ``timm:NAME`` for one of the timm library.

    ``kwargs`` go to the builder: ``num_classes``, ``in_channels``, ``mean``, ``std``, and ``width`` (the
    channels of the first stage; ``widen`` for ``wide_resnet28_10``). ValueError for an unknown name or a bad
    argument, ImportError when timm is needed and absent, or cannot be imported.

    >>> train = load("fashion-mnist").train
    >>> model = build("small_cnn", in_channels=1, mean=train.mean, std=train.std)
    """
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), **kwargs)
    if name not in BUILDERS:
        raise unknown_name("name", name, [*NAMES, "timm:NAME"])
    return BUILDERS[name](**kwargs)

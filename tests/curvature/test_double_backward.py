"""The lean layers against torch's own double backward, and where they must step aside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from blokern.curvature import mixed_hvp


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight > 0)


class Dynamic(nn.Module):
    """A convolution whose weight is a function of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.square().mean(), padding=1)


def masked() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    parametrize.register_parametrization(conv, "weight", Masked())
    return conv


def frozen() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.requires_grad_(False)
    return conv


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (5, 4, 7, 6)),
    "conv strided": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), bias=False),
        (5, 4, 7, 6),
    ),
    "conv dilated, grouped": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=2), (5, 4, 7, 6)),
    "conv same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (5, 4, 7, 6)),
    "conv circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 7, 6)),
    "conv masked": (masked, (5, 4, 7, 6)),
    "conv dynamic": (Dynamic, (5, 4, 7, 6)),
    "conv frozen": (frozen, (5, 4, 7, 6)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "norm": (lambda: nn.BatchNorm2d(4), (5, 4, 7, 6)),
    "norm of vectors": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "norm of volumes": (lambda: nn.BatchNorm3d(4), (5, 4, 2, 3, 2)),
    "norm cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (5, 4, 7, 6)),
    "norm without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 7, 6)),
    "norm without weights": (lambda: nn.BatchNorm2d(4, affine=False), (5, 4, 7, 6)),
    "norm in eval mode": (lambda: nn.BatchNorm2d(4).eval(), (5, 4, 7, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_products_equal_torchs(layer: str, memory_format: torch.memory_format) -> None:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), build(), nn.Softplus(), nn.Flatten(), nn.LazyLinear(3)).double()
    for p in model[1].parameters():
        nn.init.normal_(p)
    x, u = torch.randn(2, *shape, dtype=torch.float64)
    if len(shape) == 4:
        x = x.to(memory_format=memory_format)
    y = torch.arange(shape[0]) % 3
    model(x)
    twin = nn.Sequential(*model[:1], build().double(), *model[2:])
    twin.load_state_dict(model.state_dict())
    twin[1].train(model[1].training)

    at = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(twin(at), y), at, create_graph=True)
    trainable = [p for p in twin.parameters() if p.requires_grad]
    expected = torch.autograd.grad(grad, trainable, u, materialize_grads=True)
    products = mixed_hvp(model, F.cross_entropy, x, y, u)
    for product, wanted in zip(products.values(), expected, strict=True):
        torch.testing.assert_close(product, wanted, rtol=1e-9, atol=1e-11)
    for buffer, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted)


def test_a_single_value_a_channel_is_refused_as_torch_does() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    x = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mixed_hvp(model, F.cross_entropy, x, torch.zeros(1).long(), x)

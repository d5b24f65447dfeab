"""No default of a rule is of [0, 1] alone: a step on scaled images is the step, with the same draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blokern import bilevel
from blokern.bilevel import METHODS, FastATSettings, FastBATSettings, GradAlignSettings
from blokern.bilevel.adversarial import Rule

RANGES = [(0.0, 255.0), (-1.0, 1.0), (-2.5, 0.5)]
RULES = {name: pair for name, pair in METHODS.items() if name != "plain"}


class Rescaled(nn.Module):
    """A network of [0, 1] for images in [low, high]."""

    def __init__(self, net: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.net, self.low, self.high = net, low, high

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.low) / (self.high - self.low))


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Softplus()),
        *(nn.Conv2d(6, 8, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(72, 5)),
    )
    return net.double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(8) % 5


def weights_after(model: nn.Module, rule: type, settings: Any, x: Tensor, y: Tensor) -> Tensor:
    one = rule(model, torch.optim.SGD(model.parameters(), lr=0.05), settings)
    for seed in range(2):
        torch.manual_seed(seed)
        one.step(x, y)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_rule_is_here() -> None:
    public = [getattr(bilevel, name) for name in bilevel.__all__]
    found = {rule for rule in public if isinstance(rule, type) and issubclass(rule, Rule)}
    assert found == {rule for rule, _ in METHODS.values()}


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("share", [None, 16 / 255])
@pytest.mark.parametrize("name", RULES)
def test_rules_follow_the_images_range(name: str, low: float, high: float, share: float | None) -> None:
    rule, settings = RULES[name]
    x, y = batch()
    span = high - low
    here = weights_after(network(), rule, settings(eps=share), x, y)
    scaled = settings(eps=share and share * span, clip_min=low, clip_max=high)
    there = weights_after(Rescaled(network(), low, high), rule, scaled, low + span * x, y)
    torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-8)


def test_fast_bats_numbers_scale_with_the_square() -> None:
    given = FastBATSettings(eps=25.5, step_size=2000 / 255 * 255**2, lam=10 / 255**2, clip_max=255.0)
    default = FastBATSettings(eps=25.5, clip_max=255.0)
    assert (default.attack_step_size, default.lam) == pytest.approx((given.attack_step_size, given.lam))
    for low, high in ((0.0, 1.0), *RANGES):
        span = high - low
        box = {"clip_min": low, "clip_max": high}
        for pixels, a in ((8, 5000), (8.01, 2000), (16, 2000)):
            settings = FastBATSettings(eps=pixels / 255 * span, **box)
            assert settings.attack_step_size == pytest.approx(a / 255 * span**2)
        assert FastBATSettings(**box).eps == pytest.approx(8 / 255 * span)
        for pixels, penalty in ((8, 0.2), (16, 2.0), (51, 2.0)):
            assert GradAlignSettings(eps=pixels / 255 * span, **box).alignment_penalty == pytest.approx(
                penalty
            )
    assert FastBATSettings(lam=3.0, clip_max=255.0).implicit_lam == 3.0
    assert FastBATSettings(lam=math.inf, clip_max=255.0).implicit_lam == math.inf
    assert FastBATSettings(lam=0.0, clip_max=255.0).implicit_lam == pytest.approx(255 / 5000 / 255**2)


def test_defaults_are_those_of_the_papers() -> None:
    assert FastATSettings().eps == 8 / 255
    assert FastBATSettings().lam == 10.0
    assert FastBATSettings().attack_step_size == 5000 / 255


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", [torch.zeros(3, 1, 1), [0.0, 0.0, 0.0]])
def test_per_channel_boxes_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match="clip_min must be a float, the same for all channels, got"):
        RULES[name][1](clip_min=value)

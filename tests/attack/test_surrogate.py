"""Attacks that step by a faster copy of the network: what the copy computes, and that the network itself judges."""

import copy

import pytest
import torch
from attack_twins import small_net
from torch import nn

from blokern import models
from blokern.attack import APGD, PGD, base, surrogate
from blokern.attack.losses import correct
from blokern.attack.surrogate import Surrogate

ATTACKS = {
    "pgd": lambda net, **o: PGD(net, steps=5, **o),
    "pgd-restarts": lambda net, **o: PGD(net, steps=5, restarts=2, **o),
    "pgd-early-stop": lambda net, **o: PGD(net, steps=5, restarts=2, early_stop=True, **o),
    "apgd-early-stop": lambda net, **o: APGD(net, steps=8, early_stop=True, **o),
}


def network(name: str = "small_cnn") -> nn.Module:
    """With running statistics and factors that folding must not miss."""
    torch.manual_seed(0)
    net = models.build(name, num_classes=5, in_channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), width=8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def images(net: nn.Module, n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "vgg16_bn"])
@pytest.mark.parametrize(("kind", "error"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_the_copy_computes_what_the_model_does(name, kind, error):
    net = network(name)
    x, _ = images(net)
    guide = Surrogate(net, x, kind)
    assert guide.network is not net
    assert not any(p.requires_grad for p in guide.parameters())
    with torch.no_grad():
        ours, want = guide(x), net(x)
    assert ours.dtype == torch.float32
    assert (ours - want).norm() <= error * want.norm()


def test_batch_norms_behind_convolutions_are_gone():
    net = network("resnet18")
    kept = [m for m in Surrogate(net, images(net)[0], "fp32").modules() if isinstance(m, nn.BatchNorm2d)]
    assert not kept


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_model_is_left_as_it_was(attack, kind):
    net = network().train()
    x, y = images(net)
    before = copy.deepcopy(net.state_dict())
    x_adv = attack(net, surrogate=kind)(x, y)
    assert x_adv.dtype == x.dtype
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_accuracy_is_that_without_it(kind):
    net = network()
    x, y = images(net, 100)
    held = []
    for name in (None, kind):
        how = {"surrogate": name, "generator": torch.Generator().manual_seed(0)}
        x_adv = PGD(net, 0.6 / 255, 0.2 / 255, 8, restarts=2, early_stop=True, **how)(x, y)
        held.append(float(correct(net(x_adv), y).float().mean()))
    assert 0.1 < held[0] < 0.9
    assert held[1] == pytest.approx(held[0], abs=0.02)


class Biased(Surrogate):
    """One that is fooled by everything, and still has the model's gradients."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - 1e4 * nn.functional.one_hot(logits.argmax(1), logits.shape[1])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_who_is_fooled_is_for_the_model_to_say(attack, monkeypatch):
    net = network()
    x, y = images(net, 64)
    monkeypatch.setattr(base, "Surrogate", Biased)
    monkeypatch.setitem(surrogate._TOLERANCE, "fp32", float("inf"))
    eps, generator = 6 / 255, torch.Generator().manual_seed(0)
    x_adv = attack(net, eps=eps, surrogate="fp32", generator=generator)(x, y)
    held = correct(net(x_adv), y)
    assert not held.all()
    moved = (x_adv != x).flatten(1).any(1)
    assert moved[held].all(), "left because the copy was fooled"


def test_a_forward_that_cannot_be_traced_is_copied():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    net = Branching().eval()
    x, y = images(net)
    guide = Surrogate(net, x, "bf16")
    assert next(guide.parameters()).dtype == torch.bfloat16
    PGD(net, steps=2, surrogate="bf16")(x, y)


def test_a_copy_that_tracing_got_wrong_is_not_used():
    net = network()
    x, _ = images(net)
    net.register_forward_hook(
        lambda module, args, out: out.flip(1)
    )  # the model's own, which tracing passes by
    with pytest.warns(UserWarning, match="surrogate='fp32': the copy's logits are .* off"):
        guide = Surrogate(net, x, "fp32")
    assert guide.network is net
    assert torch.equal(guide(x), net(x))


def test_wrong_calls():
    net = network()
    x, y = images(net)
    with pytest.raises(ValueError, match="surrogate must be one of 'fp32', 'bf16', got 'fp16'"):
        PGD(net, surrogate="fp16")
    with pytest.raises(ValueError, match="eval_mode=True"):
        PGD(net, surrogate="fp32", eval_mode=False)
    with pytest.raises(ValueError, match="surrogate=None"):
        PGD(net, surrogate="fp32", cuda_graph=True)
    with pytest.raises(TypeError, match=r"x must be float32 for surrogate='fp32', got torch.float64"):
        PGD(small_net(), surrogate="fp32")(x.double(), y)
    assert PGD(net, surrogate="bf16")(x[:0], y[:0]).shape == (0, 3, 16, 16)


class Uncopyable(nn.Module):
    """What `deepcopy` refuses: a tensor that is a result, as fresh weight_norm has."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.derived = torch.ones(1, requires_grad=True) * 2

    def forward(self, x):
        return self.net(x)


class OnlyFloat32(Uncopyable):
    def __init__(self):
        super().__init__()
        self.derived = None

    def forward(self, x):
        if x.dtype != torch.float32 or next(self.parameters()).dtype != torch.float32:
            raise RuntimeError("float32 alone")
        return self.net(x)


class OnlyForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.half = x.dtype == torch.bfloat16
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.half:
            raise RuntimeError("no such gradient")
        return grad


class NoHalfGradient(OnlyFloat32):
    def forward(self, x):
        return self.net(OnlyForward.apply(x) if len(x) > 0 else x)  # which cannot be traced


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (Uncopyable, "fp32", "RuntimeError: Only Tensors created explicitly by the user"),
        (OnlyFloat32, "bf16", "RuntimeError: float32 alone"),
        (NoHalfGradient, "bf16", "RuntimeError: no such gradient"),
    ],
)
def test_a_copy_that_cannot_be_made_or_run_is_not_used(make, kind, reason):
    net = make().eval()
    x, y = images(net)
    with pytest.warns(UserWarning, match=f"surrogate='{kind}': the copy cannot be made or run .{reason}"):
        guide = Surrogate(net, x, kind)
    assert guide.network is net
    assert torch.equal(guide(x), net(x))
    with pytest.warns(UserWarning, match="so the model itself is attacked"):
        x_adv = PGD(net, steps=3, random_start=False, surrogate=kind)(x, y)
    assert torch.equal(x_adv, PGD(net, steps=3, random_start=False)(x, y))
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_fresh_weight_norm():
    net = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(3 * 16 * 16, 5)))
    x, y = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    x_adv = PGD(net, steps=2, random_start=False, surrogate="fp32")(x, y)
    torch.testing.assert_close(x_adv, PGD(net, steps=2, random_start=False)(x, y))


def test_the_models_own_errors_are_its_own():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Surrogate(Broken(), torch.rand(2, 3, 4, 4), "fp32")


def test_a_copy_of_tiny_logits_is_compared_too():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return 1e-30 * self.net(x)

    net = Tiny().eval()
    x, _ = images(net)
    assert Surrogate(net, x, "fp32").network is not net
    net.register_forward_hook(lambda module, args, out: out.flip(1))
    with pytest.warns(UserWarning, match="the copy's logits are .* off"):
        Surrogate(net, x, "fp32")

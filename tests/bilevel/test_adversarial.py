"""The baselines against plain twins, and what every method owes its caller."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import ops
from blokern.bilevel import (
    METHODS,
    NFGSMAT,
    PGDAT,
    TRADES,
    FastAT,
    FastATSettings,
    GradAlign,
    GradAlignSettings,
    NFGSMATSettings,
    PGDATSettings,
    Plain,
    PlainSettings,
    StepResult,
    TRADESSettings,
)

EPS = 0.05


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(n) % 5


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def run(name: str, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, **words: Any) -> StepResult:
    """One step of a method with the weights held still; the gradient is left in .grad."""
    rule, settings = METHODS[name]
    if name != "plain":
        words = {"eps": EPS, **words}
    if name == "fast-bat":
        words = {"step_size": 0.5, "lam": 0.0, **words}
    torch.manual_seed(seed)
    return rule(model, torch.optim.SGD(model.parameters(), lr=0.0), settings(**words)).step(x, y)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- Twins: a loss whose gradient a method must follow, written as its paper has it.


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, graph: bool = False) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=graph)[0]


def into_ball(x_adv: Tensor, x: Tensor) -> Tensor:
    return torch.clamp(x + torch.clamp(x_adv - x, -EPS, EPS), 0.0, 1.0)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def fast_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    start = ops.random_start(x, EPS)
    return plain(model, into_ball(start + 1.25 * EPS * input_gradient(model, start, y).sign(), x), y)


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    start = ops.random_start(x, 2 * EPS)
    x_adv = (start + EPS * input_gradient(model, start, y).sign()).clamp(0.0, 1.0)
    assert (x_adv - x).abs().max() > 1.5 * EPS
    return plain(model, x_adv, y)


def pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x_adv = ops.random_start(x, EPS)
    for _ in range(2):
        x_adv = into_ball(x_adv + EPS / 2 * input_gradient(model, x_adv, y).sign(), x)
    return plain(model, x_adv, y)


def grad_align(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    clean = input_gradient(model, x, y)
    loss = plain(model, into_ball(x + 1.25 * EPS * clean.sign(), x), y)
    noise = ops.random_start(x, EPS, clip_min=-math.inf, clip_max=math.inf) - x
    noisy = input_gradient(model, x + noise, y, graph=True)
    cosine = F.cosine_similarity(clean.flatten(1), noisy.flatten(1), dim=1)
    return loss + 0.2 * 10 ** ((255 * EPS - 8) / 8) * (1.0 - cosine.mean())


def trades(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def divergence(logits: Tensor, clean: Tensor) -> Tensor:
        p = clean.softmax(dim=1)
        return (p * (p.log() - logits.log_softmax(dim=1))).sum()

    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(divergence(model(x_adv), model(x)), x_adv)
        x_adv = into_ball(x_adv + EPS / 4 * grad.sign(), x).detach()
    model.train()
    clean = model(x)
    return F.cross_entropy(clean, y) + 6.0 * divergence(model(x_adv), clean) / len(x)


BASELINES = [
    (Plain, PlainSettings(), plain, 1),
    (FastAT, FastATSettings(eps=EPS), fast_at, 2),
    (NFGSMAT, NFGSMATSettings(eps=EPS), n_fgsm, 2),
    (PGDAT, PGDATSettings(eps=EPS), pgd, 3),
    (GradAlign, GradAlignSettings(eps=EPS), grad_align, 3),
    (TRADES, TRADESSettings(eps=EPS), trades, 2),
]


@pytest.mark.parametrize(("rule", "settings", "twin", "forwards"), BASELINES)
def test_baseline_follows_its_twin(
    rule: type, settings: Any, twin: Callable[[nn.Module, Tensor, Tensor], Tensor], forwards: int
) -> None:
    ours, theirs = conv_net(), conv_net()
    method, optimizer = rule(ours, sgd(ours), settings), sgd(theirs)
    x, y = batch()
    for seed in range(3):
        torch.manual_seed(seed)
        result = method.step(x, y)
        torch.manual_seed(seed)
        loss = twin(theirs, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=1e-12)
        assert result.logits.shape == (8, 5)
        assert not result.logits.requires_grad
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert ours[1].num_batches_tracked == 3 * forwards
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean, rtol=1e-10, atol=1e-12)


def test_trades_reports_its_two_terms() -> None:
    result = run("trades", conv_net(), *batch(), beta=3.0)
    metrics = result.metrics
    torch.testing.assert_close(result.loss, metrics["cross_entropy"] + 3.0 * metrics["kl"])
    assert metrics["kl"] > 0


def test_grad_align_leaves_out_samples_without_a_gradient() -> None:
    class Blind(nn.Module):
        """Sees nothing of a black image, nor of one near it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            seen = (x.flatten(1).mean(dim=1) > 0.2).to(x.dtype)
            return self.net[3:](self.net[0](x) * seen.view(-1, 1, 1, 1))

    model = Blind()
    x, y = batch()
    run("grad-align", model, x[1:], y[1:], penalty=0.0)
    x[0] = 0.0
    result = run("grad-align", model, x, y, penalty=5.0)
    assert 0.0 < result.metrics["cosine"] <= 1.0 + 1e-12
    used = [p.grad for p in model.net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in used)
    torch.testing.assert_close(
        result.loss, F.cross_entropy(result.logits, y) + 5 * (1 - result.metrics["cosine"])
    )

    x[:] = 0.0
    nothing = run("grad-align", model, x, y, penalty=5.0)
    assert nothing.metrics["cosine"] == 0.0
    assert nothing.loss.isfinite()


# ---- What every method owes its caller.


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_agrees_with_float32(name: str) -> None:
    x, y = batch(torch.float32, n=32)
    found = {}
    for precision in ("fp32", "bf16"):
        model = conv_net(torch.float32)
        result = run(name, model, x, y, precision=precision)
        found[precision] = gradient(model)
        assert result.loss.dtype == result.logits.dtype == found[precision].dtype == torch.float32
    assert not torch.equal(found["bf16"], found["fp32"])
    assert F.cosine_similarity(found["bf16"], found["fp32"], dim=0) > 0.98
    torch.testing.assert_close(found["bf16"].norm(), found["fp32"].norm(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_the_settings_whatever_autocast_surrounds_the_step(name: str, precision: str) -> None:
    """And no step sees the weights of an earlier one in the cache of a surrounding autocast."""
    x, y = batch(torch.float32)
    alone, surrounded = conv_net(torch.float32), conv_net(torch.float32)
    rule, settings = METHODS[name]

    def train(model: nn.Module) -> None:
        torch.manual_seed(0)
        method = rule(model, sgd(model), settings(precision=precision))
        for _ in range(2):
            method.step(x, y)

    train(alone)
    with torch.autocast("cpu", torch.bfloat16):
        train(surrounded)
    for p, q in zip(alone.parameters(), surrounded.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_and_strided_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    reference, plain_order, channels_last = conv_net(), conv_net(), conv_net()
    channels_last.to(memory_format=torch.channels_last)
    # Random numbers come in memory order: the same ones for all.
    noise = 0.03 * torch.randn_like(x)
    monkeypatch.setattr(ops, "random_start", lambda x, *_, **__: (x + noise).clamp(0.0, 1.0))
    monkeypatch.setattr(Tensor, "normal_", lambda self: self.copy_(noise))

    run(name, reference, x, y)
    run(name, plain_order, x.repeat_interleave(2, dim=0)[::2], y.repeat_interleave(2)[::2])
    run(name, channels_last, x.to(memory_format=torch.channels_last), y)
    for model in (plain_order, channels_last):
        torch.testing.assert_close(gradient(model), gradient(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_changes_nothing_but_the_weights(name: str) -> None:
    model = conv_net()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x)
    model[0].weight.requires_grad_(False)
    model[1].eval()  # a caller may hold a part in eval mode
    modes = [module.training for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch()
    x_before = x.clone()
    rule, settings = METHODS[name]
    rule(model, torch.optim.SGD(trainable, lr=0.05), settings()).step(x, y)

    assert [module.training for module in model.modules()] == modes
    assert [p for p in model.parameters() if p.requires_grad] == trainable
    assert torch.equal(x, x_before)
    assert not x.requires_grad
    assert model[1].num_batches_tracked == 0
    moved = {
        name for (name, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)
    }
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == graded == {"1.weight", "1.bias", "3.weight", "3.bias", "6.weight", "6.bias"}


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bits(name: str) -> None:
    x, y = batch(torch.float32)
    found = []
    for _ in range(2):
        model = conv_net(torch.float32)
        run(name, model, x, y, seed=7)
        found.append(gradient(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_an_earlier_step_are_replaced(name: str) -> None:
    x, y = batch()
    model = conv_net()
    state = copy.deepcopy(model.state_dict())
    run(name, model, x, y)
    first = gradient(model)
    model.load_state_dict(state)  # TRADES attacks with the running statistics
    run(name, model, x, y)
    assert torch.equal(gradient(model), first)


@pytest.mark.parametrize("name", METHODS)
def test_vectors_and_tabular_inputs(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    run(name, model, torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            torch.rand(2, 3, 8, 8),
            torch.zeros(3).long(),
            ValueError,
            r"^y must have shape \(2,\) to fit x, got \(3,\)",
        ),
        (
            torch.rand(2, 3, 8, 8),
            torch.zeros(2, 5),
            TypeError,
            r"^y must be class labels, torch.int64, got .*float32",
        ),
        (
            torch.rand(2, 3, 8, 8).half(),
            torch.zeros(2).long(),
            TypeError,
            r"^x must be torch.float32 .*, got .*float16",
        ),
        (torch.rand(()), torch.zeros(()).long(), ValueError, r"^x must be a batch, .*, got shape \(\)"),
        (torch.rand(0, 3), torch.zeros(0).long(), ValueError, r"^x must be a batch, \[N, ...\] with N >= 1"),
    ],
)
def test_bad_batches(x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    model = conv_net(torch.float32)
    with pytest.raises(error, match=message):
        Plain(model, sgd(model), PlainSettings()).step(x, y)


def test_bad_arguments() -> None:
    model = conv_net()
    with pytest.raises(TypeError, match=r"^settings must be of type FastATSettings, got PlainSettings"):
        FastAT(model, sgd(model), PlainSettings())
    with pytest.raises(TypeError, match=r"^optimizer must be of type Optimizer, got function"):
        FastAT(model, sgd, FastATSettings())
    with pytest.raises(TypeError, match=r"^model must be of type Module"):
        FastAT(None, sgd(model), FastATSettings())


@pytest.mark.parametrize(
    ("settings", "words", "error", "message"),
    [
        (FastATSettings, {"eps": -0.1}, ValueError, r"^eps must be a finite number >= 0, got -0.1"),
        (FastATSettings, {"eps": math.nan}, ValueError, r"^eps must be .*, got nan"),
        (FastATSettings, {"eps": "8/255"}, TypeError, r"^eps must be .*, got '8/255'"),
        (FastATSettings, {"eps": True}, TypeError, r"^eps must be .*, got True"),
        (PGDATSettings, {"step_size": -1.0}, ValueError, r"^step_size must be .*, got -1.0"),
        (PGDATSettings, {"attack_steps": 0}, ValueError, r"^attack_steps must be an integer >= 1, got 0"),
        (TRADESSettings, {"beta": -1.0}, ValueError, r"^beta must be .*, got -1.0"),
        (GradAlignSettings, {"penalty": math.inf}, ValueError, r"^penalty must be .*, got inf"),
        (
            FastATSettings,
            {"clip_min": 1.0, "clip_max": 0.0},
            ValueError,
            r"^clip_min must be less than clip_max",
        ),
        (FastATSettings, {"clip_max": math.inf}, ValueError, r"^clip_max must be a finite number, got inf"),
        (PlainSettings, {"precision": "fp16"}, ValueError, r"^precision must be one of .*did you mean"),
        (
            PlainSettings,
            {"precision": None},
            ValueError,
            r"^precision must be one of 'fp32', 'bf16', got None",
        ),
    ],
)
def test_bad_settings(settings: type, words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings(**words)


def test_default_step_sizes() -> None:
    assert FastATSettings(eps=0.1).attack_step_size == 1.25 * 0.1
    assert NFGSMATSettings(eps=0.1).attack_step_size == 0.1
    assert PGDATSettings(eps=0.1).attack_step_size == 0.1 / 2
    assert PGDATSettings(eps=8 / 255, attack_steps=10).attack_step_size == 2 / 255
    assert TRADESSettings(eps=8 / 255).attack_step_size == 2 / 255
    assert PGDATSettings(step_size=0.3).attack_step_size == 0.3


def test_alignment_penalty_is_the_released_table() -> None:
    table = {2: 0.036, 4: 0.063, 6: 0.112, 8: 0.2, 10: 0.356, 12: 0.632, 14: 1.124, 16: 2.0}
    table |= {25.5: 2.0, 51: 2.0}  # the exponential would give 31 and 47431
    for eps, penalty in table.items():
        assert GradAlignSettings(eps=eps / 255).alignment_penalty == pytest.approx(penalty, abs=1e-3)
    assert GradAlignSettings(penalty=0.7).alignment_penalty == 0.7


def test_methods_pair_rules_with_their_settings() -> None:
    assert set(METHODS) == {"plain", "fast-at", "fast-bat", "grad-align", "n-fgsm", "pgd", "trades"}
    model = conv_net()
    for rule, settings in METHODS.values():
        assert rule(model, sgd(model), settings()).settings == settings()

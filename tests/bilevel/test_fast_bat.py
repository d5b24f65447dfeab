"""FastBAT against a twin of the released sequence, the true total derivative, and its budget of sweeps."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blokern import ops
from blokern.bilevel import FastBAT, FastBATSettings


def conv_net(norm: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=not norm), norms[0], nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(n) % 5


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def gradients(model: nn.Module, x: Tensor, y: Tensor, settings: FastBATSettings, seed: int = 0) -> Tensor:
    """The gradient that a step leaves, with the weights held still."""
    rule = FastBAT(model, torch.optim.SGD(model.parameters(), lr=0.0), settings)
    torch.manual_seed(seed)
    rule.step(x, y)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@dataclass
class Released:
    """The released code's order: all attack graphs kept, and one more forward for the weight gradient."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    eps: float
    a: float
    lam: float
    attack_steps: int

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        delta = torch.clamp(delta, -self.eps, self.eps)
        return torch.maximum(torch.minimum(delta, 1.0 - x), 0.0 - x)

    def step(self, x: Tensor, y: Tensor) -> None:
        parameters = list(self.model.parameters())
        z = ops.random_start(x, self.eps) - x
        for _ in range(self.attack_steps):
            z = z.detach().requires_grad_()
            attack_loss = -F.cross_entropy(self.model(x + z), y, reduction="sum")
            (g,) = torch.autograd.grad(attack_loss, z, create_graph=True)
            delta = self.project(z - self.a * g, x).detach()
            last_g, z = g, delta

        upper, lower = torch.clamp(1.0 - x, max=self.eps), torch.clamp(-x, min=-self.eps)
        inside = (lower < delta) & (delta < upper)
        delta.requires_grad_()
        (v,) = torch.autograd.grad(F.cross_entropy(self.model(x + delta), y, reduction="sum"), delta)
        inner = (last_g * (inside * v / self.lam)).sum()
        cross = torch.autograd.grad(inner, parameters, allow_unused=True)

        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x + delta.detach()), y).backward()
        for p, c in zip(parameters, cross, strict=True):
            if c is not None:
                p.grad -= c / len(x)
        self.optimizer.step()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("attack_steps", [1, 2, 3])
@pytest.mark.parametrize(("eps", "a"), [(8 / 255, 0.5), (0.3, 0.1)])
@pytest.mark.parametrize("lam", [10.0, 0.0, math.inf])
def test_weights_equal_the_released_sequence(
    norm: bool, attack_steps: int, eps: float, a: float, lam: float
) -> None:
    ours, theirs = conv_net(norm), conv_net(norm)
    settings = FastBATSettings(eps=eps, step_size=a, attack_steps=attack_steps, lam=lam)
    rule = FastBAT(ours, sgd(ours), settings)
    twin = Released(theirs, sgd(theirs), eps, a, 1 / a if lam == 0 else lam, attack_steps)
    x, y = batch()
    for seed in range(4):
        torch.manual_seed(seed)
        rule.step(x, y)
        torch.manual_seed(seed)
        twin.step(x, y)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    if norm:
        assert ours[1].num_batches_tracked == 4 * (attack_steps + 1)
        assert theirs[1].num_batches_tracked == 4 * (attack_steps + 2)


@pytest.mark.parametrize(("eps", "a"), [(3.0, 1.0), (0.02, 1.0)])
def test_gradient_is_the_total_derivative_of_the_objective(eps: float, a: float) -> None:
    """With λ = 1/a, θ.grad is d/dθ of θ ↦ ℓ_tr(θ, x + P(z + a ∇ΣCE(θ, x + z))) at fixed z."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 5)).double()
    x, y = batch()
    low, high = -100.0, 101.0
    torch.manual_seed(5)
    z = ops.random_start(x, eps, clip_min=low, clip_max=high) - x

    def objective() -> Tensor:
        at = (x + z).requires_grad_()
        loss = F.cross_entropy(model(at), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, at, create_graph=True)
        return F.cross_entropy(model(x + (z + a * g).clamp(-eps, eps)), y)

    total = torch.cat([g.flatten() for g in torch.autograd.grad(objective(), list(model.parameters()))])
    common = {"eps": eps, "step_size": a, "attack_steps": 1, "clip_min": low, "clip_max": high}
    ours = gradients(model, x, y, FastBATSettings(lam=0.0, **common), seed=5)
    torch.testing.assert_close(ours, total, rtol=1e-10, atol=1e-13)

    torch.manual_seed(5)
    rule = FastBAT(model, torch.optim.SGD(model.parameters(), lr=0.0), FastBATSettings(lam=0.0, **common))
    measured = rule.step(x, y).metrics["free"]
    assert 0.9 < measured <= 1.0 if eps == 3.0 else 0.1 < measured < 0.9, measured

    h, direction = 1e-7, torch.randn_like(total)  # small: P has kinks
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(theta + sign * h * direction, model.parameters())
        values.append(objective().detach())
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), ours @ direction, rtol=1e-5, atol=1e-8)

    nn.utils.vector_to_parameters(theta, model.parameters())
    without = gradients(model, x, y, FastBATSettings(lam=math.inf, **common), seed=5)
    assert (ours - without).norm() > 1e-2 * without.norm(), (
        "the implicit term is too small to have been tested"
    )


class Convolutions(TorchDispatchMode):
    """Counts convolution sweeps: "out" forward-like ones, "input" and "weight" gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution.default:
            self.count["out"] += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.count["input"] += args[-1][0]
            self.count["weight"] += args[-1][1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lam", [10.0, math.inf])
def test_a_step_is_the_least_number_of_sweeps(lam: float) -> None:
    torch.manual_seed(0)
    depth = 5
    convolutions = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)]
    layers = [layer for conv in convolutions for layer in (conv, nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 5)).double()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(model[0].weight.requires_grad))
    x, y = batch()
    rule = FastBAT(model, sgd(model), FastBATSettings(lam=lam))
    with Convolutions() as convolutions:
        rule.step(x, y)
    assert forwards == [False, lam != math.inf, True], "an attack keeps what only weight gradients need"
    # 2k + 7 or 2k + 3 sweeps; the last backward of the latter needs no input gradient of the first layer.
    if lam == math.inf:
        assert convolutions.count == {"out": 3 * depth, "input": 3 * depth - 1, "weight": depth}
    else:  # the mixed product's own sweep back needs no input gradient of the first layer either
        assert convolutions.count == {"out": 4 * depth, "input": 4 * depth - 1, "weight": 3 * depth}


def test_result_is_detached_and_taken_at_the_trained_point() -> None:
    model = conv_net(norm=False)
    x, y = batch()
    result = FastBAT(model, torch.optim.SGD(model.parameters(), lr=0.0), FastBATSettings()).step(x, y)
    assert not result.loss.requires_grad
    assert result.logits.shape == (8, 5)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, y))
    assert result.loss > F.cross_entropy(model(x), y)
    assert 0.0 <= result.metrics["free"] <= 1.0


def test_frozen_unused_and_tied_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.body = nn.Conv2d(4, 4, 3, padding=1)
            self.tied = nn.Conv2d(4, 4, 3, padding=1)
            self.tied.weight = self.body.weight
            self.unused = nn.Linear(4, 4)
            self.head = nn.Linear(256, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.tied(self.body(self.stem(x).tanh()).tanh()).tanh()
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    model, twin = Net().double(), Net().double()
    twin.load_state_dict(model.state_dict())
    frozen = model.stem.weight
    frozen.requires_grad_(False)
    frozen.grad = torch.ones_like(frozen)
    before = frozen.clone()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p is not frozen]
    x, y = batch()
    FastBAT(model, optimizer, FastBATSettings(step_size=0.5, lam=0.0)).step(x, y)
    assert torch.equal(frozen, before)
    assert torch.equal(frozen.grad, torch.ones_like(frozen))
    assert model.unused.weight.grad is None

    # The other parameters' gradients do not notice, and a tied weight's is the sum over its uses.
    model.load_state_dict(twin.state_dict())
    ours = dict(model.named_parameters())
    gradients(model, x, y, FastBATSettings(step_size=0.5, lam=0.0), seed=3)
    got = {name: p.grad for name, p in ours.items() if p.requires_grad and p.grad is not None}
    torch.manual_seed(3)
    used = [p for name, p in twin.named_parameters() if not name.startswith("unused")]
    released = Released(twin, torch.optim.SGD(used, lr=0.0), 8 / 255, 0.5, 2.0, 2)
    released.step(x, y)
    for name, p in twin.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-10, atol=1e-12)
    assert set(got) == {"stem.bias", "body.weight", "body.bias", "tied.bias", "head.weight", "head.bias"}


def test_bfloat16_agrees_with_float32_cross_term_included() -> None:
    model = conv_net(norm=True, dtype=torch.float32)
    x, y = batch(torch.float32, n=32)
    # One step, so that both precisions linearise at the same z.
    common = {"eps": 0.1, "step_size": 0.5, "attack_steps": 1}
    full, implicit = {}, {}
    for precision in ("fp32", "bf16"):
        full[precision] = gradients(model, x, y, FastBATSettings(lam=0.0, precision=precision, **common))
        without = gradients(model, x, y, FastBATSettings(lam=math.inf, precision=precision, **common))
        implicit[precision] = full[precision] - without
    assert full["bf16"].dtype == torch.float32
    assert not torch.equal(full["bf16"], full["fp32"])
    assert F.cosine_similarity(full["bf16"], full["fp32"], dim=0) > 0.995
    assert implicit["fp32"].norm() > 0.05 * full["fp32"].norm()
    assert F.cosine_similarity(implicit["bf16"], implicit["fp32"], dim=0) > 0.97
    torch.testing.assert_close(implicit["bf16"].norm(), implicit["fp32"].norm(), rtol=0.05, atol=0.0)


def test_channels_last_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    start = (x + 0.03 * torch.randn_like(x)).clamp(0.0, 1.0)  # random numbers come in memory order
    monkeypatch.setattr(ops, "random_start", lambda *_, **__: start.clone())
    settings = FastBATSettings(step_size=0.5, lam=0.0)
    expected = gradients(conv_net(norm=True), x, y, settings)
    model = conv_net(norm=True).to(memory_format=torch.channels_last)
    ours = gradients(model, x.to(memory_format=torch.channels_last), y, settings)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("lam", [0.0, math.inf])
def test_compiled_models_train_alike(in_place: bool, lam: float) -> None:
    class Net(nn.Module):  # torch.nn's own containers are not compiled in place
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_net(norm=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    x, y = batch()
    settings = FastBATSettings(step_size=0.5, lam=lam)
    expected = gradients(Net(), x, y, settings)
    model, graphs = Net(), CompileCounterWithBackend("aot_eager")
    if in_place:
        model.compile(backend=graphs)
    else:
        model = torch.compile(model, backend=graphs)
    # Before torch 2.13 graphs take no note of parameters that are frozen no more.
    if lam == 0.0 and torch.__version__ < (2, 13):
        with pytest.raises(RuntimeError, match="no parameter of the model got a gradient"):
            gradients(model, x, y, settings)
        return
    torch.testing.assert_close(gradients(model, x, y, settings), expected, rtol=1e-9, atol=1e-12)
    assert graphs.frame_count > 0


def test_a_model_that_ignores_its_parameters_is_refused() -> None:
    class Deaf(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input.flatten(1)[:, :5]

    x, y = batch()
    model = Deaf(1, 1).double()
    with pytest.raises(RuntimeError, match="no parameter of the model got a gradient"):
        FastBAT(model, sgd(model), FastBATSettings(lam=0.2)).step(x, y)


def test_same_seed_same_bits() -> None:
    x, y = batch(torch.float32)
    runs = []
    for _ in range(2):
        model = conv_net(norm=True, dtype=torch.float32)
        rule = FastBAT(model, sgd(model), FastBATSettings())
        torch.manual_seed(11)
        for _ in range(3):
            rule.step(x, y)
        runs.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*runs)


def test_default_step_sizes_and_lam() -> None:
    assert FastBATSettings(eps=8 / 255).attack_step_size == 5000 / 255
    assert FastBATSettings(eps=16 / 255).attack_step_size == 2000 / 255
    assert FastBATSettings(step_size=4.0).attack_step_size == 4.0
    assert FastBATSettings(step_size=4.0, lam=0.0).implicit_lam == 0.25
    assert FastBATSettings().implicit_lam == 10.0


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, r"^lam must be a number >= 0 .*, got -1.0"),
        ({"lam": math.nan}, ValueError, r"^lam must be .*, got nan"),
        ({"step_size": 0.0}, ValueError, r"^step_size must be a finite number > 0, .*, got 0.0"),
        ({"attack_steps": 0}, ValueError, r"^attack_steps must be an integer >= 1, got 0"),
        ({"attack_steps": 1.5}, ValueError, r"^attack_steps must be .*, got 1.5"),
    ],
)
def test_bad_settings(setting: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastBATSettings(**setting)

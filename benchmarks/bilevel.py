"""One training step of every method over a standard step of the same network, batch and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import images, network
from blokern import bilevel, keep_freed_memory
from blokern._race import Case

EPS = 8 / 255
BATCH = 64


def released_fast_bat(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Fast-BAT in the order of its released code: four forwards, a graph kept at z, ∂δ and ∂θ taken apart."""
    a, lam = 5000 / 255, 10.0
    parameters = list(model.parameters())

    def attack_loss(point: Tensor) -> Tensor:
        return -F.cross_entropy(model(point), y, reduction="sum")

    def closed_form(z: Tensor, grad: Tensor) -> Tensor:
        delta = torch.clamp(z - a * grad, -EPS, EPS)
        return torch.max(torch.min(delta, 1 - x), 0 - x).detach()

    z = (torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0, 1) - x).requires_grad_()
    z = closed_form(z, torch.autograd.grad(attack_loss(x + z), z)[0]).requires_grad_()
    (g1,) = torch.autograd.grad(attack_loss(x + z), z, create_graph=True)
    delta = closed_form(z, g1).requires_grad_()
    low, high = torch.clamp(0 - x, min=-EPS), torch.clamp(1 - x, max=EPS)
    free = (delta > low + 1e-7) & (delta < high - 1e-7)
    (v,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y, reduction="sum"), delta)
    cross = torch.autograd.grad(g1, parameters, grad_outputs=free * v / lam)
    optimizer.zero_grad()
    F.cross_entropy(model(x + delta.detach()), y).backward()
    for parameter, term in zip(parameters, cross, strict=True):
        assert parameter.grad is not None
        parameter.grad.sub_(term, alpha=1 / len(x))
    optimizer.step()


def _step_of(method: str, x: Tensor, y: Tensor, precision: str = "fp32") -> Callable[[], object]:
    model, optimizer = network("preact_resnet18", x)
    rule_type, settings_type = bilevel.METHODS[method]
    options = {"precision": precision} | ({} if method == "plain" else {"eps": EPS})
    rule = rule_type(model, optimizer, settings_type(**options))
    return lambda: rule.step(x, y)


def cases() -> Iterator[Case]:
    keep_freed_memory()  # as `blokern train` does; it serves every rival
    x, y = images(BATCH)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    released_model, released_optimizer = network("preact_resnet18", x)
    rivals: dict[str, Callable[[], object]] = {
        "standard step": _step_of("plain", x, y),
        **{f"{name}": _step_of(name, x, y) for name in bilevel.METHODS if name != "plain"},
        "fast-bat, released sequence": lambda: released_fast_bat(released_model, released_optimizer, x, y),
        "standard step, channels_last": _step_of("plain", nhwc, y),
        "fast-bat, channels_last": _step_of("fast-bat", nhwc, y),
        "standard step, bf16": _step_of("plain", x, y, "bf16"),
        "fast-bat, bf16": _step_of("fast-bat", x, y, "bf16"),
        "standard step, bf16, channels_last": _step_of("plain", nhwc, y, "bf16"),
        "fast-bat, bf16, channels_last": _step_of("fast-bat", nhwc, y, "bf16"),
    }
    yield Case(f"Training step, preact_resnet18, batch {BATCH}", rivals, ours="standard step", memory=True)

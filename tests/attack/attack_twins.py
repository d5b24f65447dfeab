"""What the attacks are tested against: the papers' text, a sample at a time; and small networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]  # of one point [1, ...], a scalar to climb


def small_net(seed: int = 0, classes: int = 6, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Smooth and kinked units, BatchNorm and dropout, for images [N, 3, 8, 8]; in eval mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, classes),
    )
    for p in net.parameters():
        p.data *= 2.0  # far enough from linear that an attack has to turn
    return net.to(dtype).eval()


def images(net: nn.Module, n: int = 24, wrong: float = 0.0, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Uniform images with the net's own predictions for labels, a share `wrong` of them changed."""
    dtype = next(net.parameters()).dtype
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        logits = net(x)
    y = logits.argmax(1)
    y[: int(wrong * n)] = (y[: int(wrong * n)] + 1) % logits.shape[1]
    return x, y


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm((x_adv - x).flatten(1).double(), order, dim=1)


def direction(g: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return g.sign()
    return g / (g.norm() if norm == "l2" else g.abs().sum())


def projection(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    d = z - x
    if norm == "linf":
        return (x + d.clamp(-eps, eps)).clamp(0, 1)
    if norm == "l2":
        return (x + d * min(1.0, eps / float(d.norm()))).clamp(0, 1) if bool(d.any()) else z.clamp(0, 1)

    def shrunk(t: float) -> Tensor:
        return (x + d.sign() * (d.abs() - t).clamp(min=0)).clamp(0, 1) - x

    if float(shrunk(0).abs().sum()) <= eps:
        return x + shrunk(0)
    low, high = 0.0, float(d.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shrunk(middle).abs().sum()) > eps else (low, middle)
    return x + shrunk(high)


def value_and_gradient(loss: Loss, point: Tensor) -> tuple[float, Tensor]:
    point = point.clone().requires_grad_()
    value = loss(point)
    (g,) = torch.autograd.grad(value, point)
    return value.item(), g


def pgd(
    loss: Loss, x: Tensor, start: Tensor, eps: float, step_size: float, steps: int, norm: str
) -> list[Tensor]:
    """All points, the start included."""
    points = [start]
    for _ in range(steps):
        _, g = value_and_gradient(loss, points[-1])
        points.append(projection(points[-1] + step_size * direction(g, norm), x, eps, norm))
    return points


def apgd(loss: Loss, x: Tensor, start: Tensor, eps: float, steps: int, norm: str) -> list[Tensor]:
    """All points, the start included. Croce & Hein 2020, Algorithm 1 with ρ = 0.75, α = 0.75."""
    share, last_share, checkpoints = 0.22, 0.0, [0]
    if steps == 100:  # the paper's formula; below it truncates badly, and the twin is run at 100 only
        while round(share * steps) <= steps:
            checkpoints.append(round(share * steps))
            share, last_share = share + max(share - last_share - 0.03, 0.06), share
    eta, halved = 2 * eps, True
    points, values = [start], []
    f, g = value_and_gradient(loss, start)
    values.append(f)
    best, f_best, g_best, f_checked = start, f, g, f
    before = start
    for k in range(steps):
        here = points[-1] if k not in checkpoints[1:] or not halved else best
        z = projection(here + eta * direction(g, norm), x, eps, norm)
        if k > 0:
            z = projection(here + 0.75 * (z - here) + 0.25 * (here - before), x, eps, norm)
        before = here
        points.append(z)
        f, g = value_and_gradient(loss, z)
        values.append(f)
        if f > f_best:
            best, f_best, g_best = z, f, g
        if k + 1 in checkpoints:
            since = checkpoints[checkpoints.index(k + 1) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(since, k + 1))
            halved = rises <= 0.75 * (k + 1 - since) or (not halved and f_checked >= f_best)
            f_checked = f_best
            if halved:
                eta, g = eta / 2, g_best
    return points


def apgd_l1(loss: Loss, x: Tensor, start: Tensor, eps: float, steps: int) -> list[Tensor]:
    """All points, the start included. Croce & Hein 2021, the single-radius L1 attack."""
    size, every = x.numel(), max(int(0.04 * steps), 1)
    keep, sparsity, eta = math.ceil(0.2 * size), size, eps
    points, here = [start], start
    f, g = value_and_gradient(loss, start)
    best, f_best, g_best = start, f, g
    for k in range(steps):
        largest = g.abs().flatten().sort(descending=True).values[keep - 1]
        sign = g.sign() * (g.abs() >= largest)
        here = projection(here + eta * sign / sign.abs().sum(), x, eps, "l1")
        points.append(here)
        f, g = value_and_gradient(loss, here)
        if f > f_best:
            best, f_best, g_best = here, f, g
        if (k + 1) % every == 0:
            found = int((best != x).sum())
            if found < 0.95 * sparsity:
                eta, here, g = eps, best, g_best
            else:
                eta = max(eta / 1.5, eps / 10)
            keep, sparsity = max(math.ceil(found / 1.5), 1), found
    return points


def seen_by(net: nn.Module, call: Callable[[], object], early_stop: bool = False) -> list[Tensor]:
    """The inputs that the net gets while `call` runs; without the questions, about four images at most, that early_stop
    begins with."""
    inputs: list[Tensor] = []
    hook = net.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    try:
        call()
    finally:
        hook.remove()
    asked = 0 if not early_stop else 4 if len(inputs[0]) == 4 else 3
    return inputs[asked:]

"""Random small networks, of what people write: layers, functions in and out of place, views, buffers, hooks,
checkpoints, tied and shared weights, custom Functions, parents that read a child's weight, outputs of several kinds.

A network is a sequence of steps, drawn one after another to fit what the ones before return. Steps are modules, so
that a network can be copied, and its forward is ordinary Python.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from arbitrary import Draw
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SAMPLES, CLASSES = 3, 4

# ---- Functions, by the name that a failing network prints.


def _unsqueezed_in_place(x: Tensor) -> Tensor:
    y = 1.0 * x
    y.unsqueeze_(1)
    return y.squeeze_(1)


def _transposed_in_place(x: Tensor) -> Tensor:
    y = 1.0 * x
    return y.transpose_(0, 1).transpose_(0, 1)


def _slice_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :1] = y[:, -1:] * 2
    return y


def _part_scaled_in_place(x: Tensor) -> Tensor:
    y = 1.0 * x
    y[:, 0].mul_(0.5)
    return y


def _read_then_written(x: Tensor) -> Tensor:
    y = 1.0 * x
    kept = y + 1
    y.add_(1.0)
    return kept * 0.5 + y


def _shuffled(x: Tensor) -> Tensor:
    channels = x.shape[1]
    groups = 2 if channels % 2 == 0 else 1
    return x.unflatten(1, (groups, channels // groups)).transpose(1, 2).flatten(1, 2)


def _gated_by_mean(x: Tensor) -> Tensor:
    dims = tuple(range(2, x.dim())) or (1,)
    return x * x.mean(dims, keepdim=True).sigmoid()


def _scaled_without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 / (1 + x.abs().mean())
    return x * scale


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_": lambda x: (1.0 * x).relu_(),
    "F.relu(inplace)": lambda x: F.relu(x + 0.1, inplace=True),
    "tanh": torch.tanh,
    "tanh_": lambda x: (1.0 * x).tanh_(),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu_": lambda x: F.elu(x * 1.0, inplace=True),
    "leaky_relu": F.leaky_relu,
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 0.9),
    "softplus": F.softplus,
    "square": lambda x: 0.3 * x.square(),
    "abs": lambda x: (x + 0.01).abs(),
    "sqrt": lambda x: (x.square() + 0.5).sqrt(),
    "exp": lambda x: x.clamp(-2, 2).exp(),
    "log": lambda x: (1 + x.abs()).log(),
    "i0e": torch.special.i0e,  # without a rule
    "erf": torch.erf,
    "sin": torch.sin,
    "softmax": lambda x: x.softmax(1) * 2,
    "log_softmax": lambda x: x.log_softmax(1) * 0.5,
    "normalized": lambda x: F.normalize(x, dim=1),
    "add_": lambda x: (1.0 * x).add_(0.5),
    "mul_": lambda x: (1.0 * x).mul_(0.5),
    "div": lambda x: x / (1 + x.detach().abs()),
    "unsqueeze_, squeeze_": _unsqueezed_in_place,
    "transpose_ twice": _transposed_in_place,
    "y[:, :1] = ...": _slice_written,
    "y[:, 0].mul_": _part_scaled_in_place,
    "read, then written": _read_then_written,
    "x[...]": lambda x: x[...],
    "x[:, :]": lambda x: x[:, :],
    "x.view_as": lambda x: x.contiguous().view_as(x),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "chunk, cat": lambda x: torch.cat([part * (1 + i) for i, part in enumerate(x.chunk(2, 1))], 1),
    "unbind, stack": lambda x: torch.stack([part * (1 + i) for i, part in enumerate(x.unbind(1))], 1),
    "split, added": lambda x: x + sum(part.sum(1, keepdim=True) for part in x.split(1, 1)) * 0.1,
    "channels shuffled": _shuffled,
    "gated by its mean": _gated_by_mean,
    "index_select": lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0)),
    "masked_fill": lambda x: x.masked_fill(x.detach() > 0.5, 0.25),
    "where": lambda x: torch.where(x > 0, x, 0.2 * x.square()),
    "cumsum": lambda x: x.cumsum(1) * 0.5,
    "amax": lambda x: x - 0.5 * x.amax(1, keepdim=True),
    "var": lambda x: x / (x.var(1, keepdim=True, correction=0) + 1).sqrt(),
    "einsum": lambda x: x + 0.1 * torch.einsum("nc...,nd...->nc...", x, x),
    "no_grad": _scaled_without_gradient,
    "clone": torch.clone,
    "double": lambda x: x.to(torch.float64),
}
IMAGE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2, 1, padding=1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "interpolate": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=4),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "flattened": lambda x: (x.flatten(2) * 2).view(x.shape),
    "pixel_shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2) if x.shape[1] % 4 == 0 else x,
    "x.mean(3).mean(2)": lambda x: x + x.mean(3).mean(2)[:, :, None, None],
}


class _MarksDirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3.0 * grad


class _Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad * ctx.saved_tensors[0]


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


FUNCTIONS |= {
    "Function: mark_dirty": lambda x: _MarksDirty.apply(1.0 * x),
    "Function: doubles": _Doubles.apply,
    "Function: once_differentiable": _Once.apply,
    "Function: an alias, gradient reversed": _Alias.apply,
}

# ---- Steps.


class Apply(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return (FUNCTIONS | IMAGE_FUNCTIONS)[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Joined(nn.Module):
    """A branch, and how it meets what went around it."""

    def __init__(self, branch: nn.Module, way: str) -> None:
        super().__init__()
        self.branch, self.way = branch, way

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        if self.way == "cat" or y.shape != x.shape:
            return torch.cat([x, y], 1) if y.shape[2:] == x.shape[2:] else y
        if self.way == "+=":
            y = 1.0 * y
            y += x
            return y
        return x + y if self.way == "+" else x * y

    def extra_repr(self) -> str:
        return self.way


class Twice(nn.Module):
    """One module, called twice where its output can be its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return self.inner(y) if y.shape == x.shape else y  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """A part that a backward pass runs again; not where `again` is False, for an oracle."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.again = inner, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.again:
            return self.inner(x)  # type: ignore[no-any-return]
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class ReadsWeight(nn.Module):
    """A parent that uses its child's parameters instead of calling it."""

    def __init__(self, child: nn.Module, transposed: bool) -> None:
        super().__init__()
        self.child, self.transposed = child, transposed

    def forward(self, x: Tensor) -> Tensor:
        weight = self.child.weight
        if weight.dim() == 4:
            return F.conv2d(x, weight, self.child.bias, padding=self.child.padding)
        y = F.linear(x.movedim(1, -1), weight, self.child.bias)
        if self.transposed:  # as an autoencoder with tied weights
            y = F.linear(y.tanh(), weight.t())
        return y.movedim(-1, 1)


class Clamped(nn.Linear):
    """A layer that keeps its weight small itself, past autograd."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.4, 0.4)
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Of contiguous inputs: torch 2.13's own backward pass of others (channels innermost) may crash the process."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous())


class Buffered(nn.Module):
    """A constant, a count and a running mean."""

    def __init__(self, channels: int, reassigned: bool) -> None:
        super().__init__()
        self.reassigned = reassigned
        self.register_buffer("scale", torch.linspace(0.5, 1.5, channels, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = x * self.scale.view(shape) - 0.1 * self.average.view(shape)
        if self.training:
            self.count += 1
            mean = x.detach().movedim(1, 0).flatten(1).mean(1)
            if self.reassigned:
                self.average = 0.9 * self.average + 0.1 * mean
            else:
                self.average.mul_(0.9).add_(0.1 * mean)
        return y


class Output(nn.Module):
    """Logits, alone or in what people return them in."""

    def __init__(self, body: nn.Module, head: nn.Module, form: str) -> None:
        super().__init__()
        self.body, self.head, self.form = body, head, form

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        logits = self.head(h.flatten(1))
        if self.form == "tuple":
            return h, logits
        if self.form == "dict":
            return {"logits": logits, "hidden": h}
        return SimpleNamespace(logits=logits) if self.form == "object" else logits

    def extra_repr(self) -> str:
        return self.form


def logits_of(output: Any) -> Tensor:
    if isinstance(output, tuple):
        output = output[1]
    elif isinstance(output, dict):
        output = output["logits"]
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def loss_fn(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), y)


# ---- Drawing.


def network(
    draw: Draw, forms: tuple[str, ...] = ("tensor", "tensor", "tuple", "dict")
) -> tuple[Output, Tensor, Tensor]:
    """A network in float64, its input [N, C] or [N, C, H, W], and labels."""
    torch.manual_seed(draw.source.getrandbits(32))
    size = (
        (SAMPLES, draw.source.randint(1, 3), 5, 5)
        if draw.chance(0.6)
        else (SAMPLES, draw.source.randint(2, 6))
    )
    x = torch.rand(size, dtype=torch.float64)
    body, h = sequence(draw, x, draw.source.randint(2, 7), depth=0)
    head = nn.Linear(h.flatten(1).shape[1], CLASSES, dtype=torch.float64)
    return Output(body, head, draw.one_of(forms)), x, torch.arange(SAMPLES) % CLASSES


def sequence(draw: Draw, x: Tensor, length: int, depth: int) -> tuple[nn.Sequential, Tensor]:
    """Steps for x, and what they make of it."""
    steps = nn.Sequential()
    for _ in range(length):
        step = _step(draw, x, depth).double()
        with torch.no_grad():
            try:
                found = step(x.clone())
            except RuntimeError:  # a plane that is too small for its window
                continue
        if found.numel() and found.numel() < 2000 and found.dim() == x.dim() and bool(found.isfinite().all()):
            steps.append(step)
            x = found
    return steps, x


def _step(draw: Draw, x: Tensor, depth: int) -> nn.Module:
    kind = draw.source.random()
    if kind < 0.4:
        return _hooked(draw, _layer(draw, x))
    if kind < 0.75 or depth == 2:
        names = [*FUNCTIONS, *IMAGE_FUNCTIONS] if x.dim() == 4 else [*FUNCTIONS]
        return Apply(draw.one_of(names))
    if kind < 0.8:
        return Buffered(x.shape[1], draw.chance(0.5))
    if kind < 0.85:
        return ReadsWeight(_product(draw, x), draw.chance(0.3))
    inner, _ = sequence(draw, x, draw.source.randint(1, 3), depth + 1)
    if kind < 0.93:
        return Joined(inner, draw.one_of(("+", "+=", "*", "cat")))
    if kind < 0.96 and not any(map(_changes, inner.modules())):
        return Checkpointed(inner)
    return Twice(inner)


def _changes(module: nn.Module) -> bool:
    """Whether a module answers otherwise when it runs again."""
    return isinstance(module, Buffered) or hasattr(module, "_power_method")


def _layer(draw: Draw, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    if draw.chance(0.6):
        return _product(draw, x)
    if x.dim() == 2:
        norms: list[Callable[[], nn.Module]] = [
            lambda: nn.BatchNorm1d(channels, affine=draw.chance(0.8)),
            lambda: nn.LayerNorm(channels, bias=draw.chance(0.7)),
            lambda: GroupNorm(1, channels),
        ]
    else:
        norms = [
            lambda: nn.BatchNorm2d(channels, affine=draw.chance(0.8)),
            lambda: nn.BatchNorm2d(channels, track_running_stats=False),
            lambda: GroupNorm(draw.one_of([g for g in (1, 2, channels) if channels % g == 0]), channels),
            lambda: nn.LayerNorm(x.shape[1:]),
        ]
    others: list[Callable[[], nn.Module]] = [
        lambda: (
            nn.ReLU(inplace=draw.chance(0.5)) if draw.chance(0.5) else nn.PReLU(draw.one_of((1, channels)))
        ),
        nn.Identity,
        lambda: nn.Dropout(0.3),
        lambda: Clamped(channels, draw.source.randint(1, 4)),
    ]
    return draw.one_of(norms + others)()


def _product(draw: Draw, x: Tensor) -> nn.Module:
    channels, out, bias = x.shape[1], draw.source.randint(1, 6), draw.chance(0.7)
    if x.dim() == 2:
        return nn.Linear(channels, out if draw.chance(0.6) else channels, bias)
    kind = draw.source.random()
    if kind < 0.15:
        return nn.ConvTranspose2d(channels, out, 2, draw.one_of((1, 2)), bias=bias)
    size = draw.one_of((1, 2, 3))
    groups = channels if kind < 0.3 else 1
    wide = channels * draw.one_of((1, 2)) if groups > 1 or draw.chance(0.4) else out
    return nn.Conv2d(channels, wide, size, draw.one_of((1, 1, 2)), size // 2, groups=groups, bias=bias)


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


def _reversed(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else -g for g in grad_input)


def _hooked(draw: Draw, layer: nn.Module) -> nn.Module:
    if draw.chance(0.06):
        layer.register_forward_hook(_doubled)
    if draw.chance(0.03):
        layer.register_full_backward_hook(_reversed)
    if draw.chance(0.04) and isinstance(layer, nn.Linear | nn.Conv2d):
        wrap = draw.one_of((nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm))
        layer = wrap(layer.double())
    if draw.chance(0.05):
        for p in layer.parameters():
            p.requires_grad_(False)
    return layer

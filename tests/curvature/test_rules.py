"""Every op of the table, one by one: against double backward, and against differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from blokern import ops
from blokern.curvature.rules import RULES, elementwise, normalization, softmax

Function = Callable[..., Tensor]


class Applied(nn.Module):
    """f of tanh(p₀) x, tanh(p₁), …: every operand depends on a parameter, the first also on the input."""

    def __init__(self, f: Function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f = f
        self.p = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.p
        out: Tensor = self.f(torch.tanh(first) * x, *map(torch.tanh, others))
        return out


def wavy(out: Tensor, y: Tensor) -> Tensor:
    """A loss of full curvature in every entry, for outputs of any shape."""
    return torch.sin(out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


IMAGE, VECTORS = (2, 4, 5, 4), (5, 3)
MASK = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
CONV_MASK = torch.rand(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
LABELS = torch.tensor([2, 0, 1, -100, 2])

CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    # elementwise
    **{
        name: (getattr(torch, name), (VECTORS,))
        for name in (
            *("neg", "tanh", "sigmoid", "exp", "expm1", "sin", "cos", "erf", "abs", "relu", "square"),
            *("tan", "atan", "sinh", "cosh"),
        )
    },
    **{
        name: (lambda a, f=f: f(1.5 + a), (VECTORS,))
        for name, f in {
            "log": torch.log,
            "log1p": torch.log1p,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal,
            "power 3": lambda a: a**3,
            "power 0.5": lambda a: a**0.5,
            "log2": torch.log2,
            "log10": torch.log10,
            "power -1": lambda a: a**-1,
            "power 1": lambda a: a**1,
            "power 0": lambda a: a**0,
        }.items()
    },
    **{
        name: (f, (VECTORS,))
        for name, f in {
            "gelu": F.gelu,
            "gelu tanh": partial(F.gelu, approximate="tanh"),
            "silu": F.silu,
            "softplus": F.softplus,
            "softplus beta": partial(F.softplus, beta=3.0, threshold=1.0),
            "elu": partial(F.elu, alpha=0.7),
            "selu": F.selu,
            "celu": partial(F.celu, alpha=0.6),
            "leaky relu": partial(F.leaky_relu, negative_slope=0.2),
            "relu6": F.relu6,
            "hardtanh": partial(F.hardtanh, min_val=-0.3, max_val=0.4),
            "hardswish": lambda a: F.hardswish(5 * a),
            "hardsigmoid": lambda a: F.hardsigmoid(5 * a),
            "hardshrink": partial(F.hardshrink, lambd=0.3),
            "softshrink": partial(F.softshrink, lambd=0.2),
            "mish": F.mish,
            "glu": lambda a: F.glu(torch.cat([a, a * a + 0.1], 1)),
            "logsigmoid": F.logsigmoid,
            "steps": lambda a: a * (torch.sign(a) + torch.round(2 * a) + torch.floor(3 * a) + torch.ceil(a)),
            "xlogy number": lambda a: torch.xlogy(2.0, 1.5 + a),
            "xlogy of number": lambda a: torch.xlogy(a, 1.5),
            "threshold": lambda a: F.threshold(a, 0.1, 0.7),
            "clamp": lambda a: a.clamp(-0.3, 0.4),
            "clamp min": lambda a: a.clamp_min(-0.3),
            "clamp max": lambda a: a.clamp_max(0.3),
            "masked fill": lambda a: a.masked_fill(a.detach() > 0, 2.0),
            "add number": lambda a: 1.0 + a,
            "sub number": lambda a: 1.0 - a,
            "mul number": lambda a: 3 * a,
            "div number": lambda a: a / 4,
            "number div": lambda a: 1.0 / (2.0 + a),
            "softsign": F.softsign,
        }.items()
    },
    "add": (torch.add, (VECTORS, (3,))),
    "add alpha": (partial(torch.add, alpha=2), (VECTORS, VECTORS)),
    "sub": (torch.sub, (VECTORS, (5, 1))),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=2), (VECTORS, (3,))),
    "mul": (torch.mul, (VECTORS, (3,))),
    "mul outer": (torch.mul, ((5, 1), (1, 3))),
    "mul by itself": (lambda a: a * a, (VECTORS,)),
    "div": (lambda a, b: a / (2.0 + b), (VECTORS, (3,))),
    "maximum": (torch.maximum, (VECTORS, VECTORS)),
    "minimum of equals": (lambda a: torch.minimum(a, a), (VECTORS,)),
    "prelu": (F.prelu, (IMAGE, (4,))),
    "prelu of one slope": (F.prelu, (VECTORS, (1,))),
    "xlogy": (lambda a, b: torch.xlogy(a, 1.5 + b), (VECTORS, (3,))),
    "xlogy of zero": (lambda a, b: torch.xlogy(a * (a.detach() > 0), (1.5 + b)), (VECTORS, (3,))),
    "where": (lambda a, b: torch.where(a > b, a, b * b), (VECTORS, (3,))),
    "where number": (lambda a: torch.where(a > 0, a, 1.0), (VECTORS,)),
    "where other number": (lambda a: torch.where(a > 0, 1.0, a), (VECTORS,)),
    "masked fill of tensor": (lambda a: a.masked_fill(a > 0, torch.tensor(2.0).double()), (VECTORS,)),
    # by torch's own derivatives
    **{
        name: (f, (VECTORS,))
        for name, f in {
            "acos": lambda a: torch.acos(0.5 * a),
            "acosh": lambda a: torch.acosh(2.0 + a),
            "asin": lambda a: torch.asin(0.5 * a),
            "asinh": torch.asinh,
            "atanh": lambda a: torch.atanh(0.5 * a),
            "erfc": torch.erfc,
            "exp2": torch.exp2,
            "lgamma": lambda a: torch.lgamma(1.5 + a),
            "logit": lambda a: torch.logit(0.5 + 0.4 * a),
            "logit clamped": lambda a: torch.logit(0.5 + 0.6 * a, 0.1),
            "cumprod": lambda a: torch.cumprod(a, 1),
            "prod": lambda a: torch.prod(1.0 + a),
            "prod dim": lambda a: torch.prod(a, 1, keepdim=True),
            "logcumsumexp": lambda a: torch.logcumsumexp(a, 1),
            "number pow": lambda a: torch.pow(2.0, a),
            "index fill": lambda a: a.index_fill(1, torch.tensor([0, 2]), 2.0),
            "scatter number": lambda a: a.scatter(1, torch.tensor([[0], [2], [1], [1], [0]]), 2.0),
            "soft margin": lambda a: F.soft_margin_loss(a, torch.ones(VECTORS, dtype=torch.float64)),
            "norm 3": lambda a: torch.linalg.vector_norm(a, 3, dim=1),
            "norm 1": lambda a: torch.norm(a, 1),
        }.items()
    },
    "pow of two": (lambda a, b: (1.5 + a) ** b, (VECTORS, (3,))),
    "addcdiv": (lambda a, b, c: torch.addcdiv(a, b, 2.0 + c, value=0.5), (VECTORS, (3,), VECTORS)),
    "addcmul": (partial(torch.addcmul, value=0.5), (VECTORS, VECTORS, (5, 1))),
    "addmv": (partial(torch.addmv, beta=2, alpha=3), ((5,), (5, 3), (3,))),
    "atan2": (torch.atan2, (VECTORS, (3,))),
    "hypot": (torch.hypot, (VECTORS, (3,))),
    "logaddexp": (torch.logaddexp, (VECTORS, (3,))),
    "clamp by tensors": (lambda a, b: torch.clamp(a, b - 0.2, b + 0.3), (VECTORS, (3,))),
    "clamp min by tensor": (lambda a, b: torch.clamp(a, min=b), (VECTORS, (3,))),
    "clamp max by tensor": (lambda a, b: torch.clamp_max(a, b), (VECTORS, (3,))),
    "lerp": (partial(torch.lerp, weight=0.3), (VECTORS, VECTORS)),
    "lerp by tensor": (torch.lerp, (VECTORS, VECTORS, VECTORS)),
    "index add": (lambda a, b: a.index_add(0, torch.tensor([0, 2, 0]), b, alpha=2), (VECTORS, (3, 3))),
    "index copy": (lambda a, b: a.index_copy(0, torch.tensor([0, 2, 1]), b), (VECTORS, (3, 3))),
    "index put": (
        lambda a, b: a.index_put((torch.tensor([0, 2, 0]),), b, accumulate=True),
        (VECTORS, (3, 3)),
    ),
    "scatter": (lambda a, b: a.scatter(0, torch.tensor([[0, 1, 2], [3, 0, 1]]), b), (VECTORS, (2, 3))),
    "scatter add": (
        lambda a, b: a.scatter_add(0, torch.tensor([[0, 1, 2], [0, 0, 1]]), b),
        (VECTORS, (2, 3)),
    ),
    "bilinear layer": (F.bilinear, (VECTORS, VECTORS, (2, 3, 3), (2,))),
    "grid sample": (
        lambda a, grid: F.grid_sample(a, torch.tanh(grid), align_corners=False),
        (IMAGE, (2, 3, 3, 2)),
    ),
    "grid sample 3d": (
        lambda a, grid: F.grid_sample(a, torch.tanh(grid), align_corners=True),
        ((1, 2, 3, 3, 2), (1, 2, 2, 2, 3)),
    ),
    # views and other linear ops
    **{
        name: (f, (IMAGE,))
        for name, f in {
            "view": lambda a: a.view(4, -1),
            "reshape": lambda a: a.transpose(1, 2).reshape(8, -1),
            "flatten": lambda a: a.flatten(1),
            "squeeze": lambda a: a[:, :1].squeeze(1).unsqueeze(-1).squeeze(),
            "squeeze dims": lambda a: a[:1, :1].squeeze((0, 1)),
            "permute": lambda a: a.permute(2, 0, -1, 1),
            "transpose": lambda a: a.transpose(-1, 1),
            "expand": lambda a: a[:1].expand(3, -1, -1, -1),
            "slice": lambda a: a[:, 1:4:2, -3:],
            "select": lambda a: a[:, -1],
            "index": lambda a: a[:, torch.tensor([0, 2, 2])],
            "index select": lambda a: a.index_select(2, torch.tensor([1, 1, 4])),
            "gather": lambda a: a.gather(1, torch.zeros(2, 2, 5, 4, dtype=torch.int64)),
            "clone": lambda a: a.clone(),
            "channels last": lambda a: a.contiguous(memory_format=torch.channels_last),
            "cast": lambda a: a.to(torch.float64, copy=True),
            "sum": lambda a: a.sum(),
            "sum dims": lambda a: a.sum((0, -1)),
            "sum keepdim": lambda a: a.sum(1, keepdim=True),
            "mean": lambda a: a.mean(),
            "mean dims": lambda a: a.mean((2, 3)),
            "cumsum": lambda a: a.cumsum(2),
            "roll": lambda a: a.roll(2, 3),
            "flip": lambda a: a.flip(1, 2),
            "tril": lambda a: a.tril(),
            "triu": lambda a: a.triu(1),
            "diagonal": lambda a: a.diagonal(dim1=2, dim2=3),
            "repeat": lambda a: a.repeat(1, 2, 1, 1),
            "unfold": lambda a: a.unfold(2, 3, 2),
            "im2col": lambda a: F.unfold(a[:, :2], 3, padding=1, stride=2),
            "col2im": lambda a: F.fold(a.reshape(2, 8, 10), (3, 6), (2, 2)),
            "pixel shuffle": lambda a: F.pixel_shuffle(a, 2),
            "pixel unshuffle": lambda a: F.pixel_unshuffle(a[..., :4, :], 2),
            "pad": lambda a: F.pad(a, (1, 2, -1, 1), value=3.0),
            "reflection pad": lambda a: F.pad(a, (1, 2, 1, 1), mode="reflect"),
            "replication pad": lambda a: F.pad(a, (1, 2, 1, 1), mode="replicate"),
            "reflection pad 1d": lambda a: F.pad(a[0], (1, 2), mode="reflect"),
            "replication pad 1d": lambda a: F.pad(a[0], (1, 2), mode="replicate"),
            "circular pad": lambda a: torch.cat([a[..., -1:], a, a[..., :1]], -1),
            "tensor split": lambda a: torch.mul(*a.tensor_split(2, 1)),
            "split": lambda a: torch.cat([s * s for s in a.split(3, 2)], 2),
            "split sizes": lambda a: a.split([1, 3], 1)[1] * a.split([3, 1], 1)[0],
            "chunk": lambda a: torch.mul(*a.chunk(2, 1)),
            "unbind": lambda a: a.unbind(0)[0] * a.unbind(0)[1],
            "stack": lambda a: torch.stack([a, a * a], 1),
            "cat": lambda a: torch.cat([a, a * a], 1),
            "copy": lambda a: torch.zeros_like(a.detach()).copy_(a),
            "avg pool": lambda a: F.avg_pool2d(a, 3, 2, 1, True, False),
            "avg pool 1d": lambda a: F.avg_pool1d(a[0], 2),
            "avg pool 3d": lambda a: F.avg_pool3d(a, 2),
            "adaptive avg pool": lambda a: F.adaptive_avg_pool2d(a, (3, 2)),
            "adaptive avg pool 3d": lambda a: F.adaptive_avg_pool3d(a, (2, 3, 2)),
            "global avg pool": lambda a: F.adaptive_avg_pool2d(a, 1),
            "global avg pool, channels last": lambda a: F.adaptive_avg_pool2d(
                a.contiguous(memory_format=torch.channels_last), 1
            ),
            "max pool": lambda a: F.max_pool2d(a, 3, 2, 1),
            "max pool 1d": lambda a: F.max_pool1d(a[0], 2),
            "max pool 3d": lambda a: F.max_pool3d(a, 2),
            "adaptive max pool": lambda a: F.adaptive_max_pool2d(a, 2),
            "adaptive max pool 3d": lambda a: F.adaptive_max_pool3d(a, 2),
            "max": lambda a: a.max(1).values,
            "min keepdim": lambda a: a.min(2, keepdim=True).values,
            "amax": lambda a: a.amax((1, 3)),
            "amin keepdim": lambda a: a.amin(2, keepdim=True),
            "amax of equals": lambda a: torch.cat([a, a], 1).amax(1),
            "max of all": lambda a: a.max() * a.min(),
            "unsafe split": lambda a: torch.mul(*torch.unsafe_split(a, 2, 1)),
            "glu of channels": lambda a: F.glu(a, 1),
            "sort": lambda a: a.sort(3, descending=True).values,
            "topk": lambda a: a.topk(2, 1).values,
            "nearest": lambda a: F.interpolate(a[:, :2], scale_factor=2.0),
            "bilinear": lambda a: F.interpolate(a, (7, 6), mode="bilinear"),
            "bicubic": lambda a: F.interpolate(a, (7, 6), mode="bicubic"),
            "dropout": lambda a: F.dropout(a, 0.5, training=False),
            "native dropout": lambda a: torch.native_dropout(a, 0.5, False)[0],
            "alias": lambda a: a[...] * a[:, :],
            "reshape alias": lambda a: torch.ops.aten._reshape_alias(a, (40, 4), (4, 1)),
            "cummax": lambda a: a.cummax(1).values,
            "cummin": lambda a: a.cummin(2).values,
            "kthvalue": lambda a: a.kthvalue(2, 1).values,
            "median": lambda a: a.median(2, keepdim=True).values,
            "channel shuffle": lambda a: F.channel_shuffle(a, 2),
            "affine grid": lambda a: F.affine_grid(a[0, :, :2, :3], [4, 3, 3, 2], align_corners=False),
            "max unpool": lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2),
            "max unpool 3d": lambda a: F.max_unpool3d(*F.max_pool3d(a[:, :, :4], 2, return_indices=True), 2),
            "reflection pad 3d": lambda a: F.pad(a, (1, 2, 1, 1, 1, 0), mode="reflect"),
            "replication pad 3d": lambda a: F.pad(a, (1, 2, 1, 1, 1, 0), mode="replicate"),
            "nearest 1d": lambda a: F.interpolate(a[0], 7),
            "nearest 3d": lambda a: F.interpolate(a[None], (3, 7, 6)),
            "nearest exact 1d": lambda a: F.interpolate(a[0], 7, mode="nearest-exact"),
            "nearest exact": lambda a: F.interpolate(a, (7, 6), mode="nearest-exact"),
            "nearest exact 3d": lambda a: F.interpolate(a[None], (3, 7, 6), mode="nearest-exact"),
            "linear 1d": lambda a: F.interpolate(a[0], 7, mode="linear"),
            "trilinear": lambda a: F.interpolate(a[None], (3, 7, 6), mode="trilinear"),
            "bilinear, antialiased": lambda a: F.interpolate(a, (3, 3), mode="bilinear", antialias=True),
            "bicubic, antialiased": lambda a: F.interpolate(a, (3, 3), mode="bicubic", antialias=True),
            "norm of all": lambda a: torch.ops.aten.norm.Scalar(a, 2),
            "remainders": lambda a: a.frac() * torch.fmod(a, 0.3) + torch.remainder(a, 0.4) + a.trunc(),
            "nan to num": lambda a: torch.nan_to_num(torch.where(a > 0, a, math.nan), 1.0),
            "sgn": lambda a: a * a.sgn(),
            "std mean": lambda a: torch.mul(*torch.std_mean(a, 1)),
        }.items()
    },
    "embedding": (lambda a: F.embedding(torch.tensor([[0, 2], [4, 2]]), a, padding_idx=4), (VECTORS,)),
    # products
    "mm": (torch.mm, ((5, 3), (3, 4))),
    "bmm": (torch.bmm, ((2, 5, 3), (2, 3, 4))),
    "matmul": (torch.matmul, ((2, 5, 3), (3, 4))),
    "addmm": (partial(torch.addmm, beta=2, alpha=3), ((4,), (5, 3), (3, 4))),
    "baddbmm": (partial(torch.baddbmm, beta=2, alpha=3), ((1, 4), (2, 5, 3), (2, 3, 4))),
    # A transpose that a product alone reads is taken into it.
    "mm of a transpose": (lambda a, b: a @ b.t(), ((5, 3), (4, 3))),
    "mm of two transposes": (lambda a, b: a.t() @ b.t().t().t(), ((3, 5), (4, 3))),
    "mm of itself": (lambda a: a @ a.t(), ((5, 3),)),
    "two mm of one transpose": (
        lambda a, b: torch.stack([a @ (t := b.t()), torch.sin(a) @ t]),
        ((5, 3), (4, 3)),
    ),
    "addmm of a transpose": (
        lambda c, a, b: torch.addmm(c, a, b.t(), beta=2, alpha=3),
        ((4,), (5, 3), (4, 3)),
    ),
    "baddbmm of transposes": (lambda c, a, b: torch.baddbmm(c, a, b.mT), ((1, 4), (2, 5, 3), (2, 4, 3))),
    "mv": (torch.mv, ((5, 3), (3,))),
    "dot": (torch.dot, ((5,), (5,))),
    "vdot": (torch.vdot, ((5,), (5,))),
    "einsum": (partial(torch.einsum, "bi,oij,bj->bo"), ((5, 3), (2, 3, 4), (5, 4))),
    "linear": (F.linear, (VECTORS, (4, 3), (4,))),
    "linear of 3d": (F.linear, ((2, 5, 3), (4, 3), (4,))),
    "conv": (F.conv2d, (IMAGE, (3, 4, 3, 3), (3,))),
    "conv strided": (partial(F.conv2d, stride=(2, 3), padding=(1, 0)), (IMAGE, (3, 4, 3, 2))),
    "conv grouped": (partial(F.conv2d, groups=2, dilation=2, padding=2), (IMAGE, (6, 2, 3, 3), (6,))),
    "conv depthwise": (partial(F.conv2d, groups=4, padding=1), (IMAGE, (4, 1, 3, 3), (4,))),
    "conv 1d": (partial(F.conv1d, stride=2, padding=1), ((2, 4, 7), (3, 4, 3), (3,))),
    "conv 3d": (F.conv3d, ((2, 2, 4, 4, 3), (3, 2, 2, 3, 2), (3,))),
    "conv transposed": (
        partial(F.conv_transpose2d, stride=2, padding=1, output_padding=1),
        ((1, 2, 5, 4), (2, 3, 3, 3), (3,)),
    ),
    "masked linear": (lambda a, w, b: ops.masked_linear(a, w, MASK, b), (VECTORS, (4, 3), (4,))),
    "masked linear, dense": (
        lambda a, w, b: ops.masked_linear(a, w, MASK, b, dense_grad=True),
        (VECTORS, (4, 3), (4,)),
    ),
    "masked conv": (
        lambda a, w, b: ops.masked_conv2d(a, w, CONV_MASK, b, 2, 1),
        (IMAGE, (4, 4, 3, 3), (4,)),
    ),
    "masked conv, dense": (
        lambda a, w, b: ops.masked_conv2d(a, w, CONV_MASK, b, 1, "same", dense_grad=True),
        (IMAGE, (4, 4, 3, 3), (4,)),
    ),
    # normalisation
    "batch norm": (lambda a, w, b: F.batch_norm(a, None, None, w, b, True), (IMAGE, (4,), (4,))),
    "batch norm of vectors": (lambda a: F.batch_norm(a, None, None, training=True), (VECTORS,)),
    "batch norm, eval": (
        lambda a, w, b: F.batch_norm(a, torch.ones(4).double(), torch.full((4,), 2.0).double(), w, b),
        (IMAGE, (4,), (4,)),
    ),
    "batch norm, eval, plain": (
        lambda a: F.batch_norm(a, torch.ones(3).double(), torch.full((3,), 2.0).double()),
        (VECTORS,),
    ),
    "layer norm": (lambda a, w, b: F.layer_norm(a, (5, 4), w, b), (IMAGE, (5, 4), (5, 4))),
    "layer norm, plain": (lambda a: F.layer_norm(a, (4,)), (IMAGE,)),
    "group norm": (lambda a, w, b: F.group_norm(a, 2, w, b), (IMAGE, (4,), (4,))),
    "instance norm": (F.instance_norm, (IMAGE,)),
    "rms norm": (lambda a, w: F.rms_norm(a, (4,), w), (IMAGE, (4,))),
    # reductions and losses
    "softmax": (lambda a: a.softmax(1), (IMAGE,)),
    "log softmax": (lambda a: a.log_softmax(-1), (VECTORS,)),
    "logsumexp": (lambda a: a.logsumexp((1, 2)), (IMAGE,)),
    "logsumexp keepdim": (lambda a: a.logsumexp(1, keepdim=True), (IMAGE,)),
    "norm": (lambda a: torch.linalg.vector_norm(a, dim=1), (VECTORS,)),
    "normalize": (F.normalize, (VECTORS,)),
    "var": (lambda a: a.var((1, 3)), (IMAGE,)),
    "std": (lambda a: a.std(1, keepdim=True, correction=0), (VECTORS,)),
    "var mean": (lambda a: torch.mul(*torch.var_mean(a, 1)), (VECTORS,)),
    "cross entropy": (partial(F.cross_entropy, target=LABELS), (VECTORS,)),
    "cross entropy of images": (
        lambda a: F.cross_entropy(a, (a.detach() > 0).long().argmax(1), reduction="none"),
        (IMAGE,),
    ),
    "cross entropy, smooth": (
        lambda a: F.cross_entropy(a, LABELS, WEIGHT, label_smoothing=0.2, reduction="sum"),
        (VECTORS,),
    ),
    "cross entropy, soft": (
        lambda a: F.cross_entropy(a, torch.linspace(-1, 1, 15).double().view(5, 3).softmax(1)),
        (VECTORS,),
    ),
    "mse": (F.mse_loss, (VECTORS, VECTORS)),
    "mse sum": (partial(F.mse_loss, reduction="sum"), (VECTORS, VECTORS)),
    "mse each": (partial(F.mse_loss, reduction="none"), (VECTORS, VECTORS)),
    "huber": (partial(F.huber_loss, delta=0.5), (VECTORS, VECTORS)),
    "smooth l1": (partial(F.smooth_l1_loss, beta=0.5, reduction="sum"), (VECTORS, VECTORS)),
    "l1": (F.l1_loss, (VECTORS, VECTORS)),
    "bce": (
        lambda a: F.binary_cross_entropy(a.sigmoid(), torch.full(VECTORS, 0.3).double()),
        (VECTORS,),
    ),
    "bce weighted sum": (
        lambda a: F.binary_cross_entropy(
            a.sigmoid(), torch.full(VECTORS, 0.3).double(), WEIGHT, reduction="sum"
        ),
        (VECTORS,),
    ),
    "bce logits each": (
        lambda a: F.binary_cross_entropy_with_logits(a, (a.detach() > 0).double(), reduction="none"),
        (VECTORS,),
    ),
    "bce logits": (
        lambda a: F.binary_cross_entropy_with_logits(
            a, torch.full(VECTORS, 0.3).double(), WEIGHT, pos_weight=3 * WEIGHT
        ),
        (VECTORS,),
    ),
    "kl": (
        lambda a: F.kl_div(a.log_softmax(1), torch.full(VECTORS, 1 / 3).double(), reduction="batchmean"),
        (VECTORS,),
    ),
    "kl of two": (
        lambda a, b: F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean"),
        (VECTORS, VECTORS),
    ),
    "norm of a difference": (F.pairwise_distance, (VECTORS, VECTORS)),
    "cosine embedding": (
        lambda a, b: F.cosine_embedding_loss(a, b, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).double()),
        (VECTORS, VECTORS),
    ),
    "cosine": (F.cosine_similarity, (VECTORS, VECTORS)),
    **{
        f"a number, {name}": (f, ((),))
        for name, f in {
            "viewed": lambda a: a.view(1, 1),
            "unsqueezed": lambda a: a.unsqueeze(0),
            "expanded": lambda a: a.expand(2, 3),
            "transposed": lambda a: a.t(),
            "permuted": lambda a: a.permute(()),
            "selected": lambda a: a.view(1)[0],
        }.items()
    },
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    ),
}


#: The same function, where torch has no second derivative of a case.
TWINS: dict[str, Function] = {"hardsigmoid": lambda a: F.relu6(5 * a + 3) / 6}


@pytest.mark.parametrize("case", CASES)
def test_products_equal_double_backward(case: str) -> None:
    f, shapes = CASES[case]
    torch.manual_seed(0)
    model = Applied(f, *shapes)
    x = torch.randn(shapes[0], dtype=torch.float64)
    twin = deepcopy(model)
    twin.f = TWINS.get(case, f)
    # torch's own derivatives of these have constants of float32.
    rtol = 1e-6 if case in ("hardsigmoid", "hardswish", "celu") else 1e-9
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        oracles.check_products(model, wavy, x, None, rtol, twin=twin)


NORMS = [case for case in CASES if "norm" in case]
KERNELS = ["tanh", "sigmoid", "silu", "gelu", "gelu tanh", "softplus beta", "elu", "celu"]


@pytest.mark.parametrize("case", [*NORMS, *KERNELS, "cross entropy"])
def test_products_without_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules in plain torch, which other devices use."""
    saves = normalization.Normalization.saves

    def saves_without_kernels(self: normalization.Normalization, *given: Any) -> Any:
        saved = saves(self, *given)
        self.stacks = False
        return saved

    monkeypatch.setattr(normalization.Normalization, "saves", saves_without_kernels)
    monkeypatch.setattr(elementwise, "_KERNELS", {})
    monkeypatch.setattr(softmax.LogSoftmax, "followed_by", lambda self, later, slot: None)
    f, shapes = CASES[case]
    torch.manual_seed(0)
    model = Applied(f, *shapes)
    x = torch.randn(shapes[0], dtype=torch.float64)
    oracles.check_products(model, wavy, x, None, rtol=1e-6 if case == "celu" else 1e-9)


# Straight-through derivatives are nobody's differences.
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(", dense")])
def test_products_are_differences_of_gradients(case: str) -> None:
    f, shapes = CASES[case]
    torch.manual_seed(0)
    model = Applied(f, *shapes)
    x = torch.randn(shapes[0], dtype=torch.float64)
    v, h = oracles.random_vector(model), 1e-6

    def gradient(sign: float) -> Tensor:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(v[name], alpha=sign * h)
        found = torch.autograd.grad(wavy(model(x), None), [*model.parameters()], materialize_grads=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(v[name], alpha=sign * h)
        return torch.cat([g.flatten() for g in found])

    product = oracles.flat(oracles.on_tape(model, wavy, x, None, input_gradient=False).hvp(v))
    difference = (gradient(1.0) - gradient(-1.0)) / (2 * h)
    oracles.assert_close(product, difference, rtol=1e-5, atol=1e-6 * (1.0 + float(difference.abs().max())))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.add(str(func).replace("_.", "."))
        return func(*args, **(kwargs or {}))


def test_the_cases_reach_every_rule() -> None:
    torch.manual_seed(0)
    with Seen() as seen, sdpa_kernel(SDPBackend.MATH):
        for f, shapes in CASES.values():
            wavy(Applied(f, *shapes)(torch.randn(shapes[0], dtype=torch.float64)), None)
    assert {str(op) for op in RULES} - seen.ops == set()

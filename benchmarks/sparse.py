"""Products with a masked weight against the dense ones: on weight * mask, as pruning code multiplies, and on a weight
masked beforehand; and against torch's CSR. Ours gathers weights in every call; the mask's own forms are made once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from blokern import keep_freed_memory, ops
from blokern._race import Case

SPARSITIES = (50, 80, 90, 95, 99)
LINEAR = (2048, 2048)
#: in, out, height and width, kernel, stride: ResNet-18's on CIFAR, one of a kind.
LAYERS = (
    (64, 64, 32, 3, 1),
    (128, 128, 16, 3, 1),
    (256, 256, 8, 3, 1),
    (512, 512, 4, 3, 1),
    (128, 256, 16, 3, 2),
    (256, 512, 8, 1, 2),
)
BATCH = 128

Run = Callable[[], object]


def _masked(shape: tuple[int, ...], sparsity: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) >= sparsity / 100
    return torch.randn(shape, generator=generator), mask


def _step(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> Run:
    """Forward and backward, gradients by both."""
    leaves = x.detach().requires_grad_(), weight.clone().requires_grad_()

    def run() -> object:
        return torch.autograd.grad(product(*leaves), leaves, grad)

    return run


def _linear(sparsity: int, batch: int) -> Iterator[Case]:
    weight, mask = _masked(LINEAR, sparsity)
    x, grad = torch.randn(batch, LINEAR[1]), torch.randn(batch, LINEAR[0])
    floats, sparse, masked = mask.float(), ops.SparseMask(mask), weight * mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's CSR is in beta
        csr = masked.to_sparse_csr()
    name = f"linear {batch}×{LINEAR[1]}×{LINEAR[0]}, {sparsity} % sparse"
    rivals: dict[str, Run] = {
        "blokern": lambda: ops.masked_linear(x, weight, sparse),
        "F.linear(x, weight * mask)": lambda: F.linear(x, weight * floats),
        "F.linear, masked beforehand": lambda: F.linear(x, masked),
        "torch CSR, made beforehand": lambda: csr @ x.t(),
    }
    yield Case(f"{name}, forward", rivals, ours="blokern")
    rivals = {
        "blokern": _step(lambda x, w: ops.masked_linear(x, w, sparse), x, weight, grad),
        "F.linear(x, weight * mask)": _step(lambda x, w: F.linear(x, w * floats), x, weight, grad),
    }
    yield Case(f"{name}, forward + backward", rivals, ours="blokern")


def _conv(sparsity: int, layer: tuple[int, int, int, int, int]) -> Iterator[Case]:
    channels, filters, size, taps, stride = layer
    how = (None, stride, taps // 2)
    weight, mask = _masked((filters, channels, taps, taps), sparsity)
    masked, sparse, nhwc = weight * mask, ops.SparseMask(mask), torch.channels_last
    x = torch.randn(BATCH, channels, size, size)
    grad = torch.randn_like(F.conv2d(x, masked, *how))
    last = (x.contiguous(memory_format=nhwc), masked.contiguous(memory_format=nhwc))
    grad_last = grad.contiguous(memory_format=nhwc)

    def samples_innermost(t: Tensor) -> Tensor:
        return t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)

    x_inner, grad_inner = samples_innermost(x), samples_innermost(grad)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, sparse, *how)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, *how)

    name = f"conv {channels}→{filters}, {size}², {taps}×{taps}/{stride}, batch {BATCH}, {sparsity} % sparse"
    rivals: dict[str, Run] = {
        "blokern, samples innermost": lambda: product(x_inner, weight),
        "blokern, NCHW": lambda: product(x, weight),
        "F.conv2d, NCHW, masked beforehand": lambda: dense(x, masked),
        "F.conv2d, channels_last, masked beforehand": lambda: dense(*last),
    }
    yield Case(f"{name}, forward", rivals, ours="blokern, samples innermost")
    rivals = {
        "blokern, samples innermost": _step(product, x_inner, weight, grad_inner),
        "blokern, NCHW": _step(product, x, weight, grad),
        "F.conv2d, NCHW, masked beforehand": _step(dense, x, masked, grad),
        "F.conv2d, channels_last, masked beforehand": _step(dense, *last, grad_last),
    }
    yield Case(f"{name}, forward + backward", rivals, ours="blokern, samples innermost")


def cases() -> Iterator[Case]:
    keep_freed_memory()  # as `blokern train` and `prune` do; it serves every rival
    for sparsity in SPARSITIES:
        for batch in (128, 8, 1):
            yield from _linear(sparsity, batch)
    for layer in LAYERS:
        for sparsity in SPARSITIES[1:]:
            yield from _conv(sparsity, layer)

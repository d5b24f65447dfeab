"""Products with a masked weight, of the layers that people prune, against the dense ones: on weight * mask, as pruning
code multiplies, and on a weight masked beforehand; and against the CSR matrices of torch and of scipy, made beforehand.

Four cases a layer: forward; backward, gradients by both factors; refresh, when the mask has changed, of all that is
made of it; and the three together, as in a training step. Ours gathers weights in every call."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

from blokern import keep_freed_memory, ops
from blokern._race import Case
from blokern.sparse import to_samples_innermost

Run = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """A linear layer, weight [out, in], or a convolution, [out, in, k, k]; sample: the shape of x without its batch."""

    name: str
    weight: tuple[int, ...]
    sample: tuple[int, ...]
    stride: int = 1

    @property
    def how(self) -> tuple[None, int, int]:
        """What a convolution takes after its weight and mask."""
        return None, self.stride, self.weight[-1] // 2


def linear(inputs: int, outputs: int, *tokens: int) -> Layer:
    of = f", {tokens[0]} tokens" if tokens else ""
    return Layer(f"linear {inputs}→{outputs}{of}", (outputs, inputs), (*tokens, inputs))


def conv(channels: int, filters: int, size: int, taps: int, stride: int = 1) -> Layer:
    name = f"conv {channels}→{filters}, {size}², {taps}×{taps}/{stride}"
    return Layer(name, (filters, channels, taps, taps), (channels, size, size), stride)


MLP = [linear(2048, 2048)]
#: On CIFAR, one of a kind.
RESNET18 = [
    *(conv(64, 64, 32, 3), conv(128, 128, 16, 3), conv(256, 256, 8, 3), conv(512, 512, 4, 3)),
    *(conv(128, 256, 16, 3, stride=2), conv(256, 512, 8, 1, stride=2)),
]
#: On ImageNet: a stage's bottleneck, and what lies before and between stages. ResNet-18's 3×3 layers are the same.
BOTTLENECK = conv(64, 256, 56, 1)
RESNET50 = [
    *(conv(3, 64, 224, 7, stride=2), conv(256, 64, 56, 1), conv(64, 64, 56, 3), BOTTLENECK),
    *(conv(256, 512, 56, 1, stride=2), conv(512, 128, 28, 1), conv(128, 128, 28, 3), conv(128, 512, 28, 1)),
    *(conv(1024, 256, 14, 1), conv(256, 256, 14, 3), conv(256, 1024, 14, 1)),
    *(conv(2048, 512, 7, 1), conv(512, 512, 7, 3), conv(512, 2048, 7, 1)),
]
#: The 1×1 layers; the depthwise ones have too few weights to prune.
POINTWISE = conv(512, 512, 14, 1)
MOBILENET = [conv(64, 128, 56, 1), conv(128, 256, 28, 1), POINTWISE, conv(1024, 1024, 7, 1)]
TRANSFORMER = [linear(512, 2048, 128), linear(768, 3072, 128)]

#: Layers × batches × sparsities in per cent.
Selection = tuple[list[Layer], tuple[int, ...], tuple[int, ...]]
QUICK: list[Selection] = [
    (MLP, (128, 8, 1), (50, 80, 90, 95, 99)),
    (RESNET18, (128,), (80, 90, 95, 99)),
    ([*TRANSFORMER, BOTTLENECK, POINTWISE], (1,), (90,)),
]
FULL: list[Selection] = [
    (MLP + RESNET18 + RESNET50 + MOBILENET + TRANSFORMER, (128, 8, 1), (50, 70, 80, 90, 95, 98, 99)),
]


def quick() -> Iterator[Case]:
    """The cases of README and results: two minutes."""
    return _cases(QUICK)


def full() -> Iterator[Case]:
    """Every layer, batch and sparsity: hours, and 10 GB of memory."""
    return _cases(FULL)


def _cases(selections: list[Selection]) -> Iterator[Case]:
    keep_freed_memory()  # as `blokern train` and `prune` do; it serves every rival
    for layers, batches, sparsities in selections:
        for layer, batch, sparsity in itertools.product(layers, batches, sparsities):
            yield from _layer(layer, batch, sparsity)


class Rival(NamedTuple):
    """A product of x and weight, and the gradient of its result."""

    product: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    grad: Tensor

    def forward(self) -> object:
        return self.product(self.x, self.weight)

    def backward(self) -> Run:
        leaves = self._leaves()
        return partial(torch.autograd.grad, self.product(*leaves), leaves, self.grad, retain_graph=True)

    def step(self, refresh: Run) -> Run:
        leaves = self._leaves()

        def run() -> object:
            refresh()
            return torch.autograd.grad(self.product(*leaves), leaves, self.grad)

        return run

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()


def _layer(layer: Layer, batch: int, sparsity: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(layer.weight, generator=generator) >= sparsity / 100
    moved = mask ^ (torch.rand(layer.weight, generator=generator) < 0.01 * (1 - sparsity / 100))
    weight = torch.randn(layer.weight, generator=generator)
    x = torch.randn(batch, *layer.sample, generator=generator)
    sparse = ops.SparseMask(mask)
    rivals = dict((_linears if len(layer.weight) == 2 else _convs)(layer, x, weight, mask, sparse))
    csr = _CSR(layer, x, weight * mask)
    ours = next(iter(rivals))
    for rival in rivals.values():
        torch.testing.assert_close(rival.forward(), rivals[ours].forward(), rtol=1e-3, atol=1e-3)

    masks = itertools.cycle((moved, mask))
    product, leaf = rivals[ours].product, weight.clone().requires_grad_()

    def refresh() -> None:
        sparse.update_(next(masks))
        product(x[:0], leaf)  # makes what is needed of a mask, and computes nothing

    def refresh_of(name: str) -> Run:
        return refresh if name.startswith("blokern") else lambda: None

    name = f"{layer.name}, batch {batch}, {sparsity} % sparse"
    forward = {key: rival.forward for key, rival in rivals.items()}
    if len(layer.weight) == 2:
        packed = ops.pack_weight(weight, mask)
        forward["blokern, packed beforehand"] = lambda: ops.packed_linear(x, packed)
    yield Case(f"{name}, forward", forward | csr.forward(), ours)
    backward = {key: rival.backward() for key, rival in rivals.items()}
    yield Case(f"{name}, backward", backward | csr.backward(rivals[ours].grad), ours)
    yield Case(f"{name}, refresh", {"blokern": refresh, **_refreshes(weight, mask)}, "blokern")
    steps = {key: rival.step(refresh_of(key)) for key, rival in rivals.items()}
    yield Case(f"{name}, refresh, forward and backward", steps, ours)


def _linears(
    layer: Layer, x: Tensor, weight: Tensor, mask: Tensor, sparse: ops.SparseMask
) -> Iterable[tuple[str, Rival]]:
    floats = mask.float()
    grad = torch.randn(*x.shape[:-1], layer.weight[0])
    yield "blokern", Rival(lambda x, w: ops.masked_linear(x, w, sparse), x, weight, grad)
    yield "F.linear(x, weight * mask)", Rival(lambda x, w: F.linear(x, w * floats), x, weight, grad)
    yield "F.linear, masked beforehand", Rival(F.linear, x, weight * mask, grad)


def _convs(
    layer: Layer, x: Tensor, weight: Tensor, mask: Tensor, sparse: ops.SparseMask
) -> Iterable[tuple[str, Rival]]:
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, sparse, *layer.how)

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, *layer.how)

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    masked = weight * mask
    grad = torch.randn_like(dense(x, masked))
    inner = to_samples_innermost(x), weight, to_samples_innermost(grad)
    yield "blokern, samples innermost", Rival(product, *inner)
    yield "blokern, NCHW", Rival(product, x, weight, grad)
    yield "F.conv2d, NCHW, masked beforehand", Rival(dense, x, masked, grad)
    last = map(channels_last, (x, masked, grad))
    yield "F.conv2d, channels_last, masked beforehand", Rival(dense, *last)


class _CSR:
    """The same by CSR matrices, where a layer is one product of matrices; its inputs lie as they like it."""

    def __init__(self, layer: Layer, x: Tensor, masked: Tensor) -> None:
        self.applies = layer.weight[2:] in ((), (1, 1)) and layer.stride == 1
        self.features = 1 if layer.weight[2:] else -1  # the dimension of x
        self.masked, self.x = masked.flatten(1), self._columns(x)

    def forward(self) -> dict[str, Run]:
        if not self.applies:
            return {}
        csr, array, x = _torch_csr(self.masked), scipy.sparse.csr_matrix(self.masked.numpy()), self.x
        return {"torch CSR": lambda: csr @ x, "scipy CSR": lambda: array @ x.numpy()}

    def backward(self, grad: Tensor) -> dict[str, Run]:
        if not self.applies:
            return {}
        csr, turned, x = _torch_csr(self.masked), _torch_csr(self.masked.t()), self.x.t()
        columns = self._columns(grad)
        return {
            "torch CSR": lambda: (turned @ columns, torch.sparse.sampled_addmm(csr, columns, x, beta=0.0))
        }

    def _columns(self, t: Tensor) -> Tensor:
        """[features, all else], contiguous."""
        return t.movedim(self.features, 0).flatten(1).contiguous()


def _refreshes(weight: Tensor, mask: Tensor) -> dict[str, Run]:
    matrix, floats = (weight * mask).flatten(1), mask.float()
    return {
        "weight * mask": lambda: weight * floats,
        "torch CSR, from dense": lambda: _torch_csr(matrix),
        "scipy CSR, from dense": lambda: scipy.sparse.csr_matrix(matrix.numpy()),
    }


def _torch_csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is in beta
        return matrix.to_sparse_csr()

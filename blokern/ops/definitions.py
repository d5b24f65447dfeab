"""What masked products are, in torch's own ops, which have every derivative and batching rule.

The kernels have reverse mode alone, of any order. Under a transform of torch.func and in forward mode a product is its
definition: the masked weight, dense, and torch's product. :mod:`blokern.ops.functorch` says of every op what it does
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

__all__ = [
    "ConvolutionDefinition",
    "dense_arguments",
    "is_transformed",
    "sddmm_definition",
    "spmm_definition",
    "straight_through",
    "with_definition",
]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # graphs are guarded by the transforms
def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, or a level of torch.autograd.forward_ad: tensors may then have
    tangents, or be stand-ins for batches.

    >>> torch.vmap(lambda x: x + is_transformed())(torch.zeros(2))
    tensor([1., 1.])
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def with_definition(op: str, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op as a function of the same arguments, the factors first, that is its definition where a transform is at
    work, or where gradients come in batches."""
    kernel = getattr(torch.ops.blokern, op).default

    def product(*args: Any) -> Tensor:
        defined = is_transformed() or _is_batch(args[0]) or _is_batch(args[1])
        y: Tensor = definition(*args) if defined else kernel(*args)
        return y

    return product


def _is_batch(t: Tensor) -> bool:
    """Whether it stands for a batch in torch's older vmap, which no level tells of: that of
    torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional(vectorize=True)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(t)


def spmm_definition(
    weight: Tensor, x: Tensor, bias: Tensor | None, words: Tensor, dense_grad: bool = False
) -> Tensor:
    """What spmm is; words are those of weight's mask."""
    y = _kept(weight, words, dense_grad) @ x
    return y if bias is None else y + bias.unsqueeze(1)


def sddmm_definition(a: Tensor, b: Tensor, words: Tensor) -> Tensor:
    """What sddmm is."""
    return _kept(a @ b.t(), words)


class ConvolutionDefinition(NamedTuple):
    """A masked convolution, and its derivatives by the input and by the weight: what those ops are.

    words: the mask's, None for the derivative by a weight without one; numbers: stride, zeros before, dilation and
    groups. Sizes are [C, H, W].
    """

    words: Tensor | None
    numbers: Sequence[int]

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Sequence[int], dense_grad: bool
    ) -> Tensor:
        pad, how = dense_arguments(x.shape, torch.Size([len(x), *out]), weight.shape, self.numbers)
        masked = _kept(weight, self.words, dense_grad)
        y: Tensor = torch.ops.aten.convolution(F.pad(x, pad), masked, bias, *how)
        return y

    def by_input(self, grad: Tensor, weight: Tensor, size: Sequence[int], dense_grad: bool) -> Tensor:
        whole = torch.Size([len(grad), *size])
        (_, right, _, below), how = dense_arguments(whole, grad.shape, weight.shape, self.numbers)
        like = grad.new_empty(len(grad), size[0], size[1] + below, size[2] + right)
        masked = _kept(weight, self.words, dense_grad)
        wanted = [True, False, False]
        product: Tensor = torch.ops.aten.convolution_backward(grad, like, masked, None, *how, wanted)[0]
        return product.narrow(2, 0, size[1]).narrow(3, 0, size[2])

    def by_weight(self, grad: Tensor, x: Tensor, weight: Sequence[int]) -> Tensor:
        pad, how = dense_arguments(x.shape, grad.shape, weight, self.numbers)
        padded, like, wanted = F.pad(x, pad), x.new_empty(*weight), [False, True, False]
        product: Tensor = torch.ops.aten.convolution_backward(grad, padded, like, None, *how, wanted)[1]
        return _kept(product, self.words)


def dense_arguments(
    x: torch.Size, out: torch.Size, weight: Sequence[int], numbers: Sequence[int]
) -> tuple[list[int], tuple[Any, ...]]:
    """Of a plan's dense twin: F.pad's padding of x, and the arguments of aten.convolution from stride
    on, for the shapes of input, output and weight.

    Padding to the "same" size may be longer at the end: what outputs read beyond the padding on both sides is added to
    x first.

    >>> x, y = torch.Size([1, 2, 8, 8]), torch.Size([1, 3, 8, 8])
    >>> dense_arguments(x, y, [3, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1])
    ([0, 0, 0, 0], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    """
    stride, before, dilation, groups = numbers[:2], numbers[2:4], numbers[4:6], numbers[6]
    high, wide = (
        max(0, (o - 1) * s + d * (k - 1) + 1 - n - 2 * b)
        for o, s, d, k, n, b in zip(out[2:], stride, dilation, weight[2:], x[2:], before, strict=True)
    )
    return [0, wide, 0, high], (stride, before, dilation, False, [0, 0], groups)


def _kept(weight: Tensor, words: Tensor | None, dense_grad: bool = False) -> Tensor:
    """weight ⊙ mask, whatever the masked weights hold; with `dense_grad` its derivative is that of weight."""
    if words is None:
        return weight
    mask = torch.ops.blokern.words_mask(words, weight.shape[1:].numel()).view(weight.shape)
    if not dense_grad:
        return torch.where(mask, weight, 0.0)
    return straight_through(weight, mask)


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """weight ⊙ mask, whose derivative is that of weight.

    >>> straight_through(torch.ones(2), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    kept: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]  # torch's stub
    return kept


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, weight_dot: Tensor, _: None) -> Tensor:
        return weight_dot.clone()

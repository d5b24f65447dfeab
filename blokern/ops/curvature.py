"""Derivatives of layers along directions: what the R-operator needs of them, in few passes over memory.

A dot is a tangent, the derivative along a direction; a bar is an adjoint, the derivative of a loss by the tensor.
float64, float32, bfloat16 or float16 (arithmetic at least float32; sums over the batch in float64), any layout, CPU or
CUDA; none of these ops has a derivative. Results do not depend on the number of threads; those of one CUDA device are
the same on every run. Shapes, dtypes and devices that do not fit are a ValueError or TypeError, naming the argument.
Labels on CUDA are not looked into: one out of range makes its row, and the loss, NaN.

The R-operator: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from blokern._backend import HAS_CUDA_KERNELS
from blokern._names import unknown_name

__all__ = [
    "ACTIVATIONS",
    "activation_adjoint_tangent",
    "batch_norm_adjoint",
    "batch_norm_adjoint_tangent",
    "batch_norm_tangent",
    "has_kernels",
    "layer_norm_adjoint_tangent",
    "layer_norm_tangent",
    "softmax_cross_entropy_hvp",
]


#: What `activation_adjoint_tangent` knows, and the parameters of each.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "tanh": (),
    "sigmoid": (),
    "silu": (),
    "gelu": (),
    "gelu_tanh": (),
    "softplus": ("beta", "threshold"),
    "elu": ("alpha", "scale", "input_scale"),
}


def has_kernels(device: torch.device) -> bool:
    """Whether these ops run on tensors of a device: CUDA's, where its kernels are built.

    >>> has_kernels(torch.device("cpu"))
    True
    """
    return device.type == "cpu" or (device.type == "cuda" and HAS_CUDA_KERNELS)


def activation_adjoint_tangent(
    activation: str,
    grad: Tensor,
    grad_dot: Tensor,
    saved: Tensor,
    x_dot: Tensor,
    *parameters: float,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x_bar, x_bar_dot) of y = φ(x): φ′ grad, if `adjoint` is true, else empty, and φ′ grad_dot + φ″ x_dot grad.

    activation: one of `ACTIVATIONS`, whose parameters follow x_dot: softplus's beta and threshold, ELU's alpha, scale
    and input_scale, as torch's own ops have them. saved: y for "tanh" and "sigmoid", x for the others. All tensors are
    of saved's shape, and grad_dot and x_dot may have one leading dimension more, for several vectors; so has x_bar_dot.
    φ′ of float32 is within 2e-7. Raises ValueError for another activation, TypeError for other parameters.

    >>> one = torch.ones(1)
    >>> activation_adjoint_tangent("tanh", one, torch.zeros(1), torch.full((1,), 0.5), one)[1]
    tensor([-0.7500])
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    names = ACTIVATIONS[activation]
    if len(parameters) != len(names):
        raise TypeError(f"{activation} takes {len(names)} parameters {names}, got {parameters}")
    op = getattr(torch.ops.blokern, f"{activation}_adjoint_tangent")
    bars: tuple[Tensor, Tensor] = op(grad, grad_dot, saved, x_dot, adjoint, *parameters)
    return bars


def softmax_cross_entropy_hvp(
    logits: Tensor,
    tangent: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """F.cross_entropy(logits, target, …), its gradient by the logits, and its Hessian times tangent: (loss, grad, hvp).

    logits, tangent: [N, C]; target: int64 labels [N], or probabilities [N, C]; weight: [C] or None. The arguments mean
    what they mean in torch.nn.functional.cross_entropy; loss is a scalar of logits' dtype, grad and hvp are [N, C].
    With p = softmax and one label a row, hvp is p ⊙ (tangent − ⟨p, tangent⟩), scaled as the loss. Raises ValueError for
    another reduction or, on the CPU, a label that is no class.

    >>> logits = torch.zeros(1, 2)
    >>> softmax_cross_entropy_hvp(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    (tensor(0.6931), tensor([[ 0.5000, -0.5000]]), tensor([[ 0.2500, -0.2500]]))
    """
    if reduction not in ("mean", "sum"):
        raise unknown_name("reduction", reduction, ("mean", "sum"))
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.blokern.softmax_cross_entropy_hvp(
        logits, tangent, target, weight, ignore_index, reduction == "mean", label_smoothing
    )
    return out


def batch_norm_tangent(
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    bias_dot: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
) -> Tensor:
    """The tangent of y = weight · (x − mean) · rstd + bias, like x_dot.

    x: [N, C, ...]; mean, rstd, weight and the tangents of weight and bias: [C], None for a weight of 1 and tangents of
    0. With `train`, mean and rstd = (var + eps)^−½ are the batch's own and move with x; without, they are constants.
    gate, of x's shape: y_dot is 0 where it is not positive; the output of a ReLU that follows makes y_dot that ReLU's.
    Several vectors at once: x_dot [K, N, C, ...], weight_dot and bias_dot [K, C]. mean and rstd may be of
    another floating dtype than x. Ioffe and Szegedy, ICML 2015.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm_tangent(x, torch.tensor([[1.0], [0.0]]), torch.tensor([2.0]), torch.tensor([1.0]), train=False)
    tensor([[1.],
            [0.]])
    """
    out: Tensor = torch.ops.blokern.batch_norm_tangent(
        x, x_dot, mean, rstd, weight, weight_dot, bias_dot, gate, train
    )
    return out


def batch_norm_adjoint(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoints (of x, of weight, of bias) for grad, that of y, or of the gate: x, and [C] in float64 each.

    Arguments as in :func:`batch_norm_tangent`; grad may be a stack, and results are then.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> batch_norm_adjoint(torch.ones(2, 1), x, torch.tensor([2.0]), torch.tensor([1.0]))[0]
    tensor([[0.],
            [0.]])
    """
    bars: tuple[Tensor, Tensor, Tensor] = torch.ops.blokern.batch_norm_adjoint(
        grad, x, mean, rstd, weight, gate, train
    )
    return bars


def batch_norm_adjoint_tangent(
    grad: Tensor,
    grad_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    train: bool = True,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tangents of what :func:`batch_norm_adjoint` gives: (x_bar, x_bar_dot, weight_bar_dot, bias_bar_dot).

    x_bar is the adjoint of x itself, in the same pass, if `adjoint` is true, else empty. grad_dot, x_dot and weight_dot
    may be stacks of one size, and tangents are then.

    >>> x, g = torch.tensor([[1.0], [3.0]]), torch.ones(2, 1)
    >>> mean, rstd = torch.tensor([2.0]), torch.tensor([1.0])
    >>> batch_norm_adjoint_tangent(g, torch.zeros(2, 1), x, g, mean, rstd)[1]
    tensor([[0.],
            [0.]])
    """
    bars: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.blokern.batch_norm_adjoint_tangent(
        grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot, gate, train, adjoint
    )
    return bars


def layer_norm_tangent(
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    bias_dot: Tensor | None = None,
) -> Tensor:
    """The tangent of y = weight · (x − mean) · rstd + bias with mean and rstd those of each row; like x_dot.

    x: [M, D]; mean, rstd: [M]; weight and the tangents of weight and bias: [1, D], or [kinds, D], of which row m takes
    m mod kinds (group normalisation: a row is a sample's group of channels); None for a weight of 1 and tangents of 0.
    Several vectors at once: x_dot [K, M, D], weight_dot and bias_dot [K, kinds, D].

    >>> x = torch.tensor([[1.0, 3.0]])
    >>> layer_norm_tangent(x, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([[0., 0.]])
    """
    out: Tensor = torch.ops.blokern.layer_norm_tangent(x, x_dot, mean, rstd, weight, weight_dot, bias_dot)
    return out


def layer_norm_adjoint_tangent(
    grad: Tensor,
    grad_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    weight_dot: Tensor | None = None,
    *,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tangents of the adjoints (of x, of weight, of bias): (x_bar, x_bar_dot, weight_bar_dot, bias_bar_dot).

    Arguments as in :func:`layer_norm_tangent`; grad is the adjoint of y. x_bar is the adjoint of x itself, in the same
    pass, if `adjoint` is true, else empty. The weights' are [kinds, D] in float64, all but x_bar stacks if the
    tangents are.

    >>> x, g = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)
    >>> layer_norm_adjoint_tangent(g, g, x, x, torch.tensor([2.0]), torch.tensor([1.0]))[3]
    tensor([[1., 1.]], dtype=torch.float64)
    """
    bars: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.blokern.layer_norm_adjoint_tangent(
        grad, grad_dot, x, x_dot, mean, rstd, weight, weight_dot, adjoint
    )
    return bars


def _like(x: Tensor, stack: tuple[int, ...]) -> Tensor:
    """As the kernels lay their results out: like x if that is dense with pixels or channels innermost."""
    inner = x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if not inner:
        return x.new_empty(*stack, *x.shape)
    shape = x.movedim(1, -1).shape
    return x.new_empty(*stack, *shape).movedim(-1, 1 + len(stack))


def _stack(t: Tensor, x: Tensor) -> tuple[int, ...]:
    return tuple(t.shape[: t.dim() - x.dim()])


def _channels(x: Tensor, stack: tuple[int, ...]) -> Tensor:
    return x.new_empty(*stack, x.shape[1], dtype=torch.float64)


def _fake_softmax_cross_entropy_hvp(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty(logits.shape), logits.new_empty(logits.shape)


def _fake_tangent(x: Tensor, x_dot: Tensor, *_: Any) -> Tensor:
    return _like(x, _stack(x_dot, x))


def _fake_adjoint(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    stack = _stack(grad, x)
    return _like(x, stack), _channels(x, stack), _channels(x, stack)


def _fake_adjoint_tangent(grad: Tensor, grad_dot: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    stack = _stack(grad_dot, x)
    own = _like(x, ()) if args[-1] else x.new_empty(0)
    return own, _like(x, stack), _channels(x, stack), _channels(x, stack)


def _fake_row_tangent(x: Tensor, x_dot: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x_dot.shape)


def _fake_row_adjoint_tangent(
    grad: Tensor,
    grad_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_dot: Tensor | None,
    adjoint: bool,
) -> tuple[Tensor, ...]:
    given = weight if weight is not None else weight_dot
    kinds = 1 if given is None else given.shape[-2]
    bar = x.new_empty(*_stack(x_dot, x), kinds, x.shape[1], dtype=torch.float64)
    return x.new_empty(x.shape if adjoint else 0), x.new_empty(x_dot.shape), bar, torch.empty_like(bar)


def _fake_activation(
    grad: Tensor, grad_dot: Tensor, saved: Tensor, x_dot: Tensor, adjoint: bool, *_: float
) -> tuple[Tensor, Tensor]:
    own = torch.empty_like(saved)
    strides = (saved.numel(), *own.stride()) if x_dot.dim() > saved.dim() else own.stride()
    return own if adjoint else saved.new_empty(0), saved.new_empty_strided(x_dot.shape, strides)


_FAKES: dict[str, Callable[..., Any]] = {
    **{f"{name}_adjoint_tangent": _fake_activation for name in ACTIVATIONS},
    "layer_norm_tangent": _fake_row_tangent,
    "layer_norm_adjoint_tangent": _fake_row_adjoint_tangent,
    "softmax_cross_entropy_hvp": _fake_softmax_cross_entropy_hvp,
    "batch_norm_tangent": _fake_tangent,
    "batch_norm_adjoint": _fake_adjoint,
    "batch_norm_adjoint_tangent": _fake_adjoint_tangent,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"blokern::{_name}", _fake)

"""Products of two factors: everything that costs a sweep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from blokern.curvature.op import Maybe, Op, Rule

__all__ = ["RULES", "Bilinear"]

aten = torch.ops.aten


class Bilinear(Op):
    """y = s·B(a, b) + t·c for a product B linear in each factor; c, which may be missing, is broadcast.

    ẏ = B(ȧ, b) + B(a, ḃ) + ċ; adjoints Bₐ(g, b), B_b(g, a) and g; their tangents Bₐ(ġ, b) + Bₐ(g, ḃ),
    B_b(ġ, a) + B_b(g, ȧ) and ġ. A subclass says B, Bₐ and B_b, and where a, b and c are.
    """

    sweeps = True
    #: The slots of a, b and c; None: no c.
    slot_a, slot_b = 0, 1
    slot_c: int | None = None
    scale: float = 1.0
    term_scale: float = 1.0

    def setup(self, out: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        # A factor is read only for derivatives by the other, but both may be wanted.
        return args[self.slot_a], args[self.slot_b]

    def settle(self) -> None:
        self.curved = self.inputs[self.slot_a] is not None and self.inputs[self.slot_b] is not None

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def by_a(self, grad: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def by_b(self, grad: Tensor, a: Tensor) -> Tensor: ...

    def by_b_twice(self, grad_dot: Tensor, a: Tensor, grad: Tensor, a_dot: Tensor) -> Tensor:
        """B_b(ġ, a) + B_b(g, ȧ): where it pays, as one product of twice the samples."""
        return self.by_b(grad_dot, a).add_(self.by_b(grad, a_dot))

    def joining_pays(self, a: Tensor, grad: Tensor) -> bool:
        """Whether a second gradient costs more than to read the samples once more and join them: where it is larger."""
        return self.saved[1].numel() >= a.numel() + grad.numel()

    def plus(self, total: Maybe, product: Callable[[Tensor], Tensor], along: Maybe) -> Maybe:
        """total + product(along), in the memory of total, which is another product."""
        if along is None:
            return total
        return product(along) if total is None else total.add_(product(along))

    def by_term(self, grad: Tensor) -> Tensor:
        assert self.slot_c is not None
        return self.to_operand(grad, self.slot_c)

    def tangent(self, *tangents: Maybe) -> Maybe:
        a, b = self.saved
        a_dot, b_dot = tangents[self.slot_a], tangents[self.slot_b]
        c_dot = None if self.slot_c is None else tangents[self.slot_c]
        y_dot = None if a_dot is None else self.product(a_dot, b)
        y_dot = self.plus(y_dot, lambda b_dot: self.product(a, b_dot), b_dot)
        y_dot = _scaled(y_dot, self.scale)
        c_dot = _scaled(c_dot, self.term_scale)
        if y_dot is None:
            return None if c_dot is None else self.to_output(self.as_output(c_dot))
        return y_dot if c_dot is None else y_dot.add_(self.as_output(c_dot))

    def as_output(self, c: Tensor) -> Tensor:
        """c in a shape that broadcasts to the output."""
        return c

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        a, b = self.saved
        scaled = _scaled(grad, self.scale)
        assert scaled is not None
        slots: list[Maybe] = [None] * len(wanted)
        if wanted[self.slot_a]:
            slots[self.slot_a] = self.by_a(scaled, b)
        if wanted[self.slot_b]:
            slots[self.slot_b] = self.by_b(scaled, a)
        if self.slot_c is not None and wanted[self.slot_c]:
            slots[self.slot_c] = _scaled(self.by_term(grad), self.term_scale)
        return slots

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        a, b = self.saved
        a_dot, b_dot = tangents[self.slot_a], tangents[self.slot_b]
        slots: list[Maybe] = [None] * len(wanted)
        if self.slot_c is not None and wanted[self.slot_c] and grad_dot is not None:
            slots[self.slot_c] = _scaled(self.by_term(grad_dot), self.term_scale)
        grad, grad_dot = _scaled(grad, self.scale), _scaled(grad_dot, self.scale)
        if wanted[self.slot_a]:
            moved = None if grad_dot is None else self.by_a(grad_dot, b)
            if grad is not None:
                moved = self.plus(moved, lambda b_dot: self.by_a(grad, b_dot), b_dot)
            slots[self.slot_a] = moved
        if wanted[self.slot_b]:
            if grad is None or a_dot is None:
                slots[self.slot_b] = None if grad_dot is None else self.by_b(grad_dot, a)
            elif grad_dot is None:
                slots[self.slot_b] = self.by_b(grad, a_dot)
            else:
                slots[self.slot_b] = self.by_b_twice(grad_dot, a, grad, a_dot)
        return slots


def _scaled(t: Maybe, factor: float) -> Maybe:
    return t if t is None or factor == 1 else t * factor


class Multiply(Bilinear):
    """a · b, broadcast; a or b may be a number."""

    sweeps = False

    def setup(self, out: Tensor, a: Any, b: Any) -> Sequence[Tensor]:
        if not isinstance(a, Tensor):
            a = torch.tensor(a, dtype=out.dtype, device=out.device)
        if not isinstance(b, Tensor):
            b = torch.tensor(b, dtype=out.dtype, device=out.device)
        return a, b

    def settle(self) -> None:
        super().settle()
        for factor, other in ((0, 1), (1, 0)):
            if self.inputs[other] is None:  # then nobody asks for this one
                self.saved[factor] = self.saved[factor].new_empty(0)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.to_output(a * b)

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        return self.to_operand(grad * b, 0)

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        return self.to_operand(grad * a, 1)


class MatrixProduct(Bilinear):
    """mm, bmm and their relations with a term added."""

    def setup(self, out: Tensor, *args: Any, beta: float = 1, alpha: float = 1) -> Sequence[Tensor]:
        self.scale, self.term_scale = alpha, beta
        return super().setup(out, *args)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        return grad @ b.mT

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        b = self.saved[1]
        if b.mT.is_contiguous():  # a layer's weight: its gradient is turned back, and then to be contiguous
            return (grad.mT @ a).mT
        return a.mT @ grad

    def by_b_twice(self, grad_dot: Tensor, a: Tensor, grad: Tensor, a_dot: Tensor) -> Tensor:
        if grad_dot.dim() != a_dot.dim() or not self.joining_pays(a, grad):
            return super().by_b_twice(grad_dot, a, grad, a_dot)
        return self.by_b(torch.cat([grad_dot, grad], -2), torch.cat([a, a_dot], -2))


class AddedMatrixProduct(MatrixProduct):
    """addmm and baddbmm."""

    slot_a, slot_b, slot_c = 1, 2, 0


class MatrixVector(Bilinear):
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        return torch.outer(grad, b)

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        return a.mT @ grad


class Dot(Bilinear):
    sweeps = False

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        return grad * b

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        return grad * a


class Convolution(Bilinear):
    """aten.convolution, of any number of dimensions, transposed ones too.

    Of a stack, images are more samples, and weights one product each: beside each other as more channels they cost no
    less, and a transposition.
    """

    stacks = True
    slot_c = 2
    differentiable: ClassVar[tuple[int, ...] | None] = (0, 1, 2)

    def setup(self, out: Tensor, x: Tensor, weight: Tensor, bias: Any, *how: Any) -> Sequence[Tensor]:
        self.how = how
        return x, weight

    def _is_stack(self, t: Tensor) -> bool:
        return t.dim() > len(self.meta.shape)

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Sequence[Tensor]:
        found: Sequence[Tensor] = aten.convolution_backward(grad, x, weight, None, *self.how, wanted)
        return found

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self._is_stack(a):
            return torch.unflatten(self.product(a.flatten(0, 1), b), 0, a.shape[:2])
        out: Tensor = aten.convolution(a, b, None, *self.how)
        return out

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        x = self.saved[0]  # lends its shape and layout
        if self._is_stack(grad):
            x = x.new_empty_strided((len(grad) * len(x), *x.shape[1:]), x.stride())
            folded = self._backward(grad.flatten(0, 1), x, b, (True, False, False))[0]
            return torch.unflatten(folded, 0, grad.shape[:2])
        return self._backward(grad, x, b, (True, False, False))[0]

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        if self._is_stack(grad):
            return torch.stack([self.by_b(g, a) for g in grad])
        if self._is_stack(a):
            return torch.stack([self.by_b(grad, t) for t in a])
        weight = self.saved[1]  # as x above
        return self._backward(grad, a, weight, (False, True, False))[1]

    def by_b_twice(self, grad_dot: Tensor, a: Tensor, grad: Tensor, a_dot: Tensor) -> Tensor:
        if self._is_stack(grad_dot):
            pairs = zip(grad_dot, a_dot, strict=True)
            return torch.stack([self.by_b_twice(g_dot, a, grad, t_dot) for g_dot, t_dot in pairs])
        if not self.joining_pays(a, grad):
            return super().by_b_twice(grad_dot, a, grad, a_dot)
        return self.by_b(torch.cat([grad_dot, grad]), torch.cat([a, a_dot]))

    def plus(self, total: Maybe, product: Callable[[Tensor], Tensor], along: Maybe) -> Maybe:
        if along is None or not self._is_stack(along):
            return super().plus(total, product, along)
        if total is None:
            return torch.stack([product(t) for t in along])
        for part, t in zip(total, along, strict=True):
            part.add_(product(t))
        return total

    def by_term(self, grad: Tensor) -> Tensor:
        channel = grad.dim() - len(self.meta.shape) + 1
        return grad.sum([d for d in range(channel - 1, grad.dim()) if d != channel])

    def as_output(self, c: Tensor) -> Tensor:
        return c.reshape(*c.shape[:-1], 1, -1, *[1] * (len(self.meta.shape) - 2))


RULES: dict[Any, Rule] = {
    aten.mul.Tensor: Multiply,
    aten.mul.Scalar: Multiply,
    aten.mm.default: MatrixProduct,
    aten.bmm.default: MatrixProduct,
    aten.addmm.default: AddedMatrixProduct,
    aten.baddbmm.default: AddedMatrixProduct,
    aten.mv.default: MatrixVector,
    aten.dot.default: Dot,
    aten.vdot.default: Dot,
    aten.convolution.default: Convolution,
}

"""Products of two factors: everything that costs a sweep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from blokern.curvature.op import Maybe, Op, Rule, fit

__all__ = ["RULES", "Bilinear", "MatrixProduct"]

aten = torch.ops.aten

#: Two factors of a product.
Factors: TypeAlias = tuple[Maybe, Maybe]


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

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b."""
        return self.saved[0], self.saved[1]

    def settle(self) -> None:
        self.curved = self.inputs[self.slot_a] is not None and self.inputs[self.slot_b] is not None

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def by_a(self, grad: Tensor, b: Tensor) -> Tensor: ...

    @abstractmethod
    def by_b(self, grad: Tensor, a: Tensor) -> Tensor: ...

    def sum_of(self, product: Callable[..., Tensor], one: Factors, other: Factors) -> Maybe:
        """product(*one) + product(*other), of which the other has the tangent second; zero for a factor of None."""
        total: Maybe = None
        for first, second in (one, other):
            if first is not None and second is not None:
                total = product(first, second) if total is None else self.plus(total, product, first, second)
        return total

    def by_b_twice(self, one: Factors, other: Factors) -> Maybe:
        """The sum of B_b's products, which some find as one product."""
        return self.sum_of(self.by_b, one, other)

    def plus(self, total: Tensor, product: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        """total + product(first, second), in the memory of total, which is another product."""
        return total.add_(product(first, second))

    def by_term(self, grad: Tensor) -> Tensor:
        assert self.slot_c is not None
        return self.to_operand(grad, self.slot_c)

    def tangent(self, *tangents: Maybe) -> Maybe:
        a, b = self.factors
        a_dot, b_dot = tangents[self.slot_a], tangents[self.slot_b]
        c_dot = None if self.slot_c is None else tangents[self.slot_c]
        y_dot = _scaled(self.sum_of(self.product, (a_dot, b), (a, b_dot)), self.scale)
        c_dot = _scaled(c_dot, self.term_scale)
        if y_dot is None:
            return None if c_dot is None else self.to_output(self.as_output(c_dot))
        return y_dot if c_dot is None else y_dot.add_(self.as_output(c_dot))

    def as_output(self, c: Tensor) -> Tensor:
        """c in a shape that broadcasts to the output."""
        return c

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        a, b = self.factors
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
        a, b = self.factors
        a_dot, b_dot = tangents[self.slot_a], tangents[self.slot_b]
        slots: list[Maybe] = [None] * len(wanted)
        if self.slot_c is not None and wanted[self.slot_c] and grad_dot is not None:
            slots[self.slot_c] = _scaled(self.by_term(grad_dot), self.term_scale)
        grad, grad_dot = _scaled(grad, self.scale), _scaled(grad_dot, self.scale)
        if wanted[self.slot_a]:
            slots[self.slot_a] = self.sum_of(self.by_a, (grad_dot, b), (grad, b_dot))
        if wanted[self.slot_b]:
            slots[self.slot_b] = self.by_b_twice((grad_dot, a), (grad, a_dot))
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
    """mm, bmm and their relations with a term added. A product with a total is added to it by the same kernel."""

    stacks = True
    #: Whether b is the transpose of what its slot has, as a layer's weight is.
    turned = False

    def setup(self, out: Tensor, *args: Any, beta: float = 1, alpha: float = 1) -> Sequence[Tensor]:
        self.scale, self.term_scale = alpha, beta
        return super().setup(out, *args)

    def turn(self) -> None:
        """Take b's slot for the transpose of what it was."""
        self.turned = not self.turned
        self.saved[1] = self.saved[1].mT

    def product(self, a: Tensor, b: Tensor, total: Maybe = None) -> Tensor:
        return _multiply(a, b.mT if self.turned else b, total)

    def by_a(self, grad: Tensor, b: Tensor, total: Maybe = None) -> Tensor:
        return _multiply(grad, b if self.turned else b.mT, total)

    def by_b(self, grad: Tensor, a: Tensor, total: Maybe = None) -> Tensor:
        return _multiply(grad.mT, a, total) if self.turned else _multiply(a.mT, grad, total)

    def plus(self, total: Tensor, product: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        return product(first, second, total)


def _multiply(a: Tensor, b: Tensor, total: Maybe) -> Tensor:
    if total is None:
        return a @ b
    return total.addmm_(a, b) if total.dim() == 2 else total.add_(a @ b)


class AddedMatrixProduct(MatrixProduct):
    """addmm and baddbmm."""

    slot_a, slot_b, slot_c = 1, 2, 0

    def by_term(self, grad: Tensor) -> Tensor:
        meta = self.metas[0]
        assert meta is not None
        return fit(grad, meta, grad.dim() - len(self.meta.shape))

    def as_output(self, c: Tensor) -> Tensor:
        meta = self.metas[0]
        assert meta is not None
        stack = c.shape[: c.dim() - len(meta.shape)]
        return c.reshape(*stack, *[1] * (len(self.meta.shape) - len(meta.shape)), *meta.shape)


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
        if self._is_stack(b):
            return torch.stack([self.product(a, t) for t in b])
        out: Tensor = aten.convolution(a, b, None, *self.how)
        return out

    def by_a(self, grad: Tensor, b: Tensor) -> Tensor:
        x = self.saved[0]  # lends its shape and layout
        if self._is_stack(grad):
            x = x.new_empty_strided((len(grad) * len(x), *x.shape[1:]), x.stride())
            folded = self._backward(grad.flatten(0, 1), x, b, (True, False, False))[0]
            return torch.unflatten(folded, 0, grad.shape[:2])
        if self._is_stack(b):
            return torch.stack([self.by_a(grad, t) for t in b])
        return self._backward(grad, x, b, (True, False, False))[0]

    def by_b(self, grad: Tensor, a: Tensor) -> Tensor:
        if self._is_stack(grad):
            return torch.stack([self.by_b(g, a) for g in grad])
        if self._is_stack(a):
            return torch.stack([self.by_b(grad, t) for t in a])
        weight = self.saved[1]  # as x above
        return self._backward(grad, a, weight, (False, True, False))[1]

    def by_b_twice(self, one: Factors, other: Factors) -> Maybe:
        (grad_dot, a), (grad, a_dot) = one, other
        if grad_dot is None or a is None or grad is None or a_dot is None:
            return super().by_b_twice(one, other)
        # A second gradient costs more than to read the samples once more and join them where it is larger.
        if self.saved[1].numel() < a.numel() + grad.numel():
            return super().by_b_twice(one, other)
        if self._is_stack(grad_dot):
            pairs = zip(grad_dot, a_dot, strict=True)
            return torch.stack([self.by_b(torch.cat([g, grad]), torch.cat([a, t])) for g, t in pairs])
        return self.by_b(torch.cat([grad_dot, grad]), torch.cat([a, a_dot]))

    def plus(self, total: Tensor, product: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        if not self._is_stack(second):
            return super().plus(total, product, first, second)
        for part, t in zip(total, second, strict=True):
            part.add_(product(first, t))
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

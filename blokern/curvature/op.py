"""What the tape is made of: one aten op of the forward pass with its three rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Maybe",
    "Meta",
    "Op",
    "Rule",
    "Single",
    "add",
    "fit",
    "held",
    "restored",
    "spread",
    "wide",
]

#: A tensor, or None for one that is zero by structure: no work is done for those.
Maybe: TypeAlias = Tensor | None


class Meta(NamedTuple):
    """What is kept of a tensor whose values are not."""

    shape: torch.Size
    dtype: torch.dtype


class Call(NamedTuple):
    """A call of an op, as the dispatcher saw it; out may be several tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class Op(ABC):
    """One op y = f(a, b, …) of a tape.

    Notation, here and in all rules: ȧ is a tangent, the derivative of a along the direction at hand; the adjoint of a
    is ∂ℓ/∂a; g and ġ are the adjoint of y and that adjoint's tangent. A rule sees one slot for each positional argument
    of f (for cat and its like: for each tensor of the list), with None in the place of a tangent that is zero and of
    an argument that is no tensor.

    A subclass's `setup(out, *args, **kwargs)` has the signature of f, keeps what is not a tensor as attributes and
    returns the tensors that the rules read, later in `self.saved`, and nowhere else: what is saved is guarded against
    changes. It reads no values: of an op in place, out is not written yet.
    """

    #: Whether f is nonlinear: adjoint_tangent then reads g and the tangents. Of a linear f it is the adjoint of ġ.
    curved: bool = True
    #: Whether an adjoint of it costs as much as the op, a matrix product or the like; if not, a few passes over memory.
    sweeps: ClassVar[bool] = False
    #: The slots that the rules know derivatives in; None: all. A tape that needs another is refused.
    differentiable: ClassVar[tuple[int, ...] | None] = None
    #: Whether the rules take tangents and adjoints with a leading dimension themselves; else they are vmapped.
    stacks: bool = False
    #: Whether they cannot be vmapped either, and are called once a vector.
    loops: ClassVar[bool] = False

    inputs: tuple[int | None, ...]
    output: int

    def __init__(self, call: Call) -> None:
        self.func = call.func
        self.meta = Meta(call.out.shape, call.out.dtype)
        self.metas = tuple(
            Meta(a.shape, a.dtype) if isinstance(a, Tensor) else None for a in self.slots(call.args)
        )
        self.saved: list[Tensor] = list(self.setup(call.out, *call.args, **call.kwargs))

    @staticmethod
    def slots(args: tuple[Any, ...]) -> Sequence[Any]:
        """The arguments that tangents and adjoints belong to."""
        return args

    def setup(self, out: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        raise TypeError(f"{type(self).__name__} is made of other ops, not of a call")

    def settle(self) -> None:  # noqa: B027  # most have nothing to do
        """Called once `inputs` says which slots have derivatives: the place to become straight, or to save less."""

    @abstractmethod
    def tangent(self, *tangents: Maybe) -> Maybe:
        """ẏ; at least one of the tangents is not None."""

    @abstractmethod
    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        """The adjoints of the wanted slots: fᵀ g."""

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        """The tangents of what `adjoint` gives: fᵀ ġ + ḟᵀ g. Of curved ops only, and only these need it."""
        raise TypeError(f"{type(self).__name__} is straight: the adjoint of ġ is all there is")

    def both(
        self,
        grad: Tensor,
        grad_dot: Maybe,
        tangents: Sequence[Maybe],
        inner: Sequence[bool],
        wanted: Sequence[bool],
    ) -> tuple[Sequence[Maybe], Sequence[Maybe]]:
        """adjoint(grad, inner) and adjoint_tangent(…, wanted), which some ops do at less cost than one by one."""
        return self.adjoint(grad, inner), self.adjoint_tangent(grad, grad_dot, tangents, wanted)

    def followed_by(self, later: Op, slot: int) -> Op | None:
        """One op that does this one and a later, which alone reads this one's output, in that slot; None if there is
        none. Its slots are the later's, with this one's in the place of that slot."""
        return None

    def to_operand(self, grad: Tensor, slot: int) -> Tensor:
        """grad summed over what broadcasting added to the slot's tensor, in its dtype."""
        meta = self.metas[slot]
        assert meta is not None
        return fit(grad, meta)

    def to_output(self, tangent: Tensor) -> Tensor:
        """tangent broadcast to the output, in its dtype."""
        return spread(tangent, self.meta)


class Single(Op):
    """An op with a derivative in its first argument alone, y = f(a): three maps in the place of the three rules.

    A straight op's push and pull are each other's transposes, and it has no bend.
    """

    differentiable = (0,)

    @property
    def operand(self) -> Meta:
        """What is known of a."""
        meta = self.metas[0]
        assert meta is not None
        return meta

    @abstractmethod
    def push(self, a_dot: Tensor) -> Tensor:
        """ẏ"""

    @abstractmethod
    def pull(self, g: Tensor) -> Tensor:
        """The adjoint of a."""

    def bend(self, g: Tensor, a_dot: Tensor) -> Tensor:
        """The derivative of `pull` along ȧ, at g; of curved ops only."""
        raise TypeError(f"{type(self).__name__} is straight: it has no bend")

    def tangent(self, *tangents: Maybe) -> Maybe:
        return None if tangents[0] is None else self.push(tangents[0])

    def adjoint(self, grad: Tensor, wanted: Sequence[bool]) -> Sequence[Maybe]:
        return (self.pull(grad),)

    def adjoint_tangent(
        self, grad: Maybe, grad_dot: Maybe, tangents: Sequence[Maybe], wanted: Sequence[bool]
    ) -> Sequence[Maybe]:
        a_dot = tangents[0]
        bent = None if grad is None or a_dot is None else self.bend(grad, a_dot)
        return (add(bent, None if grad_dot is None else self.pull(grad_dot)),)


#: Makes the op of a call, or one op for each output of a call with several, or None for a call it cannot do.
Rule: TypeAlias = Callable[[Call], Op | Sequence[Op] | None]


class _Place(int):
    """Where in a list the tensor is that was here."""


def held(tree: Any, tensors: list[Tensor]) -> Any:
    """Nested arguments without their tensors, which are appended to the list; `restored` is the inverse."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _Place(len(tensors) - 1)
    if isinstance(tree, tuple | list):
        return [held(item, tensors) for item in tree]
    return tree


def restored(tree: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(tree, _Place):
        return tensors[tree]
    if isinstance(tree, list):
        return [restored(item, tensors) for item in tree]
    return tree


def fit(grad: Tensor, meta: Meta, stack: int = 0) -> Tensor:
    """The adjoint of `spread`; with `stack` leading dimensions that are left as they are."""
    first = grad.dim() - len(meta.shape)
    dims = [*range(stack, first)]
    dims += [d + first for d, n in enumerate(meta.shape) if n == 1 and grad.shape[d + first] != 1]
    if dims:
        grad = grad.sum(dims, keepdim=True)
    return (grad.reshape((*grad.shape[:stack], *meta.shape)) if first > stack else grad).to(meta.dtype)


def spread(tangent: Tensor, meta: Meta) -> Tensor:
    """tangent broadcast to a shape, in a dtype; or a stack of tangents that have all its dimensions."""
    stack = tangent.shape[: max(tangent.dim() - len(meta.shape), 0)]
    if tangent.shape != (*stack, *meta.shape):
        tangent = tangent.expand(*stack, *meta.shape)
    return tangent.to(meta.dtype)


def add(*terms: Maybe) -> Maybe:
    """The sum of those that are not None; None if all are."""
    total: Maybe = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


def wide(t: Tensor) -> Tensor:
    """t in the dtype that arithmetic is done in: float32 for the half types."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

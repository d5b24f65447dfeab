"""Products read off a tape: sweeps over its ops, forwards with tangents and backwards with adjoints.

Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994; Schraudolph, "Fast Curvature
Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blokern.curvature.op import Maybe, Op
from blokern.curvature.outputs import is_number
from blokern.curvature.tape import INPUT, PARAMETER, Tape

__all__ = ["TapeProducts"]

#: Of each value: its tangent, its adjoint, or that adjoint's tangent.
Values = dict[int, Tensor]


class TapeProducts:
    """The products of a tape, for vectors by name of parameter or of the input's shape.

    With `keep`, a product leaves the tape for others; without, it frees it on the way. With `stack`, vectors and
    products have a leading dimension of that size.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        # Adjoints of the swept values, from which a product finds the others on its way; None: not computed yet.
        self._adjoints: Values | None = None

    def input_gradient(self) -> Maybe:
        """∇ₓℓ, in one sweep that later products are spared; None if x is no leaf of the tape."""
        tape = self.tape
        self._adjoints = {}
        grads = self._seed()
        for op in reversed(tape.ops):
            grad = grads.pop(op.output, None)
            if grad is not None:
                if op.output in tape.swept:
                    self._adjoints[op.output] = grad
                wanted = [
                    v in tape.bent or (v is not None and bool(tape.depends[v] & INPUT)) for v in op.inputs
                ]
                self._pull(op, grad, grads, wanted)
        return None if tape.x is None else grads.get(tape.x)

    def hvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        return self._named(self._second(self._seeds(v), PARAMETER, keep, stack))

    def mixed_hvp(self, u: Tensor, keep: bool, stack: bool) -> dict[str, Tensor]:
        return self._named(self._second(self._input_seed(u), PARAMETER, keep, stack))

    def mixed_hvp_transpose(self, v: dict[str, Tensor], keep: bool, stack: bool) -> Maybe:
        found = self._second(self._seeds(v), INPUT, keep, stack)
        return None if self.tape.x is None else found.get(self.tape.x)

    def ggnvp(self, v: dict[str, Tensor], keep: bool, stack: bool) -> dict[str, Tensor]:
        tape = self.tape
        model, loss = range(tape.split), range(tape.split, len(tape.ops))
        tangents = self._tangents(model, self._seeds(v), set(tape.outputs), stack)
        seeds = {value: tangents[value] for value in tape.outputs if value in tangents}
        del tangents
        at_outputs = self._bend(loss, self._tangents(loss, seeds, tape.read, stack), PARAMETER, True, stack)
        if not keep:
            self._adjoints = None
        return self._named(self._adjoint_sweep(model, at_outputs, keep, stack))

    def _second(self, seeds: Values, leaves: int, keep: bool, stack: bool) -> Values:
        """The derivative of ∇ℓ along the seeds, by the parameters or the input."""
        if keep and self._adjoints is None:
            self.input_gradient()
        span = range(len(self.tape.ops))
        return self._bend(span, self._tangents(span, seeds, self.tape.read, stack), leaves, keep, stack)

    def _tangents(self, span: range, seeds: Values, kept: set[int], stack: bool) -> Values:
        """Forwards over the ops of a span: the tangents of the kept values."""
        tangents = dict(seeds)
        for place in span:
            op = self.tape.ops[place]
            at = _values(tangents, op.inputs)
            if op.output != self.tape.loss and any(t is not None for t in at):
                (tangent,) = _each(op, lambda *t, op=op: (op.tangent(*t),), at, stack)
                if tangent is not None:
                    tangents[op.output] = tangent
            for value in self.tape.last[place]:
                if value not in kept:
                    tangents.pop(value, None)
        return tangents

    def _bend(self, span: range, tangents: Values, leaves: int, keep: bool, stack: bool) -> Values:
        """Backwards: the tangents of the adjoints of what depends on the leaves, and the adjoints unless known."""
        tape = self.tape
        known = self._adjoints or {}
        grads, dots = self._seed(), dict[int, Tensor]()
        for place in reversed(span):
            op = tape.ops[place]
            tangents.pop(op.output, None)  # whoever reads it has done so
            grad = grads.pop(op.output, None)
            if op.output in known:
                grad = known[op.output] if keep else known.pop(op.output)
            dot = dots.pop(op.output, None)
            wanted = [v is not None and bool(tape.depends[v] & leaves) for v in op.inputs]
            at = _values(tangents, op.inputs)
            bends = op.curved and grad is not None and any(t is not None for t in at)
            inner = [
                want and v in tape.bent and v not in known for want, v in zip(wanted, op.inputs, strict=True)
            ]
            if grad is None or not any(inner):
                self._bend_one(op, grad if bends else None, dot, at, wanted, dots, stack)
            elif bends and op.stacks:
                slots, dot_slots = op.both(grad, dot, at, inner, wanted)
                _accumulate(grads, op.inputs, slots, inner)
                _accumulate(dots, op.inputs, dot_slots, wanted)
            else:
                self._pull(op, grad, grads, inner)
                self._bend_one(op, grad if bends else None, dot, at, wanted, dots, stack)
            if not keep:
                op.saved = []
        return dots

    @staticmethod
    def _bend_one(
        op: Op,
        grad: Maybe,
        dot: Maybe,
        tangents: Sequence[Maybe],
        wanted: Sequence[bool],
        dots: Values,
        stack: bool,
    ) -> None:
        """With grad None, of an op that does not bend here: the adjoint of dot."""
        if not any(wanted) or (dot is None and grad is None):
            return
        if grad is None:
            slots = _each(op, lambda d: op.adjoint(d, wanted), (dot,), stack)
        else:
            slots = _each(op, lambda d, *t: op.adjoint_tangent(grad, d, t, wanted), (dot, *tangents), stack)
        _accumulate(dots, op.inputs, slots, wanted)

    def _adjoint_sweep(self, span: range, grads: Values, keep: bool, stack: bool) -> Values:
        for place in reversed(span):
            op = self.tape.ops[place]
            grad = grads.pop(op.output, None)
            wanted = [v is not None and bool(self.tape.depends[v] & PARAMETER) for v in op.inputs]
            if grad is not None and any(wanted):
                slots = _each(op, lambda g, op=op, w=wanted: op.adjoint(g, w), (grad,), stack)
                _accumulate(grads, op.inputs, slots, wanted)
            if not keep:
                op.saved = []
        return grads

    @staticmethod
    def _pull(op: Op, grad: Tensor, grads: Values, wanted: Sequence[bool]) -> None:
        if any(wanted):
            _accumulate(grads, op.inputs, op.adjoint(grad, wanted), wanted)

    def _seed(self) -> Values:
        """The loss's adjoint: one."""
        tape = self.tape
        return {} if tape.loss is None else {tape.loss: torch.ones_like(tape.loss_value)}

    def _seeds(self, v: dict[str, Tensor]) -> Values:
        return {value: v[name] for name, value in self.tape.parameters.items()}

    def _input_seed(self, u: Tensor) -> Values:
        return {} if self.tape.x is None else {self.tape.x: u}

    def _named(self, found: Values) -> dict[str, Tensor]:
        return {name: found[value] for name, value in self.tape.parameters.items() if value in found}

    def past_outputs(self) -> list[str]:
        tape = self.tape
        reached = {tape.loss}.difference(tape.outputs)
        for op in reversed(tape.ops):
            if op.output in reached:
                reached.update(set(op.inputs).difference(tape.outputs))
        return [name for name, value in tape.parameters.items() if value in reached]

    def returns_loss(self) -> bool:
        tape = self.tape
        model, loss = tape.ops[: tape.split], tape.ops[tape.split :]
        numbers = {
            op.output for op in model if is_number(op.meta.shape) and tape.depends[op.output] & PARAMETER
        }
        read = {tape.loss, *(value for op in loss for value in op.inputs)}
        return any(not _is_bent(value, loss) for value in numbers.intersection(tape.outputs) & read)


def _is_bent(value: int, ops: Sequence[Op]) -> bool:
    """Whether one of the ops bends in what depends on the value."""
    moved = {value}
    for op in ops:
        if not moved.isdisjoint(op.inputs):
            if op.curved:
                return True
            moved.add(op.output)
    return False


def _values(of: Values, values: Sequence[int | None]) -> list[Maybe]:
    return [None if value is None else of.get(value) for value in values]


def _accumulate(
    total: Values, values: Sequence[int | None], slots: Sequence[Maybe], wanted: Sequence[bool]
) -> None:
    for value, slot, want in zip(values, slots, wanted, strict=False):
        if value is not None and slot is not None and want:
            total[value] = total[value] + slot if value in total else slot


def _each(
    op: Op, rule: Callable[..., Sequence[Maybe]], tensors: Sequence[Maybe], stack: bool
) -> Sequence[Maybe]:
    """rule(*tensors), or that for every element of the tensors' leading dimension; Nones stay what they are."""
    if not stack or op.stacks:
        return rule(*tensors)
    places = [i for i, t in enumerate(tensors) if t is not None]
    zeros: list[bool] = []

    def one(*present: Tensor) -> tuple[Tensor, ...]:
        filled: list[Maybe] = [None] * len(tensors)
        for place, t in zip(places, present, strict=True):
            filled[place] = t
        slots = rule(*filled)
        zeros[:] = [slot is None for slot in slots]
        return tuple(slot for slot in slots if slot is not None)

    given = [t for t in tensors if t is not None]
    if op.loops:
        parts = [one(*each) for each in zip(*given, strict=True)]
        found = iter([torch.stack(slot) for slot in zip(*parts, strict=True)])
    else:
        found = iter(torch.vmap(one)(*given))
    return [None if zero else next(found) for zero in zeros]

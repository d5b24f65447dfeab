"""A recorded forward pass: a loss as a list of ops, each with what its rules read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from blokern.curvature.op import Op

__all__ = ["INPUT", "PARAMETER", "Tape"]

#: What a value depends on, as bits.
PARAMETER, INPUT = 1, 2


class Tape:
    """A scalar loss as a list of ops, each with its saved tensors, of which none is idle: all reach the loss.

    Values are numbered; those of `parameters` (name to value; of the ones that the loss depends on) and `x` are the
    leaves. ops[:split] are the model's, the rest the loss function's, and `outputs` the values between.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        split: int,
        loss: tuple[int | None, Tensor],
        outputs: Iterable[int],
        parameters: dict[str, int],
        x: int | None,
    ) -> None:
        self.loss, self.loss_value = loss
        needed = {self.loss}
        for op in reversed(ops):
            if op.output in needed:
                needed.update(op.inputs)
        self.outputs = [value for value in outputs if value in needed]
        self.parameters = {name: value for name, value in parameters.items() if value in needed}
        self.x = x if x in needed else None
        live = [op for op in ops if op.output in needed]
        reads = Counter([*self.outputs, *(value for op in live for value in op.inputs)])
        model = _fused([op for op in ops[:split] if op.output in needed], reads)
        self.ops = model + _fused([op for op in ops[split:] if op.output in needed], reads)
        self.split = len(model)
        #: Of each value, what it depends on.
        self.depends: dict[int, int] = dict.fromkeys(parameters.values(), PARAMETER)
        if x is not None:
            self.depends[x] = INPUT
        #: Outputs of nonlinear ops, and what depends on them: products read their adjoints, or need them on the way.
        self.bent: set[int] = set()
        #: The values that nonlinear ops read: products read their tangents.
        self.read: set[int] = set()
        #: The values whose adjoints come from sweeps: worth keeping between products. The others' are recomputed.
        self.swept: set[int] = set()
        #: Of each op, the values that no later one reads.
        self.last: list[list[int]] = []
        for op in self.ops:
            inputs = [value for value in op.inputs if value is not None]
            bits = 0
            for value in inputs:
                bits |= self.depends[value]
            self.depends[op.output] = bits
            if op.curved or not self.bent.isdisjoint(inputs):
                self.bent.add(op.output)
            if op.curved:
                self.read.update(inputs)
            if op.sweeps:
                self.swept.update(self.bent.intersection(inputs))
            # Off the graph, which lives no longer, but with its version counter.
            op.saved = [t.detach() for t in op.saved]
        seen: set[int] = set()
        for op in reversed(self.ops):
            read = {value for value in op.inputs if value is not None}
            self.last.append([*(read - seen)])
            seen |= read
        self.last.reverse()
        self._versions = [[t._version for t in op.saved] for op in self.ops]

    def check_unchanged(self) -> None:
        """RuntimeError if a tensor that the rules read was changed in place since."""
        for op, versions in zip(self.ops, self._versions, strict=True):
            for t, version in zip(op.saved, versions, strict=False):
                if t._version != version:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(t.shape)} that {op.func} read or made was changed in place since "
                        "the forward pass (a parameter, by an optimizer's step?): linearize again"
                    )


def _fused(ops: Sequence[Op], reads: Counter[int | None]) -> list[Op]:
    """The ops, with one for two where there is such a one and nobody else reads what lies between."""
    made: dict[int | None, Op] = {}
    for op in ops:
        for slot, between in enumerate(op.inputs):
            alone = between in made and reads[between] == 1
            both = made[between].followed_by(op, slot) if alone else None
            if both is not None:
                inputs = (*op.inputs[:slot], *made.pop(between).inputs, *op.inputs[slot + 1 :])
                both.inputs, both.output = inputs, op.output
                op = both
                break
        made[op.output] = op
    return [*made.values()]

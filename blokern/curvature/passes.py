"""Going through a loader: every batch on its device, with its weight, on a model that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blokern.curvature.batches import Batches, BatchSize, SampleCount, check_loader, moved, pair, tensors
from blokern.curvature.linearization import Linearization, LossFn
from blokern.curvature.preservation import Held, ModelState, RandomState
from blokern.curvature.sweeps import TapeProducts

__all__ = ["NO_BATCH", "Kept", "Passes"]

NO_BATCH = "loader gave no batch, or none that weighs anything"


class Passes:
    """Passes over a loader; arguments and errors are those of `CurvatureOperator`."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, loader: Batches, reduction: str, batch_size: BatchSize | None
    ) -> None:
        check_loader(loader)
        self.model, self.loss_fn, self.loader, self.reduction = model, loss_fn, loader, reduction
        self._count = SampleCount(batch_size, model, loss_fn)
        self.random = RandomState(p.device for p in model.parameters())

    @property
    def device(self) -> torch.device:
        """Where batches go: to the model's first parameter."""
        return next(self.model.parameters()).device

    def visit(self, visit: Callable[[Any, Any, float], object], bar: str | None = None) -> None:
        """Call visit(x, y, weight) for every batch, from the same state of the model each time and with random numbers
        that are the same in every pass, and put both back whatever happens. bar: the name of one that is shown.
        """
        state = ModelState(self.model)
        with self.random.replayed():
            for x, y, weight in self._batches(bar):
                with state.kept():
                    visit(x, y, weight)

    def linearized(self, linearize: Callable[[Any, Any], Linearization], bar: str | None = None) -> Kept:
        """All batches, or an error and none."""
        state, kept = ModelState(self.model), Kept(self.model)
        with self.random.replayed():
            for x, y, weight in self._batches(bar):
                with state.kept(lending=True):
                    kept.add(linearize(x, y), weight, state.constants())
        kept.hold_values(self.model)
        return kept

    def _batches(self, bar: str | None) -> Iterator[tuple[Any, Any, float]]:
        self._count.begin()
        for batch in tqdm(self.loader, desc=bar, disable=bar is None, leave=False):
            x, y = (moved(part, self.device) for part in pair(batch))
            weight = self._count.of(x, y) if self.reduction == "mean" else 1.0
            if weight > 0:  # a mean over nothing is no number
                yield x, y, weight

    def check_deterministic(self, tolerance: float) -> None:
        """ValueError if a second pass is not of the same batches, in any order, with the same loss to `tolerance`."""
        first, second = self._seen(), self._seen()
        if first.batches == 0:
            raise ValueError(NO_BATCH)
        if not first.agrees(second, tolerance):
            raise ValueError(
                f"loader and model must be the same in every pass, got {first} and then {second}; does the loader end "
                "after a pass, shuffle with a generator of its own, or augment? Take its batches as a list; "
                "check_deterministic=False does without this check"
            )

    def _seen(self) -> _Seen:
        seen: list[_Seen] = []

        def see(x: Any, y: Any, weight: float) -> None:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                loss: Any = self.loss_fn(self.model(x), y)
            value = loss.detach().double().sum().item() if isinstance(loss, Tensor) else 0.0
            entries = [t.detach().double() for t in tensors((x, y)) if not t.is_complex()]
            total = math.fsum(t.sum().item() for t in entries)
            size = math.fsum(t.abs().sum().item() for t in entries)
            seen.append(_Seen(1, weight, total, size, value * weight))

        self.visit(see)
        return _Seen(*map(sum, zip(*seen, strict=True))) if seen else _Seen(0, 0.0, 0.0, 0.0, 0.0)


class _Seen(NamedTuple):
    """What is compared of two passes: sums over their batches, of entries and of their absolute values too."""

    batches: int
    weight: float
    total: float
    size: float
    loss: float

    def agrees(self, other: _Seen, tolerance: float) -> bool:
        return (
            self.batches == other.batches
            and math.isclose(self.weight, other.weight)
            and _close(self.total, other.total, 1e-9 * self.size)
            and _close(self.size, other.size, 1e-9 * self.size)
            and _close(self.loss, other.loss, tolerance * abs(self.loss))
        )

    def __str__(self) -> str:
        mean = self.loss / self.weight if self.weight else math.nan
        weigh = f"{self.batches} batches that weigh {self.weight:g}"
        return f"{weigh}, with entries of total {self.total:.9g} and loss {mean:.9g}"


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance or not (math.isfinite(a) or math.isfinite(b))


class Kept:
    """Linearised batches with their weights, for products while the model stays what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[tuple[Linearization, float]] = []
        self._modes = [(name, module, module.training) for name, module in model.named_modules()]
        # Given other memory, as by `p.data = …`, a parameter has no new version.
        self._memory = [(name, p, p.data_ptr()) for name, p in model.named_parameters()]
        self._values: list[tuple[str, Tensor, int, Tensor]] = []
        self._constants: dict[tuple[int, str], tuple[Held, int]] | None = None

    def add(self, at_batch: Linearization, weight: float, constants: list[Held]) -> None:
        """constants: the buffers that the pass left alone."""
        self.batches.append((at_batch, weight))
        found = {(id(held.holder), held.name): (held, held.value._version) for held in constants}
        before = found if self._constants is None else self._constants
        self._constants = {key: each for key, each in before.items() if key in found}

    def hold_values(self, model: nn.Module) -> None:
        """After the passes, which may clamp parameters: remember what these are."""
        # One written through `.data` has no new version; values are compared on a CPU, elsewhere that would be to wait.
        self._values = [
            (name, p, p._version, p.detach().clone())
            for name, p in model.named_parameters()
            if p.device.type == "cpu"
        ]

    @property
    def runs_model(self) -> bool:
        """Whether products may run parts of the model again, as checkpoints in autograd's graphs do."""
        return not all(isinstance(at_batch._products, TapeProducts) for at_batch, _ in self.batches)

    def check(self) -> None:
        """RuntimeError if the model is no longer what it was, where the linearised batches do not see that."""
        changed = [f"the mode of {name!r}" for name, module, mode in self._modes if module.training != mode]
        changed += [repr(name) for name, p, memory in self._memory if p.data_ptr() != memory]
        changed += [
            repr(name)
            for name, p, version, values in self._values
            if p._version == version and not torch.equal(p, values)
        ]
        constants = (self._constants or {}).values()
        changed += [
            repr(held.name) for held, version in constants if not held.there or held.value._version != version
        ]
        if changed:
            raise RuntimeError(
                f"model: {changed[0]} has changed since its batches were linearised: make a new operator, or one "
                "with keep=False"
            )

"""Standard and robust accuracy of a model on a data loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from blokern.attack import checks
from blokern.attack.base import Attack
from blokern.attack.losses import correct
from blokern.attack.modes import eval_mode, frozen_parameters
from blokern.attack.pgd import PGD
from blokern.attack.surrogate import SurrogateName
from blokern.distributed import Processes
from blokern.ops.types import Norm

__all__ = ["AnyAttack", "Evaluation", "evaluate"]

#: (x, y) -> x_adv, whoever wrote it.
AnyAttack: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_TOLERANCE = 1e-4  # of box and ball: other libraries' attacks round


@dataclass(frozen=True)
class Evaluation:
    """Accuracies are shares in [0, 1] of all `samples`; `seconds` is wall-clock time.

    robust_accuracy: samples that are classified correctly without an attack and under every attack, if there is one.
    per_attack: under each alone, by name.
    """

    clean_accuracy: float
    robust_accuracy: float
    per_attack: dict[str, float]
    samples: int
    seconds: float

    def __str__(self) -> str:
        attacks = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in self.per_attack.items())
        robust = f", RA {self.robust_accuracy:.2%} ({attacks})" if attacks else ""
        return f"SA {self.clean_accuracy:.2%}{robust}; {self.samples} samples in {self.seconds:.1f} s"


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    attack: AnyAttack | Mapping[str, AnyAttack] | None = None,
    *,
    eps: float | None = None,
    norm: Norm = "linf",
    clip_min: float = 0.0,
    clip_max: float = 1.0,
    check: bool = True,
    generator: torch.Generator | None = None,
    surrogate: SurrogateName | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Evaluation:
    """Standard accuracy, and robust accuracy under one attack or the worst case of several.

    loader: batches (x [N, ...] in [clip_min, clip_max], y [N] int64), moved to the model's device. attack: a
    callable (x, y) -> x_adv, several by name, {} for standard accuracy alone, or None for PGD-50-10: 50 steps of eps/4,
    10 restarts, at `eps` (default 8/255) in `norm`, as in the Fast-BAT paper's evaluation. Each attack gets the samples
    that are classified correctly without one. The model is in eval mode with its parameters frozen throughout, and
    restored after. An attack built on another model measures transfer.

    check: refuse an attack's output that is not finite, outside the box, or, if `eps` is given, outside the
    `norm` ball, by more than 1e-4 (relative to eps where eps > 1). generator, surrogate: for the default attack.
    progress: called as progress(batches done, batches or None if the loader has no length). processes: each evaluates
    the batches that its own loader gives, there may be none, and all get the result of them together.

    ValueError or TypeError: empty loader, images outside the box, bad labels, an attack's bad output (it is
    named)::

        result = evaluate(model, loader, {"pgd": PGD(model), "apgd": APGD(model)}, eps=8 / 255)
        print(result.clean_accuracy, result.robust_accuracy)
    """
    checks.check_model(model)
    checks.check_norm(norm)
    checks.check_box(clip_min, clip_max)
    if eps is not None:
        if isinstance(eps, Tensor):
            raise TypeError("eps must be a float, got a tensor")
        checks.check_radius("eps", eps)
    if attack is None:
        attack = _pgd_50_10(
            model, 8 / 255 if eps is None else eps, norm, clip_min, clip_max, generator, surrogate
        )
    attacks = _named(attack)

    started = time.perf_counter()
    batches = len(loader) if isinstance(loader, Sized) else None
    samples = clean = robust = 0
    held = dict.fromkeys(attacks, 0)
    with torch.inference_mode(False), torch.no_grad(), frozen_parameters(model), eval_mode(model):
        for done, (x, y) in enumerate(_batches(loader, model), start=1):
            largest_label = checks.check_batch(x, y, clip_min, clip_max)
            logits = model(x)
            checks.check_logits(logits, len(x), largest_label)
            sound = correct(logits, y)
            x, y = x[sound], y[sound]
            samples += len(sound)
            clean += len(y)
            standing = torch.ones_like(y, dtype=torch.bool)
            for name, one in attacks.items() if len(y) else ():
                x_adv = _attacked(name, one, model, x, y)
                if check:
                    _check_output(name, x_adv, x, eps, norm, clip_min, clip_max)
                holds = correct(model(x_adv), y)
                held[name] += int(holds.sum())
                standing &= holds
            robust += int(standing.sum())
            if progress is not None:
                progress(done, batches)
    totals = torch.tensor([samples, clean, robust, *held.values()])
    processes.sum_([totals])
    samples, clean, robust, *counts = totals.tolist()
    if samples == 0:
        raise ValueError("loader is empty: there is nothing to evaluate")
    return Evaluation(
        clean_accuracy=clean / samples,
        robust_accuracy=robust / samples,
        per_attack={name: count / samples for name, count in zip(held, counts, strict=True)},
        samples=samples,
        seconds=time.perf_counter() - started,
    )


def _pgd_50_10(
    model: nn.Module,
    eps: float,
    norm: Norm,
    clip_min: float,
    clip_max: float,
    generator: torch.Generator | None,
    surrogate: SurrogateName | None,
) -> PGD:
    return PGD(
        model,
        eps,
        step_size=eps / 4,
        steps=50,
        norm=norm,
        restarts=10,
        early_stop=True,
        clip_min=clip_min,
        clip_max=clip_max,
        generator=generator,
        surrogate=surrogate,
    )


def _named(attack: AnyAttack | Mapping[str, AnyAttack]) -> dict[str, AnyAttack]:
    if not isinstance(attack, Mapping):
        own = attack.name if isinstance(attack, Attack) else getattr(attack, "__name__", None)
        attack = {own or type(attack).__name__: attack}
    for name, one in attack.items():
        if not callable(one):
            raise TypeError(f"attack {name!r} must be a callable (x, y) -> x_adv, got {type(one).__name__}")
        if isinstance(one, Attack) and one.targeted:
            raise ValueError(f"attack {name!r} is targeted: it would take the true labels for its targets")
    return dict(attack)


def _batches(loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = next(model.parameters(), None)
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(f"loader must give batches (x, y), got {type(batch).__name__}")
        x, y = batch[0], batch[1]
        if parameter is not None and isinstance(x, Tensor) and isinstance(y, Tensor):
            x, y = x.to(parameter.device, non_blocking=True), y.to(parameter.device, non_blocking=True)
        yield x, y


def _attacked(name: str, attack: AnyAttack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    # Again around each call: attacks from elsewhere expect gradients on, and may change the model's mode.
    with torch.enable_grad(), frozen_parameters(model), eval_mode(model):
        x_adv = attack(x, y)
    if not isinstance(x_adv, Tensor):
        raise TypeError(f"attack {name!r} must return a tensor, got {type(x_adv).__name__}")
    if x_adv.shape != x.shape:
        raise ValueError(f"attack {name!r} returned shape {tuple(x_adv.shape)} for x of {tuple(x.shape)}")
    return x_adv.detach().to(x)


def _check_output(
    name: str, x_adv: Tensor, x: Tensor, eps: float | None, norm: Norm, clip_min: float, clip_max: float
) -> None:
    low, high = x_adv.aminmax()
    if not (clip_min - _TOLERANCE <= low and high <= clip_max + _TOLERANCE):  # NaN fails here too
        raise ValueError(
            f"attack {name!r} left the box [{clip_min}, {clip_max}]: values in [{low:.6g}, {high:.6g}]"
        )
    if eps is not None:
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
        size = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), order, dim=1).max()
        if not size <= eps + _TOLERANCE * max(1.0, eps):
            raise ValueError(f"attack {name!r} left the {norm} ball of radius {eps:.6g}: distance {size:.6g}")

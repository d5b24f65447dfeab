"""Standard and robust accuracy of a model on a data loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from blokern.attack import checks
from blokern.attack.base import Attack, warn_still
from blokern.attack.losses import Loss, LossName, correct
from blokern.attack.manner import DRAWS, Manner, observe
from blokern.attack.modes import eval_mode, frozen_parameters
from blokern.attack.outputs import logits_of
from blokern.attack.pgd import PGD
from blokern.attack.surrogate import SurrogateName
from blokern.distributed import Processes
from blokern.ops.types import Norm

__all__ = ["AnyAttack", "Evaluation", "evaluate"]

#: (x, y) -> x_adv, whoever wrote it.
AnyAttack: TypeAlias = Callable[[Tensor, Tensor], Tensor]


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
    loss: LossName | Loss | None = None,
    target_classes: int | None = None,
    eot: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> Evaluation:
    """Standard accuracy, and robust accuracy under one attack or the worst case of several.

    loader: batches (x [N, ...] in [clip_min, clip_max], y [N] int64), moved to the model's device. attack: a
    callable (x, y) -> x_adv, several by name, {} for standard accuracy alone, or None for PGD-50-10: 50 steps of eps/4,
    10 restarts, at `eps` (for "linf" 8/255 of the range by default) in `norm`, as in the Fast-BAT paper's evaluation.
    Each attack gets the samples that are classified correctly without one. The model is in eval mode with its
    parameters frozen throughout, and restored after. An attack built on another model measures transfer.

    check: refuse an attack's output that is not finite, outside the box, or, if `eps` is given, outside the
    `norm` ball, by more than 1e-4 of the range (or of eps, where that is larger). generator, surrogate, loss
    (default "ce"), target_classes: of the default attack, as :class:`blokern.attack.base.AttackOptions` has them.
    progress: called as progress(batches done, batches or None if the loader has no length). processes: each evaluates
    the batches that its own loader gives, there may be none, and all get the result of them together.

    Before the first attack the model is asked about a few images whether it answers the same twice. Where it does not,
    there is a warning, the attacks on it stop no sample early, and accuracies are means over 10 of its answers, or eot
    of them, if more; the default attack follows mean gradients of eot answers. A warning also tells how many samples
    had a gradient of zero, so that an attack could not move them; the loss "dlr" or "margin" may.

    ValueError or TypeError: empty loader, images outside the box (to 1e-4 of the range, which is clipped), bad labels,
    a model without logits of two classes or more, an attack's bad output (it is named), a setting of the default attack
    beside another. FloatingPointError: NaN or inf among the logits of images that nobody attacked::

        result = evaluate(model, loader, {"pgd": PGD(model), "apgd": APGD(model)}, eps=8 / 255)
        print(result.clean_accuracy, result.robust_accuracy)
    """
    checks.check_model(model)
    checks.check_norm(norm)
    checks.check_box(clip_min, clip_max)
    checks.check_count("eot", eot)
    if eps is not None:
        if isinstance(eps, Tensor):
            raise TypeError("eps must be a float, got a tensor")
        checks.check_eps(eps, norm, clip_min, clip_max)
    own = {"generator": generator, "surrogate": surrogate, "loss": loss, "target_classes": target_classes}
    how: dict[str, Any] = {word: value for word, value in own.items() if value is not None}
    if attack is None:
        how |= {"clip_min": clip_min, "clip_max": clip_max, "eot": eot}
        attack = PGD(model, eps, None, 50, norm, restarts=10, early_stop=True, **how)
    elif how:
        raise ValueError(f"{', '.join(how)}: of the default attack, but attack is given; build it with them")
    attacks = _named(attack)

    started = time.perf_counter()
    batches = _length(loader)
    samples, clean, robust = 0, 0.0, 0.0
    held, still = dict.fromkeys(attacks, 0.0), dict.fromkeys(attacks, 0)
    manner, draws = None, 1
    with torch.inference_mode(False), torch.no_grad(), frozen_parameters(model), eval_mode(model):
        for done, (x, y) in enumerate(_batches(loader, model), start=1):
            checks.check_batch(x, y)
            x, largest_label = checks.check_values(x, y, clip_min, clip_max)
            if manner is None and attacks and len(x):
                manner = observe(model, x)
                draws = max(eot, DRAWS) if manner.random else 1
                manner.warn("evaluate", draws, stacklevel=3)
            holds = _held(model, x, y, draws, largest_label, attacked=False)
            sound = holds > 0
            samples, clean = samples + len(x), clean + float(holds.sum())
            x, y, holds = x[sound], y[sound], holds[sound]
            standing = holds
            for name, one in attacks.items() if len(y) else ():
                x_adv, unmoved = _attacked(name, one, model, x, y, manner)
                if check:
                    _check_output(name, x_adv, x, eps, norm, clip_min, clip_max)
                under_attack = torch.minimum(holds, _held(model, x_adv, y, draws, largest_label))
                held[name] += float(under_attack.sum())
                still[name] += int(unmoved.sum())
                standing = torch.minimum(standing, under_attack)
            robust += float(standing.sum())
            if progress is not None:
                progress(done, batches)
    totals = torch.tensor([samples, clean, robust, *held.values(), *still.values()], dtype=torch.float64)
    processes.sum_([totals])
    samples, clean, robust, *counts = int(totals[0]), *totals[1:].tolist()
    if samples == 0:
        raise ValueError("loader is empty: there is nothing to evaluate")
    for name, count in zip(attacks, counts[len(attacks) :], strict=True):
        warn_still(name, int(count), samples)
    return Evaluation(
        clean_accuracy=clean / samples,
        robust_accuracy=robust / samples,
        per_attack={name: count / samples for name, count in zip(attacks, counts, strict=False)},
        samples=samples,
        seconds=time.perf_counter() - started,
    )


def _held(
    model: nn.Module, x: Tensor, y: Tensor, draws: int, largest_label: int, *, attacked: bool = True
) -> Tensor:
    """[N] float64: in which share of `draws` answers each sample is classified correctly."""
    held = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(draws):
        logits = logits_of(model(x.clone()))  # which a forward may change in place
        checks.check_logits(logits, len(x), largest_label)
        if not attacked:
            checks.check_finite_logits(logits)
        held += correct(logits, y)
    return held / draws


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


def _length(loader: Iterable[tuple[Tensor, Tensor]]) -> int | None:
    """In batches, if it is known; torch's DataLoader has a length in name only where its data set has none."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(f"loader must give batches (x, y), got {type(loader).__name__}")
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _batches(loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = next(model.parameters(), None)
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise TypeError(f"loader must give batches (x, y), got {type(batch).__name__}")
        x, y = batch[0], batch[1]
        if parameter is not None and isinstance(x, Tensor) and isinstance(y, Tensor):
            x, y = x.to(parameter.device, non_blocking=True), y.to(parameter.device, non_blocking=True)
        yield x, y


def _attacked(
    name: str, attack: AnyAttack, model: nn.Module, x: Tensor, y: Tensor, manner: Manner | None
) -> tuple[Tensor, Tensor]:
    """x_adv, and [N] bool, who had no gradient to follow, as blokern's own attacks know."""
    still = torch.zeros_like(y, dtype=torch.bool)
    # Again around each call: attacks from elsewhere expect gradients on, and may change the model's mode.
    with torch.enable_grad(), frozen_parameters(model), eval_mode(model):
        if isinstance(attack, Attack) and type(attack).__call__ is Attack.__call__:
            x_adv, still = attack.perturb(x, y, manner if attack.model is model else None)
        else:
            x_adv = attack(x.clone(), y.clone())  # whose answer is compared with x, which it may write to
    if not isinstance(x_adv, Tensor):
        raise TypeError(f"attack {name!r} must return a tensor, got {type(x_adv).__name__}")
    if x_adv.shape != x.shape:
        raise ValueError(f"attack {name!r} returned shape {tuple(x_adv.shape)} for x of {tuple(x.shape)}")
    return x_adv.detach().to(x), still


def _check_output(
    name: str, x_adv: Tensor, x: Tensor, eps: float | None, norm: Norm, clip_min: float, clip_max: float
) -> None:
    low, high = torch.stack(x_adv.aminmax()).tolist()
    near = checks.slack(clip_min, clip_max)
    if not (clip_min - near <= low and high <= clip_max + near):  # NaN fails here too
        raise ValueError(
            f"attack {name!r} left the box [{clip_min}, {clip_max}]: "
            f"values in [{checks.digits(low)}, {checks.digits(high)}]"
        )
    if eps is not None:
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
        size = float(torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), order, dim=1).max())
        if not size <= eps + checks.slack(clip_min, clip_max, eps):
            raise ValueError(
                f"attack {name!r} left the {norm} ball of radius {checks.digits(eps)}: distance {checks.digits(size)}"
            )

"""What every attack shares: the call, the walk of looks and steps, restarts, the worst perturbation found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Generic, Self, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.attack import checks
from blokern.attack.losses import Loss, LossName, correct, named_loss
from blokern.attack.modes import eval_mode, frozen_parameters
from blokern.attack.surrogate import Surrogate, SurrogateName, check_surrogate
from blokern.ops.types import Norm, PerSample

__all__ = ["Attack", "AttackOptions", "Batch", "Walk", "Worst", "loss_dtype", "rows"]


class AttackOptions(TypedDict, total=False):
    """The keywords that every attack takes.

    loss: what is climbed: "ce", "dlr", or a callable (logits [N, K], y [N]) -> [N]. targeted: y is the class
    to reach, and the loss is descended. clip_min, clip_max: the images' interval. generator: the source of
    random starts (default: torch's own). eval_mode: attack the model in eval mode, whatever mode it is in,
    and restore that afterwards; False attacks it as it stands, for adversarial training through BatchNorm's
    batch statistics. surrogate: "fp32" or "bf16" follows the gradients of a copy of the model that is made in each
    call, faster, in that type (:class:`blokern.attack.surrogate.Surrogate`); who is fooled, and where walks end, is
    judged by the model itself. For long attacks of float32 images in eval mode.
    """

    loss: LossName | Loss
    targeted: bool
    clip_min: float
    clip_max: float
    generator: torch.Generator | None
    eval_mode: bool
    surrogate: SurrogateName | None


class Samples:
    """Base of dataclasses: their tensors have a row a sample, and all samples share the rest."""

    def take(self, index: Tensor) -> Self:
        """The samples at `index`, [n] int64."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        kept = {name: v[index] if isinstance(v, Tensor) else v for name, v in kept.items()}
        return replace(self, **kept)  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(Samples):
    """The samples under attack. `index` is their place in the batch that the attack was called on."""

    index: Tensor
    x: Tensor
    y: Tensor
    eps: PerSample
    step_size: PerSample  # the first step's, where it adapts
    largest_label: int
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Walk(Samples):
    """Where an attack stands; `x_adv` [N, ...] is stepped in place."""

    x_adv: Tensor


W = TypeVar("W", bound=Walk)


@dataclass(frozen=True)
class Look(Samples):
    """What the model said at a point: the climbed loss [N], its gradient [N, ...], who is fooled [N] bool."""

    grad: Tensor
    loss: Tensor
    fooled: Tensor


class Worst:
    """Each sample's worst perturbation so far: one that fools beats one that does not, then the higher
    loss."""

    def __init__(self, everyone: Batch) -> None:
        x = everyone.x
        self.x_adv = x.clone()
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.loss = torch.full((len(x),), -torch.inf, dtype=loss_dtype(x), device=x.device)

    def update(self, batch: Batch, x_adv: Tensor, loss: Tensor, fooled: Tensor) -> None:
        """Takes the points `x_adv` of the samples in `batch` where they are worse than what was known."""
        everyone = len(batch) == len(self.loss)
        here = slice(None) if everyone else batch.index  # views of everyone's, copies of some's
        x_known, loss_known, fooled_known = self.x_adv[here], self.loss[here], self.fooled[here]
        worse = torch.where(fooled == fooled_known, loss > loss_known, fooled)
        torch.where(rows(worse, x_adv), x_adv, x_known, out=x_known)
        torch.where(worse, loss, loss_known, out=loss_known)
        torch.logical_or(fooled, fooled_known, out=fooled_known)
        if not everyone:
            self.x_adv[here], self.loss[here], self.fooled[here] = x_known, loss_known, fooled_known


class Attack(ABC, Generic[W]):
    """An attack on `model`, called as ``attack(x, y) -> x_adv``.

    x: [N, ...] floating-point in [clip_min, clip_max]; y: [N] int64, the labels, or the targets if
    `targeted`. x_adv: detached, of x's shape, dtype, device and memory format (contiguous where x is not
    dense), in the ball of radius `eps` around x (units of x) and in the box. `eps` is a float or a tensor
    [N].

    Only the gradient of the input is computed: the model's parameters are frozen during the call, and its
    training flags are as the option `eval_mode` says; both are restored exactly. Works under
    ``torch.no_grad()``, ``torch.inference_mode()`` and autocast (x_adv keeps x's dtype).

    ValueError or TypeError on bad settings, and in the call on images outside the box, labels that the model
    does not have, a model that returns no [N, K] logits or passes no gradient to its input.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: PerSample,
        step_size: PerSample,
        steps: int,
        norm: Norm,
        restarts: int,
        early_stop: bool,
        loss: LossName | Loss = "ce",
        targeted: bool = False,
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        generator: torch.Generator | None = None,
        eval_mode: bool = True,
        surrogate: SurrogateName | None = None,
    ) -> None:
        checks.check_model(model)
        checks.check_radius("eps", eps)
        checks.check_radius("step_size", step_size)
        checks.check_count("steps", steps)
        checks.check_norm(norm)
        checks.check_count("restarts", restarts)
        checks.check_box(clip_min, clip_max)
        check_surrogate(surrogate)
        if surrogate is not None and not eval_mode:
            raise ValueError(
                f"surrogate={surrogate!r} has BatchNorm's running statistics: it takes eval_mode=True"
            )
        self.model = model
        self.eps = eps
        self.step_size = step_size
        self.steps = steps
        self.norm: Norm = norm
        self.restarts = restarts
        self.early_stop = early_stop
        self.loss = loss
        self.targeted = targeted
        self.clip_min = clip_min
        self.clip_max = clip_max
        self.generator = generator
        self.eval_mode = eval_mode
        self.surrogate: SurrogateName | None = surrogate
        self._loss = named_loss(loss)
        self._guide: nn.Module | None = None  # the surrogate, during a call

    @property
    @abstractmethod
    def name(self) -> str:
        """As tables print it: "PGD-50-10" is 50 steps and 10 restarts."""

    def __repr__(self) -> str:
        eps = f"{self.eps:.4g}" if not isinstance(self.eps, Tensor) else f"[{len(self.eps)} values]"
        return f"{self.name}(norm={self.norm!r}, eps={eps})"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x_adv for the images x and the labels (or targets) y; see the class."""
        largest_label = checks.check_batch(x, y, self.clip_min, self.clip_max)
        with torch.inference_mode(False), torch.no_grad(), self._model_at_rest(), self._guided(x):
            everyone = Batch(
                index=torch.arange(len(x), device=x.device),
                x=x.detach(),
                y=y.clone() if y.is_inference() else y,  # autograd saves the labels
                eps=checks.per_sample("eps", self.eps, x),
                step_size=checks.per_sample("step_size", self.step_size, x),
                largest_label=largest_label,
            )
            return self._perturb(everyone) if len(x) else x.detach().clone()

    @contextmanager
    def _model_at_rest(self) -> Iterator[None]:
        with frozen_parameters(self.model):
            if self.eval_mode:
                with eval_mode(self.model):
                    yield
            else:
                yield

    @contextmanager
    def _guided(self, x: Tensor) -> Iterator[None]:
        if self.surrogate is not None and x.dtype != torch.float32:
            raise TypeError(f"x must be float32 for surrogate={self.surrogate!r}, got {x.dtype}")
        try:
            if self.surrogate is not None and len(x):
                self._guide = Surrogate(self.model, x.detach(), self.surrogate)
            yield
        finally:
            self._guide = None

    def _perturb(self, everyone: Batch) -> Tensor:
        worst = Worst(everyone)
        for batch in self._runs(everyone):
            if self.early_stop:
                batch = batch.take((~worst.fooled).nonzero().squeeze(1))
                if len(batch) == 0:
                    break
            self._run(batch, worst)
        return worst.x_adv

    def _runs(self, everyone: Batch) -> list[Batch]:
        """What each run attacks; APGD sets targets here."""
        return [everyone] * self.restarts

    def _run(self, batch: Batch, worst: Worst) -> None:
        self._finish(*self._climb(batch, self._start(batch), self.steps, worst), worst)

    def _climb(self, batch: Batch, x_adv: Tensor, steps: int, worst: Worst | None) -> tuple[Batch, W]:
        """`steps` times: look, report to `worst`, let the fooled leave if `early_stop`, step.

        Returns who has not left, and where they stand; the last point is not looked at.
        """
        walk = self._set_out(batch, x_adv, steps)
        for step in range(steps):
            look = self._look(batch, walk.x_adv)
            if worst is not None:
                look = self._confirmed(look, batch, walk.x_adv)
                worst.update(batch, walk.x_adv, look.loss, look.fooled)
                if self.early_stop and bool(look.fooled.any()):
                    standing = (~look.fooled).nonzero().squeeze(1)
                    batch, walk, look = batch.take(standing), walk.take(standing), look.take(standing)
                    if len(batch) == 0:
                        break
            self._step(batch, walk, look, step)
        return batch, walk

    def _confirmed(self, look: Look, batch: Batch, x_adv: Tensor) -> Look:
        """The look with those as fooled alone that the model itself is fooled by, if it was a surrogate's."""
        if self._guide is None:
            return look
        fooled = look.fooled.clone()
        claimed = fooled.nonzero().squeeze(1)
        if len(claimed):
            _, fooled[claimed] = self._judge(batch.take(claimed), x_adv[claimed])
        return replace(look, fooled=fooled)

    def _finish(self, batch: Batch, walk: W, worst: Worst) -> None:
        if len(batch):
            worst.update(batch, walk.x_adv, *self._judge(batch, walk.x_adv))

    @abstractmethod
    def _start(self, batch: Batch) -> Tensor:
        """A fresh x_adv to start from."""

    @abstractmethod
    def _set_out(self, batch: Batch, x_adv: Tensor, steps: int) -> W:
        """The state of a walk of `steps` steps from x_adv."""

    @abstractmethod
    def _step(self, batch: Batch, walk: W, look: Look, step: int) -> None:
        """Moves `walk` on, in place, after the look at step number `step`, from 0."""

    def _look(self, batch: Batch, x_adv: Tensor) -> Look:
        point = x_adv.detach().requires_grad_()  # the same memory: x_adv itself stays a plain buffer
        with torch.enable_grad():
            logits = self._logits(batch, point, self._guide)
            loss = self._objective(logits, batch)
            total = loss.sum()  # of independent samples: each gets its own gradient
        (grad,) = torch.autograd.grad(total, point, allow_unused=True) if total.requires_grad else (None,)
        if grad is None:
            raise ValueError("model: its logits pass no gradient to x (does it detach x, or set no_grad?)")
        if self.norm != "linf":  # sign(NaN) is 0 anyway, but one NaN makes a norm and so a sample NaN
            grad = grad.nan_to_num(nan=0.0)
        return Look(grad, loss.detach().to(loss_dtype(x_adv)), self._fooled(logits.detach(), batch))

    def _judge(self, batch: Batch, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """The climbed loss [N] and who is fooled [N], without a gradient."""
        logits = self._logits(batch, x_adv)
        return self._objective(logits, batch).to(loss_dtype(x_adv)), self._fooled(logits, batch)

    def _logits(self, batch: Batch, x_adv: Tensor, network: nn.Module | None = None) -> Tensor:
        logits: Tensor = (network or self.model)(x_adv)
        checks.check_logits(logits, len(batch), batch.largest_label)
        return logits

    def _objective(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = self._loss(logits, batch.y)
        if loss.shape != batch.y.shape:
            raise ValueError(f"loss must return shape {tuple(batch.y.shape)}, got {tuple(loss.shape)}")
        return -loss if self.targeted else loss

    def _fooled(self, logits: Tensor, batch: Batch) -> Tensor:
        reached = correct(logits, batch.y)
        return reached if self.targeted else ~reached

    def _random_start(self, batch: Batch, eps: PerSample) -> Tensor:
        return ops.random_start(
            batch.x,
            eps,
            norm=self.norm,
            clip_min=self.clip_min,
            clip_max=self.clip_max,
            generator=self.generator,
        )


def loss_dtype(x: Tensor) -> torch.dtype:
    """What a sample's losses and step sizes are kept in: float64 for float64 images, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows(values: Tensor, like: Tensor) -> Tensor:
    """[N] values, shaped to broadcast over the samples of `like` [N, ...]."""
    return values.view(-1, *([1] * (like.dim() - 1)))

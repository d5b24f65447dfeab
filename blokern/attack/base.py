"""What every attack shares: the call, the walk of looks and steps, restarts, the worst perturbation found."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.attack import checks
from blokern.attack.losses import Loss, LossName, correct, dlr, dlr_targeted, named_loss
from blokern.attack.manner import DRAWS, Manner, observe
from blokern.attack.modes import eval_mode, frozen_parameters
from blokern.attack.outputs import logits_of
from blokern.attack.samples import Batch, Look, Walk, Worst, loss_dtype
from blokern.attack.surrogate import Surrogate, SurrogateName, check_surrogate
from blokern.ops.types import Norm, PerSample

__all__ = ["Attack", "AttackOptions", "warn_still"]


class AttackOptions(TypedDict, total=False):
    """The keywords that every attack takes.

    loss: what is climbed: "ce", "dlr", "margin" (or "cw"), or a callable (logits [N, K], y [N]) -> [N]. targeted: y is
    the class to reach, and the loss is descended. target_classes: None, or the number of wrong classes to run towards,
    most likely first, `restarts` times each, with the targeted DLR loss for loss="dlr" and else the loss's negative at
    the target. clip_min, clip_max: the images' interval. generator: the source of random starts (default: torch's
    own). eval_mode: attack the model in eval mode, whatever mode it is in, and restore that afterwards; False attacks
    it as it stands, for adversarial training through BatchNorm's batch statistics. surrogate: "fp32" or "bf16" follows
    the gradients of a copy of the model that is made in each call, faster, in that type
    (:class:`blokern.attack.surrogate.Surrogate`); who is fooled, and where walks end, is judged by the model itself.
    For long attacks of float32 images in eval mode. eot: follow the mean gradient of so many answers a step, for a
    model that draws at random (expectation over transformation, Athalye et al., ICML 2018).
    """

    loss: LossName | Loss
    targeted: bool
    target_classes: int | None
    clip_min: float
    clip_max: float
    generator: torch.Generator | None
    eval_mode: bool
    surrogate: SurrogateName | None
    eot: int


W = TypeVar("W", bound=Walk)


class Attack(ABC, Generic[W]):
    """An attack on `model`, called as ``attack(x, y) -> x_adv``.

    x: [N, ...] floating-point in [clip_min, clip_max] (what rounding has put up to 1e-4 of the range outside is
    clipped); y: [N] int64, the labels, or the targets if `targeted`. x_adv: detached, of x's shape, dtype, device and
    memory format (contiguous where x is not dense), in the ball of radius `eps` around x (units of x) and in the box.
    `eps` is a float or a tensor [N]; None is 8/255 of the range, for "linf" alone. The model returns logits [N, K], or
    an object that has them as ``.logits`` or ``["logits"]``.

    Only the gradient of the input is computed: the model's parameters are frozen during the call, and its
    training flags are as the option `eval_mode` says; both are restored exactly. Works under
    ``torch.no_grad()``, ``torch.inference_mode()`` and autocast (x_adv keeps x's dtype).

    The settings are attributes of the same names. They are live: a call takes them, and checks them, as they are then.

    A warning tells how many samples had no gradient to follow, as it was zero: masked gradients make a model look
    robust. `early_stop` asks the model first, about a few images, whether it answers the same twice; where it does not,
    a warning says so, nobody leaves early, and verdicts are means over 10 answers.

    ValueError or TypeError on bad settings, and in the call on images outside the box, labels that the model
    does not have, a model that returns no [N, K] logits of two classes or more, or passes no gradient to its input.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: PerSample | None,
        step_size: PerSample | None,
        steps: int,
        norm: Norm,
        restarts: int,
        early_stop: bool,
        loss: LossName | Loss = "ce",
        targeted: bool = False,
        target_classes: int | None = None,
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        generator: torch.Generator | None = None,
        eval_mode: bool = True,
        surrogate: SurrogateName | None = None,
        eot: int = 1,
    ) -> None:
        self.model = model
        self._eps = eps
        self._step_size = step_size
        self.steps = steps
        self.norm: Norm = norm
        self.restarts = restarts
        self.early_stop = early_stop
        self.loss = loss
        self.targeted = targeted
        self.target_classes = target_classes
        self.clip_min = clip_min
        self.clip_max = clip_max
        self.generator = generator
        self.eval_mode = eval_mode
        self.surrogate: SurrogateName | None = surrogate
        self.eot = eot
        # During a call:
        self._guide: nn.Module | None = None  # the surrogate
        self._stops = False  # whether the fooled leave
        self._draws = 1  # answers of the model that a verdict is the mean of
        self._still: Tensor | None = None  # [N] bool: who had no gradient where a run began

    @property
    def eps(self) -> PerSample:
        """The radius in use."""
        return checks.default_eps(self.norm, self.clip_min, self.clip_max) if self._eps is None else self._eps

    @eps.setter
    def eps(self, eps: PerSample | None) -> None:
        self._eps = eps

    @property
    def step_size(self) -> PerSample:
        """The step size in use: of the first step, where it adapts."""
        return self._default_step_size() if self._step_size is None else self._step_size

    @step_size.setter
    def step_size(self, step_size: PerSample | None) -> None:
        self._step_size = step_size

    def _default_step_size(self) -> PerSample:
        return 0.25 * self.eps

    @property
    @abstractmethod
    def name(self) -> str:
        """As tables print it: "PGD-50-10" is 50 steps and 10 restarts."""

    @property
    def _loss_name(self) -> str:
        """As `name` has it: "T9-DLR" is towards nine targets."""
        kind = self.loss.upper() if isinstance(self.loss, str) else getattr(self.loss, "__name__", "custom")
        return kind if self.target_classes is None else f"T{self.target_classes}-{kind}"

    def __repr__(self) -> str:
        eps = f"{self.eps:.4g}" if not isinstance(self.eps, Tensor) else f"[{len(self.eps)} values]"
        return f"{self.name}(norm={self.norm!r}, eps={eps})"

    def _check(self) -> None:
        """ValueError or TypeError for settings that are none, or do not go together."""
        checks.check_model(self.model)
        checks.check_norm(self.norm)
        checks.check_box(self.clip_min, self.clip_max)
        checks.check_eps(self.eps, self.norm, self.clip_min, self.clip_max)
        checks.check_radius("step_size", self.step_size)
        for name in ("steps", "restarts", "eot"):
            checks.check_count(name, getattr(self, name))
        named_loss(self.loss)
        if self.target_classes is not None:
            checks.check_count("target_classes", self.target_classes)
            if self.targeted:
                raise ValueError("target_classes chooses the targets itself; use it with targeted=False")
        check_surrogate(self.surrogate)
        if self.surrogate is not None and not self.eval_mode:
            raise ValueError(
                f"surrogate={self.surrogate!r} has BatchNorm's running statistics: it takes eval_mode=True"
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x_adv for the images x and the labels (or targets) y; see the class."""
        x_adv, still = self.perturb(x, y)
        warn_still(self.name, int(still.sum()), len(x))
        return x_adv

    def perturb(self, x: Tensor, y: Tensor, manner: Manner | None = None) -> tuple[Tensor, Tensor]:
        """The call, without its warning: x_adv, and [N] bool, who had no gradient to follow where a run began.

        manner: of the model, where it is known::

            x_adv, still = attack.perturb(x, y)
        """
        self._check()
        checks.check_batch(x, y)
        x, largest_label = checks.check_values(x, y, self.clip_min, self.clip_max)
        with torch.inference_mode(False), torch.no_grad(), self._model_at_rest(), self._call(x, manner):
            everyone = Batch(
                index=torch.arange(len(x), device=x.device),
                x=x.detach(),
                y=y.clone() if y.is_inference() else y,  # autograd saves the labels
                eps=checks.per_sample("eps", self.eps, x),
                step_size=checks.per_sample("step_size", self.step_size, x),
                largest_label=largest_label,
            )
            x_adv = self._perturb(everyone) if len(x) else x.detach().clone()
            assert self._still is not None
            return x_adv, self._still

    @contextmanager
    def _model_at_rest(self) -> Iterator[None]:
        with frozen_parameters(self.model):
            if self.eval_mode:
                with eval_mode(self.model):
                    yield
            else:
                yield

    @contextmanager
    def _call(self, x: Tensor, manner: Manner | None) -> Iterator[None]:
        """What is known and kept during a call."""
        if self.surrogate is not None and x.dtype != torch.float32:
            raise TypeError(f"x must be float32 for surrogate={self.surrogate!r}, got {x.dtype}")
        if manner is None:
            manner = Manner()
            if self.early_stop and len(x):
                # In train mode batch statistics are what was asked for.
                manner = observe(self.model, x.detach(), mixing=self.eval_mode)
                manner.warn(self.name, max(self.eot, DRAWS), stacklevel=6)
        try:
            self._stops = self.early_stop and manner.steady
            self._draws = max(self.eot, DRAWS) if manner.random else 1
            self._still = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            if self.surrogate is not None and len(x):
                self._guide = Surrogate(self.model, x.detach(), self.surrogate)
            yield
        finally:
            self._guide, self._still, self._stops, self._draws = None, None, False, 1

    def _perturb(self, everyone: Batch) -> Tensor:
        worst = Worst(everyone)
        for number, batch in enumerate(self._runs(everyone)):
            if self._stops and number > 0:
                batch = batch.take((~worst.fooled).nonzero().squeeze(1))
                if len(batch) == 0:
                    break
            self._run(batch, worst)
        return worst.x_adv

    def _runs(self, everyone: Batch) -> list[Batch]:
        """What each run attacks: `restarts` times everyone, or towards each target."""
        if self.target_classes is None:
            return [everyone] * self.restarts
        return [
            replace(everyone, target=t)
            for t in self._targets(everyone, self.target_classes)
            for _ in range(self.restarts)
        ]

    def _targets(self, everyone: Batch, count: int) -> tuple[Tensor, ...]:
        """Each sample's most likely wrong classes, [N] each."""
        logits = self._logits(everyone, everyone.x)
        if count >= logits.shape[1]:
            raise ValueError(
                f"target_classes must be less than the model's {logits.shape[1]} classes, got {count}"
            )
        wrong = logits.scatter(1, everyone.y.unsqueeze(1), -torch.inf)
        return wrong.topk(count, dim=1).indices.unbind(1)

    def _run(self, batch: Batch, worst: Worst) -> None:
        self._finish(*self._climb(batch, self._start(batch), self.steps, worst), worst)

    def _climb(self, batch: Batch, x_adv: Tensor, steps: int, worst: Worst | None) -> tuple[Batch, W]:
        """`steps` times: look, report to `worst`, let the fooled leave if they may, step.

        Returns who has not left, and where they stand; the last point is not looked at. Of a model that draws a look
        is one answer, no verdict: nothing is reported.
        """
        walk = self._set_out(batch, x_adv, steps)
        for step in range(steps):
            look = self._look(batch, walk.x_adv)
            if step == 0:
                self._note(batch, look)
            if worst is not None and self._draws == 1:
                look = self._confirmed(look, batch, walk.x_adv)
                worst.update(batch, walk.x_adv, look.loss, look.fooled)
                if self._stops and bool(look.fooled.any()):
                    standing = (~look.fooled).nonzero().squeeze(1)
                    batch, walk, look = batch.take(standing), walk.take(standing), look.take(standing)
                    if len(batch) == 0:
                        break
            self._step(batch, walk, look, step)
        return batch, walk

    def _note(self, batch: Batch, look: Look) -> None:
        """Remembers who had no gradient; nothing is read back from the device."""
        assert self._still is not None
        if batch.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a replay would write where this call's notes were
        if len(batch) == len(self._still):
            self._still |= look.still()
        else:
            self._still[batch.index] |= look.still()

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
        if self.eot == 1:
            return self._glance(batch, x_adv)
        one, share = self._glance(batch, x_adv), 1.0 / self.eot
        grad, loss, fooled = share * one.grad, share * one.loss, share * one.fooled
        for _ in range(self.eot - 1):
            one = self._glance(batch, x_adv)
            grad, loss, fooled = grad + share * one.grad, loss + share * one.loss, fooled + share * one.fooled
        return Look(grad, loss, fooled > 0.5)

    def _glance(self, batch: Batch, x_adv: Tensor) -> Look:
        """One answer of the model, and its gradient."""
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
        """The climbed loss [N] and who is fooled [N], without a gradient: by most answers of a model that draws."""
        losses, fooled = [], []
        for _ in range(self._draws):
            logits = self._logits(batch, x_adv)
            losses.append(self._objective(logits, batch).to(loss_dtype(x_adv)))
            fooled.append(self._fooled(logits, batch))
        if self._draws == 1:
            return losses[0], fooled[0]
        return torch.stack(losses).mean(dim=0), torch.stack(fooled).double().mean(dim=0) > 0.5

    def _logits(self, batch: Batch, x_adv: Tensor, network: nn.Module | None = None) -> Tensor:
        # A copy, as a forward may begin in place (Normalize(inplace=True)) and would move the walk itself.
        logits = logits_of((network or self.model)(x_adv.clone()))
        checks.check_logits(logits, len(batch), batch.largest_label)
        return logits

    def _objective(self, logits: Tensor, batch: Batch) -> Tensor:
        loss_of = named_loss(self.loss)
        if batch.target is not None and loss_of is dlr:
            return dlr_targeted(logits, batch.y, batch.target)
        loss = loss_of(logits, batch.y if batch.target is None else batch.target)
        if loss.shape != batch.y.shape:
            raise ValueError(f"loss must return shape {tuple(batch.y.shape)}, got {tuple(loss.shape)}")
        return loss if batch.target is None and not self.targeted else -loss

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


def warn_still(name: str, count: int, samples: int) -> None:
    """Says, if there are any, how many of the samples had no gradient to follow."""
    if count:
        warnings.warn(
            f"{name}: the input gradient of {count} of {samples} samples is exactly zero, or NaN, where the attack "
            "begins, so that it cannot move them. Masked gradients, of saturated logits or rounding, make a model look "
            "robust: try loss='dlr' or 'margin'",
            stacklevel=3,
        )

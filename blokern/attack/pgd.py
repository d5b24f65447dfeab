"""Signed (or normalised) gradient steps: PGD, and its one-step relatives FGSM and N-FGSM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.attack import checks
from blokern.attack.attributes import Fixed
from blokern.attack.base import Attack, AttackOptions
from blokern.attack.graph import GraphedLoop
from blokern.attack.samples import Batch, Look, Walk, Worst, loss_dtype
from blokern.ops.types import Norm, PerSample

__all__ = ["FGSM", "NFGSM", "PGD"]


#: A batch gets smaller when the runs of more than this share of it are over: each size costs its kernels' set-up.
_IDLE = 1 / 8
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Runs(Walk):
    """Of each sample the run that it is in. step [N] int64: the number of its next step; left [N] int64: the runs that
    are not over yet; visited [N, steps + 1] int64: fingerprints of the points at earlier steps, and losses there."""

    step: Tensor
    left: Tensor
    visited: Tensor
    losses: Tensor


class PGD(Attack[Walk]):
    """Projected gradient descent: `steps` steps of `step_size` up the loss, each followed by a projection.

    Directions: sign(g) for "linf", g/‖g‖₂ for "l2", g/‖g‖₁ for "l1"; projection to the ball, then the box,
    for "l1" to both at once. Madry et al., ICLR 2018. `step_size` is a float or a tensor [N], in
    units of x; None is a quarter of eps.

    random_start: start uniformly in the ball, else at x. restarts: independent runs, which need a random
    start; each sample keeps its worst end point: one that fools before one that does not, then the higher
    loss. early_stop: samples leave the batch as soon as an iterate fools, and take no part in further steps
    and restarts, as in the evaluation of Fast-AT (Wong et al., ICLR 2020); the others keep the worst of all
    their iterates. From the same starts it finds every sample that the full run finds, at a fraction of the
    cost, and reads a few flags back from the device a step. An "linf" run also ends for a sample that is back at a
    point where it was, with the loss that it had there: from there on it would go round in a circle. A sample whose run
    has ended starts its next one at once, so that batches stay full.

    cuda_graph: all steps are one CUDA graph, captured in the first call for a shape, so that small models do
    not wait for the host. For images on CUDA, one run without early_stop, float eps and step_size, and a
    model that reads nothing back from the device and draws no new tensors' sizes; of an eval_mode=False
    model, running statistics also move in the capture.

    Further keywords: :class:`blokern.attack.base.AttackOptions`; the call: :class:`Attack`::

        attack = PGD(model, eps=8 / 255, step_size=2 / 255, steps=50, restarts=10, early_stop=True)
        x_adv = attack(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample | None = None,
        step_size: PerSample | None = None,
        steps: int = 10,
        norm: Norm = "linf",
        restarts: int = 1,
        random_start: bool = True,
        *,
        early_stop: bool = False,
        cuda_graph: bool = False,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            step_size=step_size,
            steps=steps,
            norm=norm,
            restarts=restarts,
            early_stop=early_stop,
            **options,
        )
        self.random_start = random_start
        self.cuda_graph = cuda_graph
        self._graphed = GraphedLoop()
        self._largest_label = -1  # that the graphed model was seen to have
        self._check()

    @property
    def name(self) -> str:
        kind = "" if self._loss_name == "CE" else f"-{self._loss_name}"
        return f"PGD{kind}-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "")

    def _check(self) -> None:
        super()._check()
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts={self.restarts} without random_start would repeat the same run; use restarts=1"
            )
        if self.cuda_graph:
            checks.check_graphed(
                *(self.restarts, self.early_stop, self.eps, self.step_size),
                *(self.surrogate, self.target_classes),
            )

    def _perturb(self, everyone: Batch) -> Tensor:
        if self.cuda_graph:
            return self._graphed_walk(everyone)
        if self.restarts == 1 and self.target_classes is None and not self._stops:
            # Nothing to compare: the end point, without a look at it.
            _, walk = self._climb(everyone, self._start(everyone), self.steps, None)
            return walk.x_adv
        return super()._perturb(everyone)

    def _runs(self, everyone: Batch) -> list[Batch]:
        runs = super()._runs(everyone)
        return runs[:: self.restarts] if self._stops else runs  # a hunt has all restarts

    def _run(self, batch: Batch, worst: Worst) -> None:
        if self._stops:
            self._hunt(batch, worst)
        else:
            self._finish(*self._climb(batch, self._start(batch), self.steps, None), worst)

    def _hunt(self, batch: Batch, worst: Worst) -> None:
        """early_stop: all runs of a sample, one after another, until one fools."""
        runs, first = self._set_off(batch), True
        while len(batch):
            look = self._look(batch, runs.x_adv)
            if first:
                self._note(batch, look)
                first = False
            look = self._confirmed(look, batch, runs.x_adv)
            worst.update(batch, runs.x_adv, look.loss, look.fooled)
            circles = self._circles(runs, look)
            ended = (runs.left > 0) & ~look.fooled & (circles | (runs.step == self.steps))
            if self._guide is not None:
                at_end = ended.nonzero().squeeze(1)
                self._finish(batch.take(at_end), runs.take(at_end), worst)
            runs.left = torch.where(worst.fooled[batch.index], 0, runs.left - ended.long())
            again = (ended & (runs.left > 0)).nonzero().squeeze(1)
            if len(again):
                runs.x_adv[again] = self._start(batch.take(again))
            moves = ~ended & (runs.left > 0)
            self._move(batch, runs.x_adv, look.grad, moves)
            runs.step = torch.where(ended, 0, runs.step + moves.long())
            standing = (runs.left > 0).nonzero().squeeze(1)
            if len(standing) == 0 or len(standing) < (1 - _IDLE) * len(batch):
                batch, runs = batch.take(standing), runs.take(standing)

    def _set_off(self, batch: Batch) -> _Runs:
        x_adv, n, points = self._start(batch), len(batch), self.steps + 1
        device = x_adv.device
        return _Runs(
            x_adv,
            step=torch.zeros(n, dtype=torch.int64, device=device),
            left=torch.full((n,), self.restarts, device=device),
            visited=torch.zeros(n, points, dtype=torch.int64, device=device),
            losses=torch.zeros(n, points, dtype=loss_dtype(x_adv), device=device),
        )

    def _circles(self, runs: _Runs, look: Look) -> Tensor:
        """[N] bool: who is where its run has been before; remembers where all are."""
        if self.norm != "linf":  # steps of a given length round: no point is met twice
            return torch.zeros_like(look.fooled)
        here, now = _fingerprints(runs.x_adv).unsqueeze(1), runs.step.unsqueeze(1)
        loss = look.loss.unsqueeze(1)
        runs.visited.scatter_(1, now, here)
        runs.losses.scatter_(1, now, loss)
        earlier = torch.arange(self.steps + 1, device=here.device) < now
        # With the loss that it had there, but for the rounding of another batch: a model that draws does not circle.
        alike = torch.isclose(runs.losses, loss, rtol=1e-5, atol=1e-6)
        visits = earlier & (runs.visited == here)
        return visits.any(dim=1) & ~(visits & ~alike).any(dim=1)

    def _graphed_walk(self, everyone: Batch) -> Tensor:
        checks.check_on_cuda(everyone.x)
        if everyone.largest_label > self._largest_label:  # a replay looks at no label
            self._logits(everyone, everyone.x)
            self._largest_label = everyone.largest_label

        def run(x: Tensor, y: Tensor, x_adv: Tensor) -> None:
            self._climb(replace(everyone, x=x, y=y), x_adv, self.steps, None)

        settings = (
            *(self.model, self.loss, self.targeted, self.eot, self.steps, self.norm),
            *(everyone.eps, everyone.step_size, self._reach(everyone), self.clip_min, self.clip_max),
        )
        return self._graphed(run, self.model, settings, everyone.x, everyone.y, self._start(everyone))

    def _start(self, batch: Batch) -> Tensor:
        return self._random_start(batch, batch.eps) if self.random_start else batch.x.clone()

    def _set_out(self, batch: Batch, x_adv: Tensor, steps: int) -> Walk:
        return Walk(x_adv)

    def _step(self, batch: Batch, walk: Walk, look: Look, step: int) -> None:
        self._move(batch, walk.x_adv, look.grad)

    def _move(self, batch: Batch, x_adv: Tensor, grad: Tensor, active: Tensor | None = None) -> None:
        ops.pgd_step_(
            x_adv,
            batch.x,
            grad,
            batch.step_size,
            self._reach(batch),
            norm=self.norm,
            clip_min=self.clip_min,
            clip_max=self.clip_max,
            active=active,
        )

    def _reach(self, batch: Batch) -> PerSample:
        """The radius that a step is projected back to."""
        return batch.eps


def _fingerprints(x: Tensor) -> Tensor:
    """[N] int64 of the bits of each sample of x [N, ...]: Σ bits·k mod 2⁶⁴, k random and odd, so that float32 points
    that differ have the same one with a chance of 2⁻³¹ at most."""
    bits = x.flatten(1).view(_BITS[x.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = 2 * torch.randint(2**62, bits.shape[1:], generator=generator) + 1
    return (bits * factors.to(x.device)).sum(dim=1)


class FGSM(PGD):
    """Fast gradient sign method: one step of `step_size` (default: eps) from x. Goodfellow et al., ICLR 2015.

    With ``random_start=True`` and a step of 1.25 eps: the attack of Fast-AT (Wong et al., ICLR 2020)::

        x_adv = FGSM(model, eps=8 / 255)(x, y)
        x_adv = FGSM(model, eps=8 / 255, step_size=10 / 255, random_start=True)(x, y)
    """

    steps = Fixed[int]("it is one step; take PGD for more")

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample | None = None,
        step_size: PerSample | None = None,
        norm: Norm = "linf",
        random_start: bool = False,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(model, eps, step_size, 1, norm, random_start=random_start, **options)

    @property
    def name(self) -> str:
        return "FGSM" if self._loss_name == "CE" else f"FGSM-{self._loss_name}"

    def _default_step_size(self) -> PerSample:
        return self.eps


class NFGSM(PGD):
    """N-FGSM: uniform noise of radius noise·eps, clipped to the box, then one step that is not projected
    back.

    So x_adv lies in the box and within noise·eps + step_size of x, not within eps: an attack to train with.
    `step_size` defaults to eps. de Jorge et al., NeurIPS 2022, and their released code::

        x_adv = NFGSM(model, eps=8 / 255, noise=2.0)(x, y)
    """

    steps = Fixed[int]("it is one step; take PGD for more")
    random_start = Fixed[bool]("its noise is the start; noise=0.0 starts at x")

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample | None = None,
        step_size: PerSample | None = None,
        noise: float = 2.0,
        norm: Norm = "linf",
        **options: Unpack[AttackOptions],
    ) -> None:
        self.noise = noise
        super().__init__(model, eps, step_size, 1, norm, **options)

    @property
    def name(self) -> str:
        return "N-FGSM" if self._loss_name == "CE" else f"N-FGSM-{self._loss_name}"

    def _default_step_size(self) -> PerSample:
        return self.eps

    def _check(self) -> None:
        super()._check()
        if isinstance(self.noise, Tensor):
            raise TypeError("noise must be a float, relative to eps, got a tensor")
        checks.check_radius("noise", self.noise)

    def _start(self, batch: Batch) -> Tensor:
        return self._random_start(batch, self.noise * batch.eps)

    def _reach(self, batch: Batch) -> PerSample:
        return self.noise * batch.eps + batch.step_size  # as far as the step can lead: nothing is cut off

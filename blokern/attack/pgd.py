"""Signed (or normalised) gradient steps: PGD, and its one-step relatives FGSM and N-FGSM."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

from torch import Tensor, nn

from blokern import ops
from blokern.attack import checks
from blokern.attack.base import Attack, AttackOptions, Batch, Look, Walk, Worst
from blokern.attack.graph import GraphedLoop
from blokern.ops.types import Norm, PerSample

__all__ = ["FGSM", "NFGSM", "PGD"]


class PGD(Attack[Walk]):
    """Projected gradient descent: `steps` steps of `step_size` up the loss, each followed by a projection.

    Directions: sign(g) for "linf", g/‖g‖₂ for "l2", g/‖g‖₁ for "l1"; projection to the ball, then the box,
    for "l1" to both at once. Madry et al., ICLR 2018. `step_size` is a float or a tensor [N], in
    units of x.

    random_start: start uniformly in the ball, else at x. restarts: independent runs, which need a random
    start; each sample keeps its worst end point: one that fools before one that does not, then the higher
    loss. early_stop: samples leave the batch as soon as an iterate fools, and take no part in further steps
    and restarts, as in the evaluation of Fast-AT (Wong et al., ICLR 2020); the others keep the worst of all
    their iterates. From the same starts it finds every sample that the full run finds, at a fraction of the
    cost, and reads one flag back from the device a step.

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
        eps: PerSample = 8 / 255,
        step_size: PerSample = 2 / 255,
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
        if restarts > 1 and not random_start:
            raise ValueError(
                f"restarts={restarts} without random_start would repeat the same run; use restarts=1"
            )
        self.random_start = random_start
        if cuda_graph:
            checks.check_graphed(restarts, early_stop, eps, step_size)
        self._graphed = GraphedLoop() if cuda_graph else None
        self._largest_label = -1  # that the model was seen to have

    @property
    def name(self) -> str:
        return f"PGD-{self.steps}-{self.restarts}" if self.restarts > 1 else f"PGD-{self.steps}"

    def _perturb(self, everyone: Batch) -> Tensor:
        if self._graphed is not None:
            return self._graphed_walk(self._graphed, everyone)
        if (
            self.restarts == 1 and not self.early_stop
        ):  # nothing to compare: the end point, without a look at it
            _, walk = self._climb(everyone, self._start(everyone), self.steps, None)
            return walk.x_adv
        return super()._perturb(everyone)

    def _graphed_walk(self, graphed: GraphedLoop, everyone: Batch) -> Tensor:
        checks.check_on_cuda(everyone.x)
        if everyone.largest_label > self._largest_label:  # a replay looks at no label
            self._logits(everyone, everyone.x)
            self._largest_label = everyone.largest_label

        def run(x: Tensor, y: Tensor, x_adv: Tensor) -> None:
            self._climb(replace(everyone, x=x, y=y), x_adv, self.steps, None)

        settings = (
            self.steps,
            self.norm,
            self.eps,
            self.step_size,
            self.clip_min,
            self.clip_max,
            self.targeted,
        )
        return graphed(run, self.model, settings, everyone.x, everyone.y, self._start(everyone))

    def _run(self, batch: Batch, worst: Worst) -> None:
        along_the_way = worst if self.early_stop else None
        batch, walk = self._climb(batch, self._start(batch), self.steps, along_the_way)
        self._finish(batch, walk, worst)

    def _start(self, batch: Batch) -> Tensor:
        return self._random_start(batch, batch.eps) if self.random_start else batch.x.clone()

    def _set_out(self, batch: Batch, x_adv: Tensor, steps: int) -> Walk:
        return Walk(x_adv)

    def _step(self, batch: Batch, walk: Walk, look: Look, step: int) -> None:
        ops.pgd_step_(
            walk.x_adv,
            batch.x,
            look.grad,
            batch.step_size,
            self._reach(batch),
            norm=self.norm,
            clip_min=self.clip_min,
            clip_max=self.clip_max,
        )

    def _reach(self, batch: Batch) -> PerSample:
        """The radius that a step is projected back to."""
        return batch.eps


class FGSM(PGD):
    """Fast gradient sign method: one step of `step_size` (default: eps) from x. Goodfellow et al., ICLR 2015.

    With ``random_start=True`` and a step of 1.25 eps: the attack of Fast-AT (Wong et al., ICLR 2020)::

        x_adv = FGSM(model, eps=8 / 255)(x, y)
        x_adv = FGSM(model, eps=8 / 255, step_size=10 / 255, random_start=True)(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample = 8 / 255,
        step_size: PerSample | None = None,
        norm: Norm = "linf",
        random_start: bool = False,
        **options: Unpack[AttackOptions],
    ) -> None:
        step_size = eps if step_size is None else step_size
        super().__init__(model, eps, step_size, 1, norm, random_start=random_start, **options)

    @property
    def name(self) -> str:
        return "FGSM"


class NFGSM(PGD):
    """N-FGSM: uniform noise of radius noise·eps, clipped to the box, then one step that is not projected
    back.

    So x_adv lies in the box and within noise·eps + step_size of x, not within eps: an attack to train with.
    `step_size` defaults to eps. de Jorge et al., NeurIPS 2022, and their released code::

        x_adv = NFGSM(model, eps=8 / 255, noise=2.0)(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample = 8 / 255,
        step_size: PerSample | None = None,
        noise: float = 2.0,
        norm: Norm = "linf",
        **options: Unpack[AttackOptions],
    ) -> None:
        if isinstance(noise, Tensor):
            raise TypeError("noise must be a float, relative to eps, got a tensor")
        checks.check_radius("noise", noise)
        super().__init__(model, eps, eps if step_size is None else step_size, 1, norm, **options)
        self.noise = noise

    @property
    def name(self) -> str:
        return "N-FGSM"

    def _start(self, batch: Batch) -> Tensor:
        return self._random_start(batch, self.noise * batch.eps)

    def _reach(self, batch: Batch) -> PerSample:
        return self.noise * batch.eps + batch.step_size  # as far as the step can lead: nothing is cut off

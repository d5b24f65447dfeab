"""Auto-PGD: a step size that adapts itself to each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.attack.base import Attack, AttackOptions
from blokern.attack.samples import Batch, Look, Walk, Worst, loss_dtype, rows
from blokern.ops.types import Norm, PerSample

__all__ = ["APGD"]

_MOMENTUM = 0.75


@dataclass
class _APGDWalk(Walk):
    """In the paper's letters: x_adv x⁽ᵏ⁾, x_prev x⁽ᵏ⁻¹⁾, x_best x_max, loss_best f_max, step_size η."""

    x_prev: Tensor
    x_best: Tensor
    grad_best: Tensor
    loss_best: Tensor
    loss_last: Tensor
    loss_checked: Tensor  # f_max at the last checkpoint
    rises: Tensor  # steps since the last checkpoint that raised the loss
    halved: Tensor  # at the last checkpoint
    step_size: Tensor
    keep: Tensor  # L1: how many gradient entries a step follows
    sparsity: Tensor  # L1: ‖x_best − x‖₀ at the last checkpoint
    checkpoints: dict[int, int]  # step number -> steps since the checkpoint before


class APGD(Attack[_APGDWalk]):
    """Auto-PGD: Croce & Hein, ICML 2020; for "l1" Croce & Hein, ICML 2021 ("Mind the box").

    Needs no step size: it starts at 2 eps ("l1": eps) and at checkpoints, sample by sample, is halved where
    less than a share `rho` of the steps raised the loss, or where neither the step size nor the best loss has
    moved; the walk then goes on from the best point. "l1" steps along the largest gradient entries only, and
    adapts their number. Where paper and released code differ, the comments say which is followed.

    Each sample gets the worst of all iterates of all runs: one that fools before one that does not, then the
    higher loss. early_stop: fooled samples leave the batch at once, which costs one flag read back from the
    device a step.

    AutoAttack's APGD-CE and APGD-T::

        apgd_ce = APGD(model, eps=8 / 255, restarts=5, early_stop=True)
        apgd_t = APGD(model, eps=8 / 255, loss="dlr", target_classes=9, early_stop=True)

    multi_radius: "l1" only, as in AutoAttack: 30 % of the steps at 3 eps, 30 % at 2 eps and the rest at eps,
    each stage from the best point of the one before (2021 paper).

    Further keywords: :class:`blokern.attack.base.AttackOptions`; the call: :class:`Attack`. ValueError in the
    call if the model has too few classes: 3 for "dlr", 4 for its targeted form, target_classes + 1.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: PerSample | None = None,
        steps: int = 100,
        norm: Norm = "linf",
        restarts: int = 1,
        *,
        rho: float = 0.75,
        multi_radius: bool = False,
        early_stop: bool = False,
        **options: Unpack[AttackOptions],
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            step_size=None,
            steps=steps,
            norm=norm,
            restarts=restarts,
            early_stop=early_stop,
            **options,
        )
        self.rho = rho
        self.multi_radius = multi_radius
        self._check()

    @property
    def step_size(self) -> PerSample:
        """The first steps'."""
        return self.eps if self.norm == "l1" else 2.0 * self.eps

    @step_size.setter
    def step_size(self, step_size: PerSample | None) -> None:
        raise AttributeError("APGD.step_size follows eps: set eps, or take PGD")

    @property
    def name(self) -> str:
        return f"APGD-{self._loss_name}-{self.steps}" + (f"-{self.restarts}" if self.restarts > 1 else "")

    @property
    def _wide_steps(self) -> int:
        """Steps in each of the stages at 3 eps and at 2 eps."""
        return math.ceil(0.3 * self.steps)

    def _check(self) -> None:
        super()._check()
        if not 0.0 <= self.rho <= 1.0:
            raise ValueError(f"rho must be a share of the steps, in [0, 1], got {self.rho}")
        if self.norm == "l1" and not math.isfinite(self.clip_max - self.clip_min):
            raise ValueError(
                f"norm='l1' starts from noise as wide as the images' range, which must be finite, "
                f"got clip_min={self.clip_min}, clip_max={self.clip_max}"
            )
        if self.multi_radius and self.norm != "l1":
            raise ValueError(f"multi_radius is for norm='l1', got norm={self.norm!r}")
        if self.multi_radius and self.steps <= 2 * self._wide_steps:
            raise ValueError(f"multi_radius needs steps >= 5, got {self.steps}: none would be left at eps")

    def _run(self, batch: Batch, worst: Worst) -> None:
        if not self.multi_radius:
            return super()._run(batch, worst)
        stages = [
            replace(batch, eps=factor * batch.eps, step_size=factor * batch.step_size)
            for factor in (3.0, 2.0)
        ]
        x_adv = self._start(stages[0])
        for stage in stages:  # outside the ball of radius eps: nothing here counts, and nobody leaves
            self._project_(x_adv, stage)
            _, walk = self._climb(stage, x_adv, self._wide_steps, None)
            loss, _ = self._judge(stage, walk.x_adv)
            x_adv = torch.where(rows(loss > walk.loss_best, x_adv), walk.x_adv, walk.x_best)
        self._project_(x_adv, batch)
        self._finish(*self._climb(batch, x_adv, self.steps - 2 * self._wide_steps, worst), worst)

    def _finish(self, batch: Batch, walk: _APGDWalk, worst: Worst) -> None:
        super()._finish(batch, walk, worst)
        if self._draws > 1 and len(batch):  # the iterates have not been reported
            worst.update(batch, walk.x_best, *self._judge(batch, walk.x_best))

    def _start(self, batch: Batch) -> Tensor:
        if self.norm != "l1":
            return self._random_start(batch, batch.eps)
        # As released: a projected Gaussian is sparse, as the L1 walk's points are; a uniform one is dense.
        noise = torch.empty_like(batch.x).normal_(generator=self.generator)
        x_adv = batch.x + (self.clip_max - self.clip_min) * noise
        self._project_(x_adv, batch)
        return x_adv

    def _project_(self, x_adv: Tensor, batch: Batch) -> None:
        ops.project_(
            x_adv, batch.x, batch.eps, norm=self.norm, clip_min=self.clip_min, clip_max=self.clip_max
        )

    def _set_out(self, batch: Batch, x_adv: Tensor, steps: int) -> _APGDWalk:
        n, size = len(batch), x_adv[0].numel()
        a_loss = torch.full((n,), -torch.inf, dtype=loss_dtype(x_adv), device=x_adv.device)
        sparsity = torch.full((n,), size, device=x_adv.device)
        keep = torch.full_like(sparsity, math.ceil(0.2 * size))
        if self.multi_radius:
            sparsity = _sparsity(x_adv, batch.x)
            keep = _fewer(sparsity)
        return _APGDWalk(
            x_adv,
            x_prev=x_adv.clone(),
            x_best=x_adv.clone(),
            grad_best=torch.zeros_like(x_adv),
            loss_best=a_loss,
            loss_last=-a_loss,  # the first look is no rise, but the first step may be, as in the paper
            loss_checked=a_loss.clone(),
            rises=torch.zeros_like(sparsity),
            halved=torch.ones_like(a_loss, dtype=torch.bool),  # released: so condition 2 skips one checkpoint
            step_size=torch.zeros_like(a_loss) + batch.step_size,
            keep=keep,
            sparsity=sparsity,
            checkpoints=_regular(steps) if self.norm == "l1" else _checkpoints(steps),
        )

    def _step(self, batch: Batch, walk: _APGDWalk, look: Look, step: int) -> None:
        better = look.loss > walk.loss_best
        _replace_(walk.x_best, walk.x_adv, better)
        _replace_(walk.grad_best, look.grad, better)
        _replace_(walk.loss_best, look.loss, better)
        walk.rises += look.loss > walk.loss_last
        walk.loss_last = look.loss

        grad = look.grad
        if step in walk.checkpoints:
            window = walk.checkpoints[step]
            back = self._thin_out(batch, walk) if self.norm == "l1" else self._halve(walk, window)
            _replace_(walk.x_adv, walk.x_best, back)
            grad = torch.where(rows(back, grad), walk.grad_best, grad)

        ops.apgd_step_(
            walk.x_adv,
            walk.x_prev,
            batch.x,
            grad,
            walk.step_size,
            batch.eps,
            momentum=1.0 if step == 0 or self.norm == "l1" else _MOMENTUM,
            norm=self.norm,
            clip_min=self.clip_min,
            clip_max=self.clip_max,
            keep=walk.keep if self.norm == "l1" else None,
        )

    def _halve(self, walk: _APGDWalk, window: int) -> Tensor:
        """Conditions 1 and 2 of the 2020 paper. [N] bool: whose step is halved, and who goes back to
        x_best."""
        oscillates = walk.rises <= self.rho * window  # as released; the paper has <
        stalls = ~walk.halved & (walk.loss_checked >= walk.loss_best)
        walk.halved = oscillates | stalls
        walk.loss_checked = walk.loss_best.clone()
        walk.rises = torch.zeros_like(walk.rises)
        walk.step_size = torch.where(walk.halved, 0.5 * walk.step_size, walk.step_size)
        return walk.halved

    def _thin_out(self, batch: Batch, walk: _APGDWalk) -> Tensor:
        """The L1 checkpoint. [N] bool: whose best point got sparser, and who goes back to it at full step."""
        sparsity = _sparsity(walk.x_best, batch.x)
        sparser = 20 * sparsity < 19 * walk.sparsity
        first = torch.zeros_like(walk.step_size) + batch.step_size
        slower = torch.maximum(walk.step_size / 1.5, first / 10.0)
        walk.step_size = torch.where(sparser, first, slower)
        walk.keep, walk.sparsity = _fewer(sparsity), sparsity
        return sparser


def _checkpoints(steps: int) -> dict[int, int]:
    """{w_j: w_j − w_{j−1}}, w_j = p_j·steps, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)."""
    window, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, step = {}, window
    while step <= steps:
        found[step] = window
        window = max(window - shorter, least)
        step += window
    return found


def _regular(steps: int) -> dict[int, int]:
    """The L1 attack's checkpoints: every 4 % of the steps."""
    window = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(window, steps + 1, window), window)


def _sparsity(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv != x).flatten(1).sum(dim=1)


def _fewer(sparsity: Tensor) -> Tensor:
    """⌈sparsity / 1.5⌉, at least one entry."""
    return ((2 * sparsity + 2) // 3).clamp(min=1)


def _replace_(values: Tensor, new: Tensor, where: Tensor) -> None:
    torch.where(rows(where, values), new, values, out=values)

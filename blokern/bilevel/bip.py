"""BiP: pruning as bi-level optimisation, of which no second derivative is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blokern import ops
from blokern._names import unknown_name
from blokern.bilevel.implicit import MaskedLayer, Solver, dense_grad, implicit_gradient
from blokern.bilevel.loss import ModelLoss, as_batch, cross_entropy, loss_of, map_tensors, tensors_in
from blokern.bilevel.masking import PruningSettings, dense_twin, prunable, select, whole_layers
from blokern.bilevel.settings import Precision, autocast, check_numbers, check_precision
from blokern.bilevel.step import StepResult, check_types
from blokern.curvature import cg_solve, neumann_solve
from blokern.distributed import Processes
from blokern.distributed.processes import running_statistics
from blokern.ops.masked_weight import masked_weight
from blokern.sparse import SparseMask, sparsify

__all__ = ["BiP", "BiPSettings", "ModelLoss", "cross_entropy"]

Mode: TypeAlias = Literal["paper", "released"]
Implicit: TypeAlias = Literal["bilinear", "cg", "neumann"]


@dataclass(frozen=True, kw_only=True)
class BiPSettings(PruningSettings):
    """`PruningSettings` of `BiP`.

    Args:
        mode: "paper", or "released" for what the authors' code does, to reproduce it.
        gamma: γ of the lower level's regulariser, which the implicit term is divided by; inf: no such term. None is
            1, or 10⁴ in mode "released", whose code calls 1/γ lr2.
        score_lr: learning rate of the scores at first; the paper's is a tenth of it from 50 % of the run on, a
            hundredth from 75 % on.
        score_momentum, score_weight_decay: momentum and weight decay of SGD on the scores.
        implicit: of the lower level's derivative by the mask, (M H M + γ I)⁻¹ with the Hessian H = ∇²_w ℓ: "bilinear"
            takes H for zero, as the paper does, and needs no product with it; "cg" and "neumann" solve the system,
            "neumann" by a series that wants implicit_scale below 2 / (γ + H's largest eigenvalue).
        implicit_steps: products with H a step, at most.
        implicit_scale: scale of the series.
        precision: fp32, or bf16 for forwards under bfloat16 autocast.
    """

    mode: Mode = "paper"
    gamma: float | None = None
    score_lr: float = 0.1
    score_momentum: float = 0.9
    score_weight_decay: float = 0.0
    implicit: Implicit = "bilinear"
    implicit_steps: int = 10
    implicit_scale: float = 0.1
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)
        check_precision(self.precision)
        if self.mode not in get_args(Mode):
            raise unknown_name("mode", self.mode, get_args(Mode))
        if self.implicit not in get_args(Implicit):
            raise unknown_name("implicit", self.implicit, get_args(Implicit))
        if self.implicit != "bilinear" and (self.mode != "paper" or math.isinf(self.implicit_gamma)):
            raise ValueError(f'implicit="{self.implicit}" needs mode "paper" and a finite gamma')

    @property
    def implicit_gamma(self) -> float:
        """The γ in use."""
        if self.gamma is None:
            return 1.0 if self.mode == "paper" else 1e4
        return self.gamma


class BiP:
    """Bi-level pruning: weights θ (lower level) and scores s (upper level) learn in turn, each step on its own batch.

    With m the mask, w = m ⊙ θ and g = ∇_w ℓ:

    1. θ takes the optimizer's step for the gradient m ⊙ g of the lower batch.
    2. g anew, dense, at the new θ on the upper batch; s ← s − score_lr · (θ − m ⊙ g / γ) ⊙ g, with momentum.
    3. m keeps the highest scores, or the filters or channels of the largest norms of s.

    In sweeps over the network, of which a dense training step has three, that is 1 + 5d at density d: only the dense g
    of step 2 works for pruned weights. BatchNorm's running statistics move twice a step; its parameters and the biases
    learn at the lower level alone. Scores start as √(6 / fan_in) · |θ| / max|θ|, so give a trained model.

    The model's weights are w, zeros where m is 0. `theta` has the pruned ones, which the optimizer's step moves with
    the others, by momentum and weight decay, and which come back where the mask does.

    mode "released": the scores are θ itself, with the score gradient |θ| ⊙ g − (θ ⊙ g)² / γ and magnitudes ranked;
    that code also decays parameters whose gradient is zero once more, which is left out here.

    With `implicit` "cg" or "neumann", step 2 descends along θ ⊙ (g − H q) − g ⊙ q, q = (M H M + γ I)⁻¹ (m ⊙ g), whose H
    is that of the upper batch; metrics then have "implicit_residual", ‖m ⊙ g − (M H M + γ I) q‖ / ‖m ⊙ g‖, which tells
    whether the steps were enough.

    Pruned are the layers that :func:`blokern.bilevel.masking.prunable` finds and whose weights require grad.

    Of several `processes`, each gives its part of both batches; gradients, g and products with H are averaged, so that
    weights, scores and masks are the same everywhere, and those of one process that has the whole batches.

    loss_fn: the loss of both levels, see :mod:`blokern.bilevel.loss`; attack x in it to prune a robust network.
    example: x of a batch, by which whole filters and channels find the network's outputs and inputs, as
    :func:`blokern.bilevel.masking.whole_layers` does; None: made up. metrics: "upper_loss", and "changed",
    the share of the masks' bits that changed. Raises TypeError for an argument of another type, ValueError where no
    layer can be pruned, weights are shared between layers, or, in a step, scores are no longer finite.

    Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu, "Advancing Model Pruning via Bi-level Optimization", NeurIPS 2022.

    >>> rule = BiP(model, torch.optim.SGD(model.parameters(), lr=0.1), BiPSettings(density=0.1))
    >>> loss = rule.step((x, y), (x2, y2)).loss
    """

    takes_two: ClassVar[Literal[True]] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: BiPSettings,
        loss_fn: ModelLoss = cross_entropy,
        processes: Processes = Processes(),  # noqa: B008  # frozen
        example: Any = None,
    ) -> None:
        check_types(
            model=(model, nn.Module),
            optimizer=(optimizer, Optimizer),
            settings=(settings, BiPSettings),
            processes=(processes, Processes),
        )
        processes.equalize_(model)
        self.processes = processes
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.loss_fn = loss_fn
        #: The scores' learning rate, to be set by whoever has a schedule.
        self.score_lr = settings.score_lr
        found = prunable(model, settings.exclude)
        weights = {name: w.detach() for name, w in found.items() if w.requires_grad}
        if not weights:
            raise ValueError("model must have a layer to prune whose weight requires grad, got none")
        self._whole: frozenset[str] = frozenset()
        if settings.granularity in ("filter", "channel"):
            self._whole = whole_layers(dense_twin(model), weights, settings, example)
        self._names = list(weights)
        self._scores = (
            {} if settings.mode == "released" else {k: _initial_scores(w) for k, w in weights.items()}
        )
        #: θ, by parameter name; of what m keeps, the model's weights are the ones that count.
        self.theta = {name: w.clone() for name, w in weights.items()}
        buffered = settings.score_momentum > 0
        self._momentum = {name: torch.zeros_like(w) for name, w in weights.items() if buffered}
        sparsify(model, dict(zip(weights, self._select(), strict=True)))

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores by parameter name; in mode "released" θ."""
        return self._scores if self.settings.mode == "paper" else self.theta

    def step(self, lower: Any, upper: Any) -> StepResult:
        """Updates weights on the one batch, scores and masks on the other.

        Each batch is one of :mod:`blokern.bilevel.loss`. Raises TypeError or ValueError for others.
        """
        lower, upper = (_detached(as_batch(b, of)) for of, b in (("lower", lower), ("upper", upper)))
        with torch.autocast(next(tensors_in(lower)).device.type, enabled=False):
            self.optimizer.zero_grad(set_to_none=True)
            loss, logits = self._loss(self.model, *lower)
            torch.autograd.backward(loss)
            self.processes.average_gradients(self.model)
            with self._whole_weights():
                self.optimizer.step()
            upper_loss, grads = self._dense_gradients(*upper)
            metrics = {"upper_loss": upper_loss}
            if self.settings.implicit == "bilinear":
                self._score_step(grads)
            else:
                metrics["implicit_residual"] = self._exact_score_step(upper, grads)
        metrics["changed"] = self._refresh_masks()
        return StepResult(loss.detach(), logits.detach(), metrics)

    def state_dict(self) -> dict[str, Any]:
        """The scores, their momentum and θ, by parameter name; masks and what they keep are in the model's."""
        return {"scores": dict(self._scores), "momentum": dict(self._momentum), "theta": dict(self.theta)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave. Raises ValueError, and changes nothing, where layers or shapes differ."""
        ours = self.state_dict()
        for part, tensors in ours.items():
            there = {name: tuple(t.shape) for name, t in state.get(part, {}).items()}
            here = {name: tuple(t.shape) for name, t in tensors.items()}
            if there != here:
                raise ValueError(f"state is of other layers: {part} of {there}, but the model has {here}")
        for part, tensors in ours.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[part][name])

    def _loss(self, model: nn.Module, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        with autocast(self.settings.precision, next(tensors_in(x))):
            loss, logits = loss_of(self.loss_fn, model, x, y)
        return loss, logits if logits.dtype == torch.float64 else logits.float()

    def _layers(self) -> list[MaskedLayer]:
        return [self.model.get_submodule(name.rpartition(".")[0]) for name in self._names]  # type: ignore[misc]

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Inside, the model's weights are θ: for the optimizer's step alone, as whoever reads them has to see w."""
        layers = self._layers()
        for layer, theta in zip(layers, self.theta.values(), strict=True):
            weight = layer.stored_weight.data
            torch.where(layer.mask.to_dense(), weight, theta, out=weight)
        try:
            yield
        finally:
            for layer, theta in zip(layers, self.theta.values(), strict=True):
                theta.copy_(layer.stored_weight.detach())
                layer.clear_weight()

    def _dense_gradients(self, x: Any, y: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss and g = ∇_w ℓ of each layer."""
        layers = self._layers()
        with dense_grad(layers):
            loss, _ = self._loss(self.model, x, y)
            weights = [layer.stored_weight for layer in layers]
            grads = [*torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]
        self.processes.average_([*grads, *running_statistics(self.model)])
        return loss.detach(), grads

    def _score_step(self, grads: list[Tensor]) -> None:
        scores, rates = list(self.scores.values()), self._rates(self.settings.implicit_gamma)
        if self.settings.mode == "released":
            ops.bip_released_step_(scores, grads, **rates)
        else:
            masks = [layer.mask for layer in self._layers()]
            ops.bip_score_step_(scores, [*self.theta.values()], grads, masks, **rates)

    def _exact_score_step(self, upper: tuple[Any, Any], grads: list[Tensor]) -> Tensor:
        """Returns the linear system's relative residual."""
        settings, layers = self.settings, self._layers()
        if settings.implicit == "cg":
            solve: Solver = partial(cg_solve, max_steps=settings.implicit_steps)
        else:
            solve = partial(neumann_solve, scale=settings.implicit_scale, max_steps=settings.implicit_steps)
        by_name = dict(zip(self._names, grads, strict=True))
        along, residual = implicit_gradient(
            self.model,
            self._loss,
            upper,
            by_name,
            theta=self.theta,
            gamma=settings.implicit_gamma,
            solve=solve,
            average_=self.processes.average_,
        )
        # The bilinear step's direction, (θ − 0) ⊙ g, with this gradient for θ and ones for g.
        ones, masks = [torch.ones_like(g) for g in along.values()], [layer.mask for layer in layers]
        ops.bip_score_step_(
            list(self._scores.values()), list(along.values()), ones, masks, **self._rates(math.inf)
        )
        return residual

    def _rates(self, gamma: float) -> dict[str, Any]:
        return {
            "lr": self.score_lr,
            "gamma": gamma,
            "momentum": self.settings.score_momentum,
            "weight_decay": self.settings.score_weight_decay,
            "momentum_buffers": list(self._momentum.values()) or None,
        }

    def _refresh_masks(self) -> Tensor:
        """Masks of the new scores; returns the share of the bits that changed."""
        changed, total = torch.zeros((), dtype=torch.int64), 0
        for layer, bits, theta in zip(self._layers(), self._select(), self.theta.values(), strict=True):
            new = SparseMask(bits)
            changed, total = changed + layer.mask.differing(new), total + bits.numel()
            layer.mask.update_(new)
            layer.stored_weight.data.copy_(masked_weight(theta, layer.mask))
        return changed / total

    def _select(self) -> list[Tensor]:
        """The masks of the scores."""
        scores = self.scores
        if self.settings.mode == "released":
            scores = {name: score.abs() for name, score in scores.items()}
        return [*select(scores, self.settings, self._whole).values()]


def _detached(batch: tuple[Any, Any]) -> tuple[Any, Any]:
    x, y = batch
    return map_tensors(x, Tensor.detach), y


def _initial_scores(weight: Tensor) -> Tensor:
    """√(6 / fan_in) · |θ| / max|θ|; zeros where θ is zero."""
    scale = math.sqrt(6 / weight[0].numel())
    size = weight.abs()
    largest = size.max()
    return size.mul_(scale / torch.where(largest > 0, largest, 1.0))

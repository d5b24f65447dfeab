"""Pruning's own steps, and whole pruned networks: which weights are kept, a training step and inference of
preact_resnet18 at 95 %, a step of BiP at 90 %, each against a dense training step and the usual code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.networks import images, inference, network
from blokern import keep_freed_memory, ops
from blokern._race import Case
from blokern.bilevel import OMP, BiP, BiPSettings, OMPSettings, Plain, PlainSettings
from blokern.bilevel.masking import prunable
from blokern.sparse import masks_of, samples_innermost, sparsify

BATCH = 128
DENSE = "dense, NCHW", "dense, channels_last"

Run = Callable[[], object]


def cases() -> Iterator[Case]:
    keep_freed_memory()  # as `blokern prune` does; it serves every rival
    yield from _selections()
    yield from _networks()
    yield _bip()


# ---- Which weights are kept.


def _selections() -> Iterator[Case]:
    scores = [weight.detach().abs() for weight in prunable(network("resnet18", images(1)[0])[0]).values()]
    count = sum(score.numel() for score in scores)
    kept = round(0.1 * count)

    def sort() -> Tensor:
        flat = torch.cat([score.flatten() for score in scores])
        return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, flat.sort().indices[-kept:], True)

    def topk() -> Tensor:
        flat = torch.cat([score.flatten() for score in scores])
        indices = flat.topk(kept, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, indices, True)

    rivals: dict[str, Run] = {
        "ops.topk_mask": lambda: ops.topk_mask(scores, 0.1),
        "cat, sort": sort,
        "cat, torch.topk": topk,
    }
    yield Case(f"The largest tenth of ResNet-18's {count / 1e6:.1f} million weights", rivals, "ops.topk_mask")

    score = scores[-2].flatten(1)
    groups = score.view(-1, 4)
    rivals = {
        "ops.nm_mask": lambda: ops.nm_mask(score, 2, 4),
        "torch.topk, scatter": lambda: torch.zeros_like(groups, dtype=torch.bool).scatter_(
            1, groups.topk(2, dim=1).indices, True
        ),
        "sort, scatter": lambda: torch.zeros_like(groups, dtype=torch.bool).scatter_(
            1, groups.sort(dim=1).indices[:, 2:], True
        ),
    }
    yield Case(f"2:4 of {score.shape[0]}×{score.shape[1]} weights", rivals, "ops.nm_mask")


# ---- Whole networks.


def _dense(name: str) -> dict[str, Run]:
    """A training step in either memory format."""
    x, y = images(BATCH)
    return {
        key: _training(*network(name, images_), images_, y)
        for key, images_ in zip(DENSE, (x, x.contiguous(memory_format=torch.channels_last)), strict=True)
    }


def _training(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Run:
    rule = Plain(model, optimizer, PlainSettings())
    return lambda: rule.step(x, y)


def _pruned(name: str, density: float, scope: ops.Scope) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network without its smallest weights, samples innermost."""
    model, optimizer = network(name, images(1)[0])
    sparsify(model, OMP(OMPSettings(density=density, scope=scope)).masks(model, []))
    return samples_innermost(model), optimizer


def _networks() -> Iterator[Case]:
    name, sparse = "preact_resnet18", "blokern, 95 % of each layer"
    x, y = images(BATCH)
    pruned = {
        sparse: _pruned(name, 0.05, "layer"),
        "blokern, 95 % of all weights": _pruned(name, 0.05, "global"),
    }
    training = {key: _training(*of, x, y) for key, of in pruned.items()}
    yield Case(f"{name}, batch {BATCH}: a training step", training | _dense(name), sparse)

    last = x.contiguous(memory_format=torch.channels_last)
    rivals = {key: inference(model, x) for key, (model, _) in pruned.items()}
    rivals |= {key: inference(network(name, t)[0], t) for key, t in zip(DENSE, (x, last), strict=True)}
    yield Case(f"{name}, batch {BATCH}: inference", rivals, sparse)


# ---- BiP.


def released_bip(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    score_optimizer: torch.optim.Optimizer,
    lower: tuple[Tensor, Tensor],
    upper: tuple[Tensor, Tensor],
) -> None:
    """BiP in the order of its released code: four forwards, each of which sorts all scores, and three backwards.

    The scores are the weights' own memory, as they are there; score_optimizer has them.
    """
    scores = score_optimizer.param_groups[0]["params"]
    sizes = [score.numel() for score in scores]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        flat = torch.cat([score.abs().flatten() for score in scores])
        order = flat.sort().indices
        mask = flat.detach().clone()
        mask[order[: round(0.9 * len(flat))]] = 0
        mask[order[round(0.9 * len(flat)) :]] = 1
        straight_through = flat + (mask - flat.detach())
        masked = {
            name: weight * part.view_as(weight)
            for (name, weight), part in zip(weights.items(), straight_through.split(sizes), strict=True)
        }
        return F.cross_entropy(functional_call(model, masked, (batch[0],)), batch[1])

    optimizer.zero_grad()
    loss(lower).backward(inputs=[*model.parameters()])
    optimizer.step()
    by_weight = torch.autograd.grad(loss(upper), [*weights.values(), *scores])[: len(scores)]
    by_score = torch.autograd.grad(loss(upper), scores)
    vectors = (torch.cat([grad.flatten() for grad in grads]) for grads in (by_weight, by_score))
    implicit = -1e-4 * next(vectors) * next(vectors)
    for score, grad, term in zip(scores, by_score, implicit.split(sizes), strict=True):
        score.grad = grad + term.view_as(grad)
    score_optimizer.step()
    loss(upper)  # for its log


def _bip() -> Case:
    lower, upper = images(BATCH), images(BATCH, seed=1)
    model, optimizer = network("resnet18", lower[0])
    rule = BiP(model, optimizer, BiPSettings(density=0.1))
    samples_innermost(model)

    released, released_optimizer = network("resnet18", lower[0])
    weights = prunable(released)
    scores = [nn.Parameter(weight.data) for weight in weights.values()]
    score_optimizer = torch.optim.SGD(scores, lr=0.01, momentum=0.9)
    rivals: dict[str, Run] = {
        "BiP": lambda: rule.step(lower, upper),
        "BiP, released sequence": lambda: released_bip(
            released, weights, released_optimizer, score_optimizer, lower, upper
        ),
        "new masks, and all that products make of them": _new_masks(),
        **_dense("resnet18"),
    }
    return Case(
        f"resnet18, batch {BATCH}, 90 % sparse: a step of BiP, and a dense training step", rivals, "BiP"
    )


def _new_masks() -> Run:
    """Of scores that moved a little: 1 % each way."""
    x, _ = images(1)
    model, _ = _pruned("resnet18", 0.1, "global")
    model.eval()  # BatchNorm takes no empty batch in training
    masks = masks_of(model).values()
    scores = [weight.detach().abs() for weight in prunable(model).values()]
    turns = itertools.cycle((scores, [score * (0.99 + 0.02 * torch.rand_like(score)) for score in scores]))

    def run() -> None:
        for mask, bits in zip(masks, ops.topk_mask(next(turns), 0.1), strict=True):
            mask.update_(bits)
        model(x[:0])  # computes nothing

    return run

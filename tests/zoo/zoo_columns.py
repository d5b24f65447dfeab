"""What is tried with each network of the zoo: blokern's answer beside plain torch's, in float64.

A column is a function of a network. It returns a cell, or raises: `Wrong` for an answer that differs; an error that
blokern itself raises is a refusal, and its message is the reason; any other error is a wrong answer, too.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from zoo_networks import Network

import blokern
from blokern.attack import PGD
from blokern.bilevel import OMP, OMPSettings
from blokern.curvature import linearization, linearize
from blokern.sparse import SparseMask, compact, sparsify

PACKAGE = str(Path(blokern.__file__).parent)
DENSITY = 0.3

Masks = dict[str, SparseMask]


@dataclass(frozen=True)
class Cell:
    """status: exact, falls back, refused, none (the question makes no sense here), or wrong."""

    status: str
    detail: str = ""


class Wrong(Exception):
    """An answer that differs from plain torch's."""


def tried(column: Callable[[Network], Cell], network: Network) -> Cell:
    try:
        return column(network)
    except Wrong as wrong:
        return Cell("wrong", str(wrong))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        meant = where.filename.startswith(PACKAGE) and str(where.line).startswith("raise")
        return Cell("refused" if meant else "wrong", f"{type(error).__name__}: {error}".splitlines()[0])


# ---- Networks and comparisons.


def made(network: Network, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return network.make().double().eval()


def same(what: str, ours: Any, theirs: Any, tolerance: float = 1e-8) -> None:
    """Raises Wrong unless the tensors of both, taken together, are the same to rounding."""
    error = norm = 0.0
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        if a.shape != b.shape:
            raise Wrong(f"{what}: shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        error += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    if not error <= (tolerance * max(norm**0.5, 1e-8)) ** 2:
        raise Wrong(f"{what}: relative error {(error / max(norm, 1e-300)) ** 0.5:.2g}")


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree.detach()]
    if isinstance(tree, dict):
        return [t for key in sorted(tree) for t in tensors(tree[key])]
    return [t for item in tree for t in tensors(item)]


def directions(like: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in like.items()}


# ---- Attacks.


def attack(network: Network) -> Cell:
    """Three steps of PGD beside a plain loop."""
    if network.inputs != "images":
        return Cell("none", "integer inputs")
    model, (x, y) = made(network), network.batch()
    eps, step = 0.03, 0.01
    at = x.clone()
    for _ in range(3):
        at.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network.logits(model(at)), y), at)
        at = (x + (at.detach() + step * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    found = PGD(model, eps=eps, step_size=step, steps=3, random_start=False)(x, y)
    same("PGD", found, at)
    return Cell("exact")


# ---- Curvature.


class TwiceDifferentiable(TorchFunctionMode):
    """hardsigmoid by its definition, as torch differentiates its own once only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            value = F.relu6(args[0] + 3) / 6
            return args[0].copy_(value) if (kwargs or {}).get("inplace") else value
        return func(*args, **(kwargs or {}))


def hvp(network: Network) -> Cell:
    return _product(network, "hvp")


def ggnvp(network: Network) -> Cell:
    return _product(network, "ggnvp")


def mixed_hvp(network: Network) -> Cell:
    return _product(network, "mixed_hvp") if network.inputs == "images" else Cell("none", "integer inputs")


def _product(network: Network, name: str) -> Cell:
    """A product beside autograd's, differentiated twice."""
    model, twin = made(network), made(network)  # one each, as some keep parts of a graph for the next pass
    x, y = network.batch()
    parameters = {key: p for key, p in twin.named_parameters() if p.requires_grad}
    along: Any = directions(parameters)
    if name == "mixed_hvp":
        along = directions({"": x})[""]
    with TwiceDifferentiable(), sdpa_kernel(SDPBackend.MATH):  # other kinds of attention: once only
        theirs = _by_autograd(network, twin, x, y, name, parameters, along)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        linearization._warned.clear()
        if network.inputs == "images":
            at = linearize(model, network.loss_fn, x, y)
        else:
            at = linearization.record(model, network.loss_fn, x, y, input_gradient=False)
        ours = getattr(at, name)(along)
    same(name, ours, theirs, network.tolerance)
    reasons = [str(w.message) for w in told if "R-operator" in str(w.message)]
    return Cell("falls back", reasons[0]) if reasons else Cell("exact")


def _by_autograd(
    network: Network, model: nn.Module, x: Any, y: Any, name: str, parameters: dict[str, Tensor], along: Any
) -> dict[str, Tensor]:
    leaves = [*parameters.values()]

    def twice(of: list[Tensor], by: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        kept = [(t, w) for t, w in zip(of, weights, strict=True) if t.requires_grad]
        options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return [*torch.autograd.grad([t for t, _ in kept], by, [w for _, w in kept], **options)]

    options: Any = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    if name == "mixed_hvp":
        at = x.clone().requires_grad_()
        (by_x,) = torch.autograd.grad(network.loss_fn(model(at), y), at, **options)
        found = twice([by_x], leaves, [along])
    elif name == "hvp":
        gradient = [*torch.autograd.grad(network.loss_fn(model(x), y), leaves, **options)]
        found = twice(gradient, leaves, [*along.values()])
    else:
        logits = network.logits(model(x))
        probe = torch.zeros_like(logits, requires_grad=True)
        pulled = [*torch.autograd.grad(logits, leaves, probe, **options)]
        (pushed,) = twice(pulled, [probe], [*along.values()])
        cut = logits.detach().requires_grad_()
        (by_logits,) = torch.autograd.grad(network.loss(cut, y), cut, create_graph=True)
        (curved,) = twice([by_logits], [cut], [pushed])
        found = [*torch.autograd.grad(logits, leaves, curved, allow_unused=True, materialize_grads=True)]
    return dict(zip(parameters, found, strict=True))


# ---- Masks.


class Twin:
    """The dense network, whose masked weights are weight · mask at every use."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.model = copy.deepcopy(model)
        self.masks = {name: mask.to_dense() for name, mask in masks.items()}

    def weights(self) -> dict[str, Tensor]:
        return {
            name: p * self.masks[name] if name in self.masks else p
            for name, p in self.model.named_parameters()
        }

    def __call__(self, x: Any) -> Any:
        return functional_call(self.model, self.weights(), (x,))


def pruned(network: Network) -> tuple[nn.Module, Twin, Masks]:
    model = made(network)
    masks = OMP(OMPSettings(density=DENSITY)).masks(model)
    twin = Twin(model, masks)
    return sparsify(model, masks), twin, masks


def sgd(network: Network) -> Cell:
    return _trained(network, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-2))


def adamw(network: Network) -> Cell:
    return _trained(network, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2))


def _trained(network: Network, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Cell:
    """Three training steps of the masked network beside those of weight · mask: outputs before, weights and outputs
    after."""
    model, twin, _ = pruned(network)
    x, y = network.batch()
    with torch.no_grad():
        same("outputs", network.logits(model(x)), network.logits(twin(x)))
    for net, call in ((model, model), (twin.model, twin)):
        net.train()
        stepper = optimizer(net.parameters())
        torch.manual_seed(3)  # dropout draws alike
        for _ in range(3):
            stepper.zero_grad()
            network.loss_fn(call(x), y).backward()
            stepper.step()
        net.eval()
    same("weights", dict(model.named_parameters()), twin.weights(), 1e-5)  # zero where they are pruned
    with torch.no_grad():
        same("outputs after training", network.logits(model(x)), network.logits(twin(x)), 1e-5)
    return Cell("exact")


def averaged(network: Network) -> Cell:
    """The exponential average of a network and of one with weights 1.5 times as large, with and without buffers."""
    refusal = ""
    for use_buffers in (False, True):
        model, twin, _ = pruned(network)
        x, _ = network.batch()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        average.update_parameters(model)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), twin.model.parameters(), strict=True):
                ours.mul_(1.5)
                theirs.mul_(1.25)
        average.update_parameters(model)
        with torch.no_grad():
            theirs_out = network.logits(twin(x))
            try:
                ours_out = network.logits(average(x))
            except ValueError as error:
                if not use_buffers:
                    raise
                refusal = f"refused with use_buffers=True: {error}".splitlines()[0]
                continue
            same(f"outputs of the average, use_buffers={use_buffers}", ours_out, theirs_out)
    return Cell("exact", refusal)


def compiled(network: Network) -> Cell:
    """torch.compile, by the backend that has no code generator: what it traces is what is in question."""
    model, twin, _ = pruned(network)
    x, y = network.batch()
    torch._dynamo.reset()
    if fails(lambda: torch.compile(twin.model, backend="aot_eager")(x)):
        return Cell("none", "torch.compile cannot compile the dense network")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager")
    same("compiled outputs", network.logits(fast(x)), network.logits(twin(x)))
    network.loss_fn(fast(x), y).backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    network.loss_fn(twin(x), y).backward()
    named = dict(twin.model.named_parameters())
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    same("compiled gradients", ours, theirs)
    return Cell("exact")


def exported(network: Network) -> Cell:
    model, twin, _ = pruned(network)
    x, _ = network.batch()
    if fails(lambda: torch.export.export(twin.model, (x,))):
        return Cell("none", "torch.export cannot export the dense network")
    program = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        same("exported outputs", network.logits(program(x)), network.logits(twin(x)))
    return Cell("exact")


def fails(run: Callable[[], Any]) -> bool:
    """Whether torch itself cannot do it with the dense network."""
    try:
        run()
    except Exception:
        return True
    return False


# ---- Saving, for a process of its own.


def save(network: Network, path: Path) -> Cell:
    """The masked network's state and outputs; `load` compares them elsewhere."""
    model, _, masks = pruned(network)
    x, _ = network.batch()
    with torch.no_grad():
        found = {"state": model.state_dict(), "names": [*masks], "outputs": network.logits(model(x))}
    torch.save(found, path)
    return Cell("exact")


def load(network: Network, path: Path) -> Cell:
    """In another process: other weights, masks that keep everything, then the saved state."""
    found = torch.load(path)
    model = made(network, seed=5)
    parameters = dict(model.named_parameters())
    sparsify(model, {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in found["names"]})
    model.load_state_dict(found["state"])
    x, _ = network.batch()
    with torch.no_grad():
        same("outputs of the saved network", network.logits(model(x)), found["outputs"])
    return Cell("exact")


# ---- Compaction.


def compacted(network: Network) -> Cell:
    """Half of each layer's filters pruned, but those of layers whose outputs are the network's."""
    if not network.convolutional:
        return Cell("none", "no convolutional network")
    model, (x, y) = made(network), network.batch()
    masks = OMP(OMPSettings(density=0.5, granularity="filter")).masks(model, [(x, y)])
    twin = Twin(model, masks)
    smaller = compact(model, masks, example=x)
    with torch.no_grad():
        same("compacted outputs", network.logits(smaller(x)), network.logits(twin(x)))
        again = torch.rand(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        same("compacted outputs", network.logits(smaller(again)), network.logits(twin(again)))
    smaller.train()
    network.loss_fn(smaller(x), y).backward()
    counts = [sum(p.numel() for p in net.parameters()) for net in (model, smaller)]
    if counts[1] >= counts[0]:
        return Cell("refused", "no channel can go: it stays as large as it was")
    return Cell("exact", f"{counts[0] / 1e6:.2f} M parameters to {counts[1] / 1e6:.2f} M")


COLUMNS: dict[str, Callable[[Network], Cell]] = {
    "attack": attack,
    "hvp": hvp,
    "ggnvp": ggnvp,
    "mixed_hvp": mixed_hvp,
    "SGD": sgd,
    "AdamW": adamw,
    "EMA": averaged,
    "compile": compiled,
    "export": exported,
    "compact": compacted,
}

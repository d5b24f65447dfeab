"""Fuzz whole networks for as long as you like: `make fuzz-networks`, or

    python tests/hardening/fuzz_networks.py --cases 20000 [--seed 0] [--only products]

A case is a random network and a subject: products with second derivatives, masks, or compaction, each beside plain
torch in float64. blokern answers as torch does, or raises an error of its own; anything else fails. A case is made by
its number alone: `--seed N --cases 1` runs case N again, and prints the network.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arbitrary import Draw
from random_networks import Checkpointed, Output, logits_of, loss_fn, network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import blokern
from blokern import ops
from blokern.curvature import hvp, linearize
from blokern.sparse import compact, sparsify

PACKAGE = str(Path(blokern.__file__).parent)


class Refused(Exception):
    """blokern said why it does not answer."""


def ours(run: Callable[[], Any]) -> Any:
    """What blokern answers; Refused for an error that it raises itself, be it by `raise NotImplementedError`."""
    try:
        return run()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if where.filename.startswith(PACKAGE) and str(where.line).startswith("raise"):
            raise Refused(f"{type(error).__name__}: {error}".splitlines()[0][:90]) from error
        if "modified by an inplace operation" in str(
            error
        ):  # autograd's own, of a gradient that torch was not asked for
            raise Refused("torch's autograd: a tensor that it needs was modified in place") from error
        raise


def same(what: str, found: Any, wanted: Any, tolerance: float = 1e-7) -> None:
    pairs = [(f.double(), w.double()) for f, w in zip(found, wanted, strict=True)]
    assert all(f.isnan().equal(w.isnan()) for f, w in pairs if f.shape == w.shape), (
        f"{what}: NaN in one alone"
    )
    pairs = [(f.nan_to_num(), w.nan_to_num()) for f, w in pairs]
    scale = max([1e-3, *(float(w.abs().max()) for _, w in pairs if w.numel())])
    for f, w in pairs:
        assert f.shape == w.shape, f"{what}: shape {tuple(f.shape)} instead of {tuple(w.shape)}"
        error = float((f - w).abs().max()) if w.numel() else 0.0
        assert error <= tolerance * scale, f"{what}: {error:.3g} off, of {scale:.3g}"


# ---- Products.


def products(draw: Draw) -> str:
    model, x, y = network(draw, ("tensor", "tensor", "tuple", "dict", "object"))
    model.train(draw.chance(0.5))
    name = draw.one_of(("hvp", "ggnvp", "mixed_hvp"))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    along: Any = {
        key: torch.randn(p.shape, generator=draw.generator, dtype=p.dtype) for key, p in parameters.items()
    }
    if name == "mixed_hvp":
        along = torch.randn(x.shape, generator=draw.generator, dtype=x.dtype)
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    try:
        wanted = twice_differentiated(twin, x, y, name, along)
    except RuntimeError as error:
        return f"torch refuses: {str(error).splitlines()[0][:60]}"
    if not all(bool(t.isfinite().all()) for t in wanted):
        return "torch answers NaN"
    torch.manual_seed(0)
    found = ours(lambda: getattr(linearize(model, loss_fn, x, y), name)(along))
    same(name, found.values(), wanted)
    if not any(
        isinstance(module, Checkpointed) for module in model.modules()
    ):  # which moves them again in a backward
        same("buffers", model.buffers(), twin.buffers())
    return ""


class TwiceDifferentiable(TorchFunctionMode):
    """weight_norm by its definition, as torch's second derivatives of its own are wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            dims = [d for d in range(v.dim()) if d != dim % v.dim()]
            return g * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True)
        return func(*args, **(kwargs or {}))


def twice_differentiated(model: Output, x: Tensor, y: Tensor, name: str, along: Any) -> list[Tensor]:
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.again = False
    with TwiceDifferentiable():
        return _twice_differentiated(model, x, y, name, along)


def _twice_differentiated(model: Output, x: Tensor, y: Tensor, name: str, along: Any) -> list[Tensor]:
    leaves = [p for p in model.parameters() if p.requires_grad]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    at = x.clone().requires_grad_()
    logits = logits_of(model(at))

    def derivative(of: Any, by: list[Tensor], weights: Any) -> list[Tensor]:
        kept = [(t, w) for t, w in zip(of, weights, strict=True) if t.requires_grad]
        if not kept:
            return [torch.zeros_like(t) for t in by]
        outputs, weights = zip(*kept, strict=True)
        return [*torch.autograd.grad(outputs, by, weights, retain_graph=True, **options)]

    if name == "ggnvp":
        probe = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(logits, leaves, probe, create_graph=True, **options)
        (pushed,) = derivative(pulled, [probe], along.values())
        cut = logits.detach().requires_grad_()
        by_logits = torch.autograd.grad(loss_fn(cut, y), cut, create_graph=True)
        return derivative([logits], leaves, derivative(by_logits, [cut], [pushed]))
    loss = loss_fn(logits, y)
    if name == "mixed_hvp":
        return derivative(torch.autograd.grad(loss, at, create_graph=True, **options), leaves, [along])
    gradient = torch.autograd.grad(loss, leaves, create_graph=True, **options)
    return derivative(gradient, leaves, along.values())


# ---- Masks.


class Times(nn.Module):
    """A weight's mask, in torch's own words."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masks(draw: Draw) -> str:
    """A few training steps of a masked network beside weight · mask, and what is kept of it afterwards."""
    model, x, y = network(draw)
    model.train(draw.chance(0.5))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it draws in the order of memory, which a masked convolution's output may have another of
    twin = copy.deepcopy(model)
    kept = {
        f"{path}.weight": torch.rand(module.weight.shape, generator=draw.generator) < 0.5
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d) and draw.chance(0.8)
    }

    for name, mask in kept.items():
        parametrize.register_parametrization(
            twin.get_submodule(name.removesuffix(".weight")), "weight", Times(mask)
        )
    settings: Any = draw.one_of(({"momentum": 0.9, "weight_decay": 0.1}, {}))
    try:
        train(twin, x, y, settings)
    except RuntimeError as error:
        return f"torch refuses: {str(error).splitlines()[0][:60]}"
    ours(lambda: sparsify(model, kept))
    train(model, x, y, settings)
    weights = {name: p for name, p in model.named_parameters() if name not in kept}
    originals = dict(twin.named_parameters())
    same("parameters", weights.values(), [originals[name] for name in weights], 1e-6)
    modules = [[net.get_submodule(name.removesuffix(".weight")) for name in kept] for net in (model, twin)]
    same("weights", *([module.weight for module in of] for of in modules), 1e-6)
    model.eval()
    twin.eval()
    with torch.no_grad():
        same("outputs", [logits_of(model(x))], [logits_of(twin(x))], 1e-6)
        if draw.chance(0.3):
            again = copy.deepcopy(model)
            again.load_state_dict(model.state_dict())
            same("outputs of a copy", [logits_of(again(x))], [logits_of(twin(x))], 1e-6)
    if draw.chance(0.5):
        of_masked(model, twin, x, y, kept, draw.generator)
    return ""


def of_masked(
    model: Output, twin: Output, x: Tensor, y: Tensor, kept: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Products of the masked network beside those of weight · mask."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    along = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    theirs = {name.removesuffix(".weight") + ".parametrizations.weight.original": name for name in kept}
    names = [theirs.get(name, name) for name, p in twin.named_parameters() if p.requires_grad]
    try:
        wanted = twice_differentiated(twin, x, y, "hvp", {name: along[name] for name in names})
    except RuntimeError:
        return
    if names and all(bool(t.isfinite().all()) for t in wanted):
        found = ours(lambda: hvp(model, loss_fn, x, y, along))
        same("hvp of the masked network", [found[name] for name in names], wanted, 1e-6)


def train(model: nn.Module, x: Tensor, y: Tensor, settings: Any) -> None:
    """Two steps of SGD."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05, **settings) if trained else None
    for step in range(2 if optimizer else 0):
        torch.manual_seed(step)  # dropout draws alike
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


# ---- Compaction.


def compaction(draw: Draw) -> str:
    model, x, _ = network(draw)
    model.eval()
    kept = {}
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Conv2d) and module is not model.head and draw.chance(0.8):
            score = torch.rand(module.weight.shape, generator=draw.generator)
            kept[f"{path}.weight"] = ops.filter_mask(score, draw.one_of((0.3, 0.6)))
    weights = {name: p * kept[name] if name in kept else p for name, p in model.named_parameters()}
    smaller = ours(lambda: compact(model, kept, example=x))
    with torch.no_grad():
        for inputs in (x, torch.rand(x.shape, generator=draw.generator, dtype=x.dtype)):
            wanted = logits_of(functional_call(model, weights, (inputs,)))
            same("outputs", [logits_of(smaller(inputs))], [wanted])
    return ""


#: Compaction traces its network, which takes longest: a tenth of the cases.
SUBJECTS: dict[str, Callable[[Draw], str]] = {"products": products, "masks": masks, "compaction": compaction}
SHARES = [*["products"] * 5, *["masks"] * 4, "compaction"]


def run_case(number: int, only: str = "") -> tuple[str, str]:
    """The subject, and why nothing was compared, if so."""
    source = random.Random(number)
    subject = only or SHARES[number % len(SHARES)]
    try:
        return subject, SUBJECTS[subject](Draw(source))
    except Refused as refused:
        return subject, f"refused: {refused}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--only", default="", choices=["", *SUBJECTS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, ends, failed = time.perf_counter(), Counter[tuple[str, str]](), 0
    for number in range(options.seed, options.seed + options.cases):
        try:
            ends[run_case(number, options.only)] += 1
        except KeyboardInterrupt:
            break
        except Exception as error:
            failed += 1
            print(
                f"case {number}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                flush=True,
            )
            if options.cases == 1:
                traceback.print_exc(file=sys.stdout)
                print(network(Draw(random.Random(number)))[0])
    print(f"{sum(ends.values())} cases passed, {failed} failed, {time.perf_counter() - start:.0f} s")
    for (subject, end), count in sorted(ends.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"  {count:7d}  {subject}{end and ': '}{end}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())

"""Attacks on a trained network, and its evaluation, by blokern, torchattacks, foolbox, adv-lib and AutoAttack.

All get the same images that the network classifies correctly, in the same batches, and the network with its parameters
frozen, so that nobody computes gradients that are not used. One batch must hold out as well against each attack, to two
or three images in a hundred, which rounding or the random start decides; where blokern's step is another one, PGD's in
L1, it must be no weaker. In an evaluation ours must leave no more robust accuracy than the strongest of the peers, to
0.1 points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import foolbox
import torch
import torchattacks
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from benchmarks.peers.contest import Contest, Run
from blokern import data
from blokern.attack import APGD, PGD, Evaluation, evaluate
from blokern.attack.modes import frozen_parameters
from blokern.bilevel import checkpoint

Norm = Literal["linf", "l2", "l1"]
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.5, "l1": 12.0}
STEPS = 20
BATCH = 128
#: Points of robust accuracy that random starts decide: an image of 1000.
TOLERANCE = 0.1

Attack = Callable[[Tensor, Tensor], Tensor]


def _adv_lib() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """adv-lib's pgd_linf and apgd, without what else its packages import: torchvision, which PyPI has for CUDA alone,
    and a plotting server."""
    spec = find_spec("adv_lib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = ModuleType("adv_lib.attacks")
    package.__path__ = [str(Path(spec.submodule_search_locations[0], "attacks"))]
    sys.modules.setdefault("adv_lib.attacks", package)
    sys.modules.setdefault("visdom", ModuleType("visdom"))
    from adv_lib.attacks.auto_pgd import apgd
    from adv_lib.attacks.projected_gradient_descent import pgd_linf

    return pgd_linf, apgd


def _foolbox(attack: Any, model: nn.Module, eps: float) -> Attack:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    return lambda x, y: attack(wrapped, x, foolbox.criteria.Misclassification(y), epsilons=eps)[1]


def _first_batch(path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, frozen, and the images of the first test batch that it is right about."""
    payload = checkpoint.load(path)
    model = checkpoint.load_model(payload, path).eval().requires_grad_(False)
    x, y = next(iter(data.Batches(_test(payload, 2 * BATCH), 2 * BATCH)))
    right = model(x).argmax(1) == y
    return model, x[right][:BATCH], y[right][:BATCH]


def _test(payload: Mapping[str, Any], limit: int) -> data.ImageDataset:
    return data.load(payload["recipe"]["data"]["name"], test_limit=limit).test


def cases(path: Path, images: int) -> Iterator[Contest]:
    model, x, y = _first_batch(path)
    for norm in ("linf", "l2", "l1"):
        yield _steps(model, x, y, norm)
    for norm in ("linf", "l2", "l1"):
        yield _apgd(model, x, y, norm)
    yield _evaluation(path, images)


# ---- One batch.


def _steps(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Contest:
    eps, step = EPS[norm], EPS[norm] / 4
    ours = PGD(model, eps, step, STEPS, norm, random_start=False)
    attacks: dict[str, Attack] = {
        "blokern": ours,
        "blokern, fp32 surrogate": PGD(model, eps, step, STEPS, norm, random_start=False, surrogate="fp32"),
    }
    if norm == "linf":
        pgd_linf, _ = _adv_lib()
        attacks["torchattacks"] = torchattacks.PGD(model, eps, step, STEPS, random_start=False)
        attacks["adv-lib"] = lambda x, y: pgd_linf(
            model, x, y, eps, steps=STEPS, random_init=False, absolute_step_size=step
        )
    elif norm == "l2":
        attacks["torchattacks"] = torchattacks.PGDL2(model, eps, step, STEPS, random_start=False)
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.L1PGD}[norm]
    own = kind(abs_stepsize=step, steps=STEPS, random_start=False)
    attacks["foolbox"] = _foolbox(own, model, eps)
    # foolbox scales into the L1 ball and clips then; ours is the nearest point of both, a stronger attack.
    slack = 0.02 if norm != "l1" else None
    return Contest(
        f"PGD-{STEPS}, {norm}, {len(x)} images",
        {name: _attacking(attack, x, y) for name, attack in attacks.items()},
        "blokern",
        _alike(model, x, y, eps, norm, slack),
        rounds=3,
    )


def _apgd(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Contest:
    eps = EPS[norm]
    _, apgd = _adv_lib()
    theirs = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    released = APGDAttack(model, n_iter=STEPS, norm=theirs, eps=eps, loss="ce", device="cpu")
    attacks: dict[str, Attack] = {
        "blokern": APGD(model, eps, STEPS, norm, early_stop=True),
        "blokern, fp32 surrogate": APGD(model, eps, STEPS, norm, early_stop=True, surrogate="fp32"),
        "AutoAttack (pyautoattack)": lambda x, y: released.perturb(x, y),
        "adv-lib": lambda x, y: apgd(model, x, y, eps, order, n_iter=STEPS, loss_function="ce"),
    }
    if norm != "l1":  # it has none
        attacks["AutoAttack (torchattacks)"] = torchattacks.APGD(model, theirs, eps, STEPS)
    return Contest(
        f"APGD-CE-{STEPS}, {norm}, {len(x)} images",
        {name: _attacking(attack, x, y) for name, attack in attacks.items()},
        "blokern",
        # In float64 all visit the same points (tests/attack/test_attack_peers.py); other random starts decide here.
        _alike(model, x, y, eps, norm, 0.03),
        rounds=3,
    )


def _attacking(attack: Attack, x: Tensor, y: Tensor) -> Run:
    def run() -> Tensor:
        torch.manual_seed(0)
        return attack(x, y).detach()

    return run


def _alike(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: Norm, slack: float | None
) -> Callable[[Mapping[str, Tensor]], Mapping[str, str]]:
    """Points in ball and box, and the share of images that still hold within `slack` of ours (None: ours is not
    higher, but for what rounding decides)."""

    def agree(results: Mapping[str, Tensor]) -> Mapping[str, str]:
        order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
        hold = {}
        for name, x_adv in results.items():
            low, high = x_adv.aminmax()
            assert low >= 0, name
            assert high <= 1, name
            reach = torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1).max()
            assert reach <= eps * (1 + 1e-3), f"{name}: {reach} > {eps}"
            hold[name] = float((model(x_adv).argmax(1) == y).float().mean())
        for name, share in hold.items():
            if slack is None:
                assert hold["blokern"] <= share + 0.03, (name, hold)
            else:
                assert abs(share - hold["blokern"]) <= slack, (name, hold)
        return {name: f"{share:.1%} hold" for name, share in hold.items()}

    return agree


# ---- The evaluation of a network.


def _evaluation(path: Path, images: int) -> Contest:
    payload = checkpoint.load(path)
    model = checkpoint.load_model(payload, path).eval()
    loader = data.Batches(_test(payload, images), 2 * BATCH)
    eps, steps, restarts = EPS["linf"], 50, 10
    pgd_linf, _ = _adv_lib()
    multi = torchattacks.MultiAttack([torchattacks.PGD(model, eps, eps / 4, steps) for _ in range(restarts)])
    repeated = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=steps).repeat(restarts)
    peers: dict[str, Attack] = {
        "torchattacks, MultiAttack": multi,
        "foolbox, repeat": _foolbox(repeated, model, eps),
        "adv-lib": lambda x, y: pgd_linf(
            model, x, y, eps, steps=steps, restarts=restarts, absolute_step_size=eps / 4
        ),
    }

    def evaluating(attack: Attack | None, **options: Any) -> Run:
        def run() -> Evaluation:
            torch.manual_seed(0)
            with frozen_parameters(model):
                return evaluate(model, loader, attack, eps=eps, **options)

        return run

    rivals: dict[str, Run] = {
        "blokern, bf16 surrogate": evaluating(None, surrogate="bf16"),
        "blokern, fp32 surrogate": evaluating(None, surrogate="fp32"),
        "blokern": evaluating(None),
        **{name: evaluating(attack) for name, attack in peers.items()},
    }

    def agree(results: Mapping[str, Evaluation]) -> Mapping[str, str]:
        robust = {name: 100 * result.robust_accuracy for name, result in results.items()}
        least = min(robust[name] for name in peers)
        for name in robust.keys() - peers.keys():
            assert robust[name] <= least + TOLERANCE + 1e-9, (name, robust)
        return {name: f"RA {accuracy:.2f} %" for name, accuracy in robust.items()}

    network = payload["recipe"]["model"]
    name = f"{network['name']} of width {network.get('width', 'as usual')}, {len(loader.dataset)} test images"
    return Contest(f"PGD-50-10 of {name}, end to end", rivals, next(iter(rivals)), agree, rounds=1)

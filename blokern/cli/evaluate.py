"""``blokern evaluate``: the accuracy of a checkpoint, with and without an attack."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blokern.cli.options import (
    MACHINE_OPTIONS,
    STRENGTH_OPTIONS,
    TEST_LIMIT,
    Number,
    Option,
    Options,
    check_known,
    make_parser,
    parse,
    select_device,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from blokern.data import ImageDataset
    from blokern.distributed import Processes

__all__ = ["ATTACKS", "attacked", "evaluate", "write_json"]

ATTACKS = ("pgd", "apgd", "fgsm")


def evaluate(argv: list[str]) -> int:
    """Attack a trained network on the test images: blokern evaluate CHECKPOINT."""
    parser = make_parser(
        "evaluate",
        "Standard accuracy (SA) and robust accuracy (RA) of a checkpoint on the test images.",
        [
            Option("data", str, None, "data set (default: as trained)"),
            Option("data_dir", str, None, "folder with the data set's files"),
            TEST_LIMIT,
            Option("attack", str, "pgd", f"one of {', '.join(ATTACKS)}"),
            Option("norm", str, "linf", "of the attack: linf, l2 or l1"),
            Option("eps", Number, None, "budget of the attack, for pixels in [0, 1] (default: as trained)"),
            *STRENGTH_OPTIONS,
            Option(
                "surrogate", str, None, "fp32 or bf16: step by a faster copy of the network, judge by itself"
            ),
            Option("seed", int, 0, "of the attack's random starts"),
            Option("json", str, None, "also write the result to this file"),
            *MACHINE_OPTIONS,
        ],
    )
    parser.add_argument("checkpoint", type=str, help="best.pt or last.pt of a run")
    options = parse(parser, argv)
    check_known("attack", options["attack"], ATTACKS)

    from blokern.distributed import joined

    with joined() as processes:
        _evaluate(options, select_device(options), processes)
    return 0


def _evaluate(options: Options, device: str, processes: Processes) -> None:
    from blokern import data
    from blokern.bilevel import checkpoint

    path = options["checkpoint"]
    payload = checkpoint.load(path)
    name = options["data"] or checkpoint.recipe_of(payload, path)["data"]["name"]
    test = data.load(name, data_dir=options["data_dir"], test_limit=options["test_limit"]).test
    words = ("attack", "norm", "eps", "steps", "restarts", "surrogate", "seed")
    attack = {key: options[key] for key in words}
    if attack["eps"] is None:
        attack["eps"] = payload["settings"]["eps"]
    result = attacked(payload, path, test, device, processes, **attack)
    if not processes.leads:
        return
    print(
        f"{path}, epoch {payload['epoch']}, {result['samples']} test images of {name}:\n"
        f"SA {result['clean_accuracy']:.2%}, RA {result['robust_accuracy']:.2%} "
        f"({result['attack']}, {result['norm']}, eps {result['eps']:.4g}) in {result['seconds']:.1f} s"
    )
    if options["json"] is not None:
        write_json(options["json"], {"checkpoint": path, "epoch": payload["epoch"], "data": name, **result})


def attacked(
    payload: Mapping[str, Any],
    path: str | Path,
    test: ImageDataset,
    device: str,
    processes: Processes | None = None,
    *,
    seed: int,
    **attack: Any,
) -> Options:
    """How the network of a checkpoint does on the test images, in plain values."""
    import torch
    from tqdm import tqdm

    from blokern.attack import evaluate
    from blokern.bilevel import checkpoint
    from blokern.data import Batches
    from blokern.distributed import Processes

    network = payload["recipe"]["model"]
    if (test.images.shape[1], test.num_classes) != (network["in_channels"], network["num_classes"]):
        raise ValueError(
            f"data: {test.name} has {test.images.shape[1]} channels and {test.num_classes} classes, "
            f"the network in {path} {network['in_channels']} and {network['num_classes']}"
        )
    model = checkpoint.load_model(payload, path).to(device)
    processes = processes or Processes()
    generator = torch.Generator(device)
    adversary = _adversary(model, generator, **attack)
    batches = Batches(test, 256)
    own = batches.dealt(processes.rank, processes.size, generator, seed)
    with tqdm(
        own,
        adversary.name,
        math.ceil(len(batches) / processes.size),
        unit="batch",
        disable=None if processes.leads else True,
        leave=False,
    ) as bar:
        result = evaluate(model, bar, adversary, processes=processes)
    return {**attack, "seed": seed, "attack": adversary.name, **asdict(result)}


def _adversary(
    model: nn.Module,
    generator: torch.Generator,
    *,
    attack: str,
    norm: Any,
    eps: float,
    steps: int,
    restarts: int,
    surrogate: Any = None,
) -> Any:
    from blokern.attack import APGD, FGSM, PGD

    how: Any = {"generator": generator, "surrogate": surrogate}
    if attack == "fgsm":
        return FGSM(model, eps, norm=norm, **how)
    if attack == "apgd":
        return APGD(model, eps, steps, norm, restarts, early_stop=True, **how)
    return PGD(model, eps, eps / 4, steps, norm, restarts, early_stop=True, **how)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values for programs and people to read."""
    from blokern.bilevel.checkpoint import write_atomically

    write_atomically(path, f"{json.dumps(value, indent=2)}\n".encode())

"""``blokern evaluate``: the accuracy of a checkpoint, with and without an attack."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from blokern.cli.options import (
    MACHINE_OPTIONS,
    STRENGTH_OPTIONS,
    TEST_LIMIT,
    Number,
    Option,
    Options,
    check_known,
    counted,
    make_parser,
    parse,
    say,
    select_device,
    told_of,
)
from blokern.cli.output import JSON, check_files, write_json
from blokern.cli.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from blokern.bilevel import ThreatModel
    from blokern.data import ImageDataset
    from blokern.distributed import Processes

__all__ = ["ATTACKS", "attacked", "check_attack", "evaluate"]

ATTACKS = ("pgd", "apgd", "fgsm")

_Batch = TypeVar("_Batch")


def evaluate(argv: list[str]) -> int:
    """Attack a trained network on the test images: blokern evaluate CHECKPOINT."""
    parser = make_parser(
        "evaluate",
        "Standard accuracy (SA) and robust accuracy (RA) of a checkpoint on the test images.",
        [
            Option("data", str, None, "data set (default: as trained)"),
            Option("data_dir", str, None, "folder with the data set's files (default: as trained)"),
            TEST_LIMIT,
            Option("attack", str, "pgd", f"one of {', '.join(ATTACKS)}"),
            Option("norm", str, None, "of the attack: linf, l2 or l1 (default: as trained, or linf)"),
            Option(
                "eps",
                Number,
                None,
                "budget of the attack, for pixels in [0, 1] (default: as trained; needed where the training met no "
                "attack, or one in another norm)",
            ),
            *(
                replace(option, default=None, help=f"{option.help} (default: {option.default})")
                for option in STRENGTH_OPTIONS
            ),
            Option(
                "surrogate", str, None, "fp32 or bf16: step by a faster copy of the network, judge by itself"
            ),
            Option("seed", int, 0, "of the attack's random starts"),
            Option("json", str, None, "also write the result to this file"),
            *MACHINE_OPTIONS,
        ],
        of_run=("data", "data_dir"),
    )
    parser.add_argument(
        "checkpoint", type=str, help="best.pt or last.pt of a run, or the run's folder for its best.pt"
    )
    options = parse(parser, argv)
    check_known("attack", options["attack"], ATTACKS)

    from blokern.distributed import joined

    with joined() as processes:
        _evaluate(options, select_device(options), processes)
    return 0


def _evaluate(options: Options, device: str, processes: Processes) -> None:
    from blokern import data

    source = Source.open(options["checkpoint"])
    check_files([("json", options["json"], JSON)], sources=[source.path])
    name = options["data"] or source.data["name"]
    threat = _budget(options, source)
    words = ("attack", "surrogate", "seed")
    attack = {**{key: options[key] for key in words}, "norm": threat.norm, "eps": threat.eps}
    for option in STRENGTH_OPTIONS:
        given = options[option.name]
        if attack["attack"] != "fgsm":
            attack[option.name] = option.default if given is None else given
        elif given is not None and processes.leads:
            say(f"fgsm takes one step from the image: --{option.name} is not used")
    check_attack(attack)
    data_dir = options["data_dir"] or source.data_dir
    with told_of("data"):
        test = data.load(name, data_dir=data_dir, test_limit=options["test_limit"]).test
    result = attacked(source, test, device, processes, **attack)
    if not processes.leads:
        return
    trained = ", as trained" if threat == source.threat else ""
    print(
        f"{source}, {result['samples']} test images of {name}:\n"
        f"SA {result['clean_accuracy']:.2%}, RA {result['robust_accuracy']:.2%} "
        f"({result['attack']}, {threat}{trained}) in {result['seconds']:.1f} s"
    )
    if options["json"] is not None:
        about = {"checkpoint": str(source.path), "epoch": source.epoch, "data": name}
        write_json(options["json"], {**about, **result})


def _budget(options: Options, source: Source) -> ThreatModel:
    """The threat model that the command line names, or else that of the training: none is made up."""
    from blokern.attack.checks import check_norm
    from blokern.bilevel import ThreatModel

    trained = source.threat
    norm: Any = options["norm"] or (trained.norm if trained else "linf")
    check_norm(norm)
    if options["eps"] is not None:
        return ThreatModel(eps=options["eps"], norm=norm)
    if trained is None:
        why = "its training met no attack whose budget could be taken"
    elif trained.norm != norm:
        why = f"it was trained for {trained}, which says nothing of {norm}"
    elif (trained.clip_min, trained.clip_max) != (0.0, 1.0):
        why = f"it was trained for images in [{trained.clip_min:g}, {trained.clip_max:g}], and these lie in [0, 1]"
    else:
        return trained
    how = "give --eps, such as --eps 8/255" if norm == "linf" else f"give --eps, a radius in {norm}"
    raise ValueError(f"eps is needed for {source.path}: {why}; {how}")


def check_attack(attack: Options) -> None:
    """Raise for what the attack would refuse, before anything is loaded or trained."""
    from torch import Generator, nn

    words = {key: value for key, value in attack.items() if key != "seed"}
    _adversary(nn.Identity(), Generator(), **words)


def attacked(
    source: Source,
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
    from blokern.data import Batches
    from blokern.distributed import Processes

    model = source.network().to(device).eval()
    _check_images(model, source, test)
    processes = processes or Processes()
    generator = torch.Generator(device)
    adversary = _adversary(model, generator, **attack)
    batches = Batches(test, 256)
    own = batches.dealt(processes.rank, processes.size, generator, seed)
    total = math.ceil(len(batches) / processes.size)
    watched = sys.stderr.isatty()
    if processes.leads and not watched:
        say(f"{adversary.name} on {len(test)} images, {device}, {counted(torch.get_num_threads(), 'thread')}")
    with tqdm(
        own, adversary.name, total, unit="batch", disable=not (watched and processes.leads), leave=False
    ) as bar:
        news = processes.leads and not watched
        result = evaluate(model, _told(bar, total) if news else bar, adversary, processes=processes)
    return {**attack, "seed": seed, "attack": adversary.name, **asdict(result)}


def _told(batches: Iterable[_Batch], total: int) -> Iterator[_Batch]:
    """The batches; where no bar shows how far they are, a line says it every half minute."""
    said = time.monotonic()
    for done, batch in enumerate(batches):
        if done and time.monotonic() - said > 30:
            say(f"{done} of {total} batches")
            said = time.monotonic()
        yield batch


def _check_images(model: nn.Module, source: Source, test: ImageDataset) -> None:
    """Raise unless the network takes the images and tells as many classes as there are."""
    from blokern.bilevel import checkpoint

    shape = tuple(test.images.shape[1:])
    network = source.recipe["model"]
    channels, classes = network.get("in_channels", shape[0]), network.get("num_classes", test.num_classes)
    if (shape[0], test.num_classes) != (channels, classes):
        raise ValueError(
            f"data: {test.name} has {shape[0]} channels and {test.num_classes} classes, "
            f"the network in {source.path} {channels} and {classes}"
        )
    told = checkpoint.classes_of(model, source.path, shape)
    if told != test.num_classes:
        raise ValueError(
            f"data: {test.name} has {test.num_classes} classes, the network in {source.path} {told}"
        )


def _adversary(
    model: nn.Module,
    generator: torch.Generator,
    *,
    attack: str,
    norm: Any,
    eps: float,
    steps: int = 1,
    restarts: int = 1,
    surrogate: Any = None,
) -> Any:
    from blokern.attack import APGD, FGSM, PGD

    how: Any = {"generator": generator, "surrogate": surrogate}
    if attack == "fgsm":
        return FGSM(model, eps, norm=norm, **how)
    if attack == "apgd":
        return APGD(model, eps, steps, norm, restarts, early_stop=True, **how)
    return PGD(model, eps, eps / 4, steps, norm, restarts, early_stop=True, **how)

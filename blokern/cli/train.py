"""``blokern train``: a network, by one method."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import yaml

from blokern.cli.options import (
    CHECKPOINT_MINUTES,
    DATA_OPTIONS,
    KEEP_LAST,
    MACHINE_OPTIONS,
    SETTINGS,
    Options,
    check_known,
    counted,
    first_line,
    flag,
    in_words,
    make_parser,
    methods,
    parse,
    pick,
    run_options,
    say,
    select_device,
    told_of,
)
from blokern.cli.output import check_run_folder
from blokern.cli.parser import Parser

if TYPE_CHECKING:
    from blokern.bilevel import Trainer
    from blokern.data import Splits
    from blokern.distributed import Processes

__all__ = ["at_work", "load_data", "make_trainer", "train", "train_parser"]


def train(argv: list[str]) -> int:
    """Train a network: blokern train METHOD --out FOLDER."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: blokern train METHOD --out FOLDER ...\n")
        for name, (rule, _) in methods().items():
            print(f"  {name:12} {first_line(rule)}")
        print("\nblokern train METHOD --help lists the options of one.")
        return 0 if argv else 2
    method, rest = argv[0], argv[1:]
    check_known("method", method, methods())
    parser = train_parser(method)
    options = parse(parser, rest)
    check_run_folder(Path(options["out"]))
    settings = Path(options["out"], SETTINGS)
    own = settings.exists() and settings.read_text(encoding="utf-8").startswith(_header(method))
    if options["resume"] and own:
        # Before the flags: nothing has to be said again, and a flag that says otherwise is noticed.
        options = parse(parser, ["--config", str(settings), *rest])
    elif options["resume"] and not _describes(rest) and not _holds_run(Path(options["out"])):
        raise ValueError(
            f"out: {options['out']} holds no run to resume; to start one there, say what on: --data, --epochs, ..."
        )
    from blokern.bilevel.record import accuracies, ranking
    from blokern.distributed import joined

    with joined() as processes:
        trainer = make_trainer(method, options, processes=processes)
        if processes.leads:
            say(f"{method}: {at_work(trainer, options)}")
        best = max(trainer.fit(), key=ranking)
        if processes.leads:
            print(f"best: epoch {best['epoch']}, on validation images {accuracies(best)}")
            budget = "" if trainer.threat else f" --eps {in_words(options['eps'])}"
            print(f"next: blokern evaluate {quote(str(trainer.run_dir / 'best.pt'))}{budget}")
    return 0


def _holds_run(folder: Path) -> bool:
    return any(folder.glob("last*.pt")) or (folder / "best.pt").exists()


def _describes(words: Sequence[str]) -> bool:
    """Whether a command line says anything of what a run is: more than where it is and what it runs on."""
    own = [CHECKPOINT_MINUTES, KEEP_LAST, *MACHINE_OPTIONS]
    of_place = {"--out", "--resume", "--debug", *(flag(option.name) for option in own)}
    return any(word.startswith("--") and word.partition("=")[0] not in of_place for word in words)


def train_parser(method: str) -> Parser:
    """Of the words after ``blokern train METHOD``."""
    parser = make_parser(
        f"train {method}",
        f"{first_line(methods()[method][0])} Pixels lie in [0, 1]; eps and steps are in that unit.",
        [*run_options(method), CHECKPOINT_MINUTES, KEEP_LAST, *MACHINE_OPTIONS],
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the run, made if needed")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out, or start it where there is none yet"
    )
    return parser


def make_trainer(
    method: str,
    options: Options,
    keep_epochs: Collection[int] = (),
    processes: Processes | None = None,
) -> Trainer:
    """The run that the options describe, ready to fit, its settings.yaml written."""
    import torch

    from blokern import keep_freed_memory, models
    from blokern.bilevel import Trainer, TrainSettings, checkpoint
    from blokern.bilevel.checkpoint import write_atomically
    from blokern.distributed import Processes

    processes = processes or Processes()
    keep_freed_memory()
    device = select_device(options)
    rule_type, settings_type = methods()[method]
    settings = TrainSettings(**pick(options, TrainSettings))
    method_settings = settings_type(**pick(options, settings_type))
    splits, recipe = load_data(options, settings.seed)
    torch.manual_seed(settings.seed)
    with told_of("model"):
        model = models.build(**recipe["model"]).to(device)
    shape = tuple(splits.train.images.shape[1:])
    checkpoint.classes_of(model.eval(), f"model: {options['model']}", shape)
    model.train()

    trainer = Trainer(
        rule_type(model, settings.optimizer(model), method_settings, processes),
        splits,
        settings,
        options["out"],
        resume=options["resume"],
        recipe={"method": {"name": method, **asdict(method_settings)}, **recipe},
        checkpoint_minutes=options["checkpoint_minutes"],
        keep_epochs=keep_epochs,
        keep_last=options["keep_last"],
    )
    kept = {option.name: options[option.name] for option in run_options(method)}
    if kept["data_dir"] is not None:  # for commands that are given from elsewhere
        kept["data_dir"] = str(Path(kept["data_dir"]).absolute())
    text = yaml.safe_dump({key: value for key, value in kept.items() if value is not None}, sort_keys=False)
    words = (_header(method) + text).encode()
    processes.lead(lambda: write_atomically(trainer.run_dir / SETTINGS, words))
    return trainer


def at_work(trainer: Trainer, options: Options) -> str:
    """Which network, images and machine a run has, in a line."""
    import torch

    weights = sum(weight.numel() for weight in trainer.rule.model.parameters())
    images, held_out = (len(part) for part in (trainer.splits.train, trainer.splits.val))
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if trainer.device.type == "cpu" else ""
    return (
        f"{options['model']}, {weights:,} parameters; {images:,} training and {held_out:,} validation images of "
        f"{options['data']}; {trainer.device}{threads}"
    )


def load_data(options: Options, seed: int) -> tuple[Splits, Options]:
    """The data of a run, and what its recipe says about them and the network: "model" and "data"."""
    from blokern import data, models

    data_options = {option.name: options[option.name] for option in DATA_OPTIONS if option.name != "data"}
    with told_of("data"):
        splits = data.load(options["data"], **data_options, test_limit=options.get("test_limit"), seed=seed)
    del data_options["data_dir"]  # of this machine, not of the run

    network: Options = {
        "name": options["model"],
        "num_classes": splits.train.num_classes,
        "in_channels": splits.train.images.shape[1],
        "mean": splits.train.mean,
        "std": splits.train.std,
    }
    if options["width"] is not None and (
        options["model"] in models.BUILDERS or options["model"].startswith("timm:")
    ):
        builder = models.BUILDERS.get(options["model"])
        if builder is None or "width" not in inspect.signature(builder).parameters:
            raise ValueError(f"width: {options['model']} has none to set")
        network["width"] = options["width"]
    return splits, {"model": network, "data": {"name": options["data"], **data_options}}


def _header(method: str) -> str:
    """The first line of settings.yaml: how to use it, and for which method it is."""
    return f"# blokern train {method} --config {SETTINGS} --out FOLDER\n"

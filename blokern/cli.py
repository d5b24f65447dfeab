"""The command line: ``blokern train``, ``evaluate``, ``compare``, ``bench`` and ``info``.

Each command parses its own options, from flags and from a YAML file (``--config``), and imports what it
needs: ``blokern --help`` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import json
import platform
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type

from blokern._names import unknown_name
from blokern._version import __version__

if TYPE_CHECKING:
    from torch import nn

    from blokern.bilevel.trainer import Trainer
    from blokern.data import ImageDataset

__all__ = ["main"]

SETTINGS = "settings.yaml"
ATTACKS = ("pgd", "apgd", "fgsm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's), and return the exit code.

    0: done; 1: failed at work, as on a full disk; 2: an argument or a file is wrong; 128 + n: stopped by
    signal n. An error is a message on stderr, with its traceback only after ``--debug``.

    >>> main(["train", "fast-bat", "--out", "runs/a", "--eps", "0.1"])
    0
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as done:  # --help and --print_config end so
        return int(done.code or 0)
    except KeyboardInterrupt as stop:
        print(f"blokern: {stop}" if str(stop) else "blokern: stopped", file=sys.stderr)
        return 128 + int(getattr(stop, "signum", signal.SIGINT))
    except (ArgumentError, ValueError, OSError, FloatingPointError, ImportError) as error:
        if "--debug" in argv:
            raise
        print(f"blokern: error: {_message(error)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError | ValueError) else 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: blokern COMMAND ...\n\nRobust networks: train them, attack them, compare methods.\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {_first_line(command)}")
        print("\nblokern COMMAND --help says more; blokern --version prints the version.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"blokern {__version__}")
        return 0
    _choose("command", argv[0], COMMANDS)
    return COMMANDS[argv[0]](argv[1:])


# --- Options ------------------------------------------------------------------------------------------------

Options: TypeAlias = dict[str, Any]


class Number(float):
    """A float; as text also inf, or a fraction such as 8/255."""

    def __new__(cls, value: Any) -> Number:
        if isinstance(value, str) and "/" in value:
            above, below = map(float, value.split("/"))
            if below == 0:
                raise ValueError("division by zero")
            value = above / below
        return super().__new__(cls, value)


class Seeds(tuple[int, ...]):
    """Whole numbers; as text, separated by commas."""

    def __new__(cls, value: Any) -> Seeds:
        parts = value.split(",") if isinstance(value, str) else value
        return super().__new__(cls, map(int, parts if isinstance(parts, list | tuple) else [parts]))


register_type(Number, serializer=float)
register_type(Seeds, serializer=list)


@dataclass(frozen=True)
class Option:
    """The flag ``--name``, and the key ``name`` of a YAML file."""

    name: str
    type: Any
    default: Any
    help: str


DATA_OPTIONS = (
    Option("data", str, "digits", "data set; digits and synthetic need no files"),
    Option("data_dir", str, None, "folder with the data set's files"),
    Option("val_fraction", Number, Number(0.1), "part of the training images set aside for validation"),
    Option("train_limit", int, None, "use only the first so many training images (default: all)"),
)
MODEL_OPTIONS = (
    Option("model", str, "small_cnn", "network; timm:NAME where timm is installed"),
    Option("width", int, None, "channels of the network's first stage (default: the network's own)"),
)
CHECKPOINT_MINUTES = Option(
    "checkpoint_minutes", Number, Number(10.0), "minutes between the checkpoints within an epoch"
)
TEST_LIMIT = Option("test_limit", int, None, "use only the first so many test images (default: all)")
STRENGTH_OPTIONS = (
    Option("steps", int, 50, "steps of the attack on the test images; of eps / 4 for pgd"),
    Option("restarts", int, 10, "random restarts of the attack on the test images"),
)
MACHINE_OPTIONS = (
    Option("device", str, "auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one"),
    Option("threads", int, None, "CPU threads (default: torch's choice)"),
)

#: The methods' settings in words. clip_min and clip_max are no options: the images always lie in [0, 1].
METHOD_HELP = {
    "precision": "fp32, or bf16 for forward passes under bfloat16 autocast",
    "step_size": "step of the training attack, in pixel units (default: the method's own for this eps)",
    "attack_steps": "steps of the training attack",
    "lam": "λ of the implicit term; 0 means 1 / step_size, inf switches the term off",
    "penalty": "weight of the gradient alignment (default: the paper's for this eps)",
    "beta": "weight of the KL divergence",
}


def _methods() -> dict[str, tuple[type, type]]:
    from blokern.bilevel import METHODS  # torch takes a second to import

    return METHODS


def _train_options() -> list[Option]:
    """Those of TrainSettings, in the words of its docstring."""
    from blokern.bilevel.trainer import TrainSettings

    words = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(TrainSettings) or "", re.M))
    return [
        Option(name, kind, default, re.sub(r"\s+", " ", words[name]).rstrip("."))
        for name, kind, default in _fields(TrainSettings)
    ]


def _method_options(method: str) -> list[Option]:
    return [
        Option(name, kind, default, METHOD_HELP[name])
        for name, kind, default in _fields(_methods()[method][1])
        if name not in ("eps", "clip_min", "clip_max")  # eps is one of _train_options
    ]


def _fields(settings: type) -> list[tuple[str, Any, Any]]:
    """Name, type and default of each field; of an optional one, the type that it has when given."""
    hints = get_type_hints(settings)
    result = []
    for field in fields(settings):
        kind = next((kind for kind in get_args(hints[field.name]) if kind in (int, float)), hints[field.name])
        default = Number(field.default) if isinstance(field.default, float) else field.default
        result.append((field.name, Number if kind is float else kind, default))
    return result


def _run_options(method: str) -> list[Option]:
    """All that makes a run what it is: what settings.yaml keeps."""
    return [*DATA_OPTIONS, *MODEL_OPTIONS, *_train_options(), *_method_options(method)]


def _parser(command: str, description: str, options: Iterable[Option]) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"blokern {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help=f"YAML file of options, such as a run's {SETTINGS}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for option in options:
        parser.add_argument(_flag(option.name), type=option.type, default=option.default, help=option.help)
    return parser


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> Options:
    parsed = parser.parse_args(list(argv)).as_dict()
    return {name: float(value) if isinstance(value, Number) else value for name, value in parsed.items()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- train --------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """Train a network: blokern train METHOD --out FOLDER."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: blokern train METHOD --out FOLDER ...\n")
        for name, (rule, _) in _methods().items():
            print(f"  {name:12} {_first_line(rule)}")
        print("\nblokern train METHOD --help lists the options of one.")
        return 0 if argv else 2
    method, rest = argv[0], argv[1:]
    _choose("method", method, _methods())
    parser = _train_parser(method)
    options = _parse(parser, rest)
    settings = Path(options["out"], SETTINGS)
    if options["resume"] and settings.exists() and settings.read_text().startswith(_header(method)):
        # Before the flags: nothing has to be said again, and a flag that says otherwise is noticed.
        options = _parse(parser, ["--config", str(settings), *rest])
    trainer = _trainer(method, options)
    history = trainer.fit()
    best = max(history, key=lambda record: (record["val_robust_accuracy"], record["val_accuracy"]))
    accuracies = f"SA {best['val_accuracy']:.2%}, RA {best['val_robust_accuracy']:.2%}"
    print(f"best: epoch {best['epoch']}, on validation images {accuracies}")
    print(f"next: blokern evaluate {trainer.run_dir / 'best.pt'}")
    return 0


def _train_parser(method: str) -> ArgumentParser:
    parser = _parser(
        f"train {method}",
        f"{_first_line(_methods()[method][0])} Pixels lie in [0, 1]; eps and steps are in that unit.",
        [*_run_options(method), CHECKPOINT_MINUTES, *MACHINE_OPTIONS],
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the run, made if needed")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out, or start it where there is none yet"
    )
    return parser


def _trainer(method: str, options: Options) -> Trainer:
    """The run that the options describe, ready to fit, its settings.yaml written."""
    import torch

    from blokern import data, models
    from blokern.bilevel.trainer import Trainer, TrainSettings

    device = _device(options)
    rule_type, settings_type = _methods()[method]
    settings = TrainSettings(**_pick(options, TrainSettings))
    method_settings = settings_type(**_pick(options, settings_type))
    data_options = {option.name: options[option.name] for option in DATA_OPTIONS if option.name != "data"}
    splits = data.load(options["data"], **data_options, seed=settings.seed)
    del data_options["data_dir"]  # of this machine, not of the run

    network: Options = {
        "name": options["model"],
        "num_classes": splits.train.num_classes,
        "in_channels": splits.train.images.shape[1],
        "mean": splits.train.mean,
        "std": splits.train.std,
    }
    if options["width"] is not None:
        builder = models.BUILDERS.get(options["model"])
        if builder is not None and "width" not in inspect.signature(builder).parameters:
            raise ValueError(f"width: {options['model']} has none to set")
        network["width"] = options["width"]
    torch.manual_seed(settings.seed)
    model = models.build(**network).to(device)

    trainer = Trainer(
        rule_type(model, settings.optimizer(model), method_settings),
        splits,
        settings,
        options["out"],
        resume=options["resume"],
        recipe={
            "method": {"name": method, **asdict(method_settings)},
            "model": network,
            "data": {"name": options["data"], **data_options},
        },
        checkpoint_minutes=options["checkpoint_minutes"],
    )
    kept = {option.name: options[option.name] for option in _run_options(method)}
    text = yaml.safe_dump({key: value for key, value in kept.items() if value is not None}, sort_keys=False)
    _write(trainer.run_dir / SETTINGS, _header(method) + text)
    return trainer


def _header(method: str) -> str:
    """The first line of settings.yaml: how to use it, and for which method it is."""
    return f"# blokern train {method} --config {SETTINGS} --out FOLDER\n"


# --- evaluate -----------------------------------------------------------------------------------------------


def evaluate(argv: list[str]) -> int:
    """Attack a trained network on the test images: blokern evaluate CHECKPOINT."""
    parser = _parser(
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
            Option("seed", int, 0, "of the attack's random starts"),
            Option("json", str, None, "also write the result to this file"),
            *MACHINE_OPTIONS,
        ],
    )
    parser.add_argument("checkpoint", type=str, help="best.pt or last.pt of a run")
    options = _parse(parser, argv)
    _choose("attack", options["attack"], ATTACKS)
    device = _device(options)

    from blokern import data
    from blokern.bilevel import checkpoint

    path = options["checkpoint"]
    payload = checkpoint.load(path)
    if "model" not in payload.get("recipe", {}):
        raise checkpoint.CheckpointError(
            f"{path} does not say how its network is built; see checkpoint.load_weights to use it in Python"
        )
    name = options["data"] or payload["recipe"]["data"]["name"]
    test = data.load(name, data_dir=options["data_dir"], test_limit=options["test_limit"]).test
    attack = {key: options[key] for key in ("attack", "norm", "eps", "steps", "restarts", "seed")}
    if attack["eps"] is None:
        attack["eps"] = payload["settings"]["eps"]
    result = _attacked(payload, path, test, device, **attack)
    print(
        f"{path}, epoch {payload['epoch']}, {result['samples']} test images of {name}:\n"
        f"SA {result['clean_accuracy']:.2%}, RA {result['robust_accuracy']:.2%} "
        f"({result['attack']}, {result['norm']}, eps {result['eps']:.4g}) in {result['seconds']:.1f} s"
    )
    if options["json"] is not None:
        _write(
            options["json"], _json({"checkpoint": path, "epoch": payload["epoch"], "data": name, **result})
        )
    return 0


def _attacked(
    payload: Mapping[str, Any], path: str | Path, test: ImageDataset, device: str, **attack: Any
) -> Options:
    """How the network of a checkpoint does on the test images, in plain values."""
    from tqdm import tqdm

    from blokern import models
    from blokern.attack import evaluate
    from blokern.bilevel import checkpoint
    from blokern.data import Batches

    network = payload["recipe"]["model"]
    if (test.images.shape[1], test.num_classes) != (network["in_channels"], network["num_classes"]):
        raise ValueError(
            f"data: {test.name} has {test.images.shape[1]} channels and {test.num_classes} classes, "
            f"the network in {path} {network['in_channels']} and {network['num_classes']}"
        )
    model = models.build(**network)
    checkpoint.load_weights(model, payload["model"], path)
    adversary = _adversary(model.to(device), **attack)
    with tqdm(Batches(test, 256), desc=adversary.name, unit="batch", disable=None, leave=False) as batches:
        result = evaluate(model, batches, adversary)
    return {**attack, "attack": adversary.name, **asdict(result)}


def _adversary(
    model: nn.Module, *, attack: str, norm: Any, eps: float, steps: int, restarts: int, seed: int
) -> Any:
    import torch

    from blokern.attack import APGD, FGSM, PGD

    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    if attack == "fgsm":
        return FGSM(model, eps, norm=norm, generator=generator)
    if attack == "apgd":
        return APGD(model, eps, steps, norm, restarts, early_stop=True, generator=generator)
    return PGD(model, eps, eps / 4, steps, norm, restarts, early_stop=True, generator=generator)


# --- compare ------------------------------------------------------------------------------------------------


def compare(argv: list[str]) -> int:
    """Train and attack several methods over several seeds: blokern compare METHOD ... --out FOLDER."""
    shared = [
        *DATA_OPTIONS,
        *MODEL_OPTIONS,
        *(option for option in _train_options() if option.name != "seed"),
    ]
    passed_on = [*shared, CHECKPOINT_MINUTES, *MACHINE_OPTIONS]
    parser = _parser(
        "compare",
        "Trains each method with each seed, attacks best.pt and last.pt of each run on the test images with "
        "PGD, and writes results.md, results.json, comparison.png and curves.png. A METHOD may have a label "
        "and options of its own: fast-at fast-bat:step_size=20 no-implicit=fast-bat:step_size=20,lam=inf. "
        "Given again, the same command continues where it was stopped.",
        [*passed_on, TEST_LIMIT, *STRENGTH_OPTIONS],
    )
    parser.add_argument(
        "methods", nargs="+", metavar="[LABEL=]METHOD[:KEY=VALUE,...]", help="what to compare"
    )
    parser.add_argument("--seeds", type=Seeds, default=Seeds(0), help="such as 0,1,2: a run for each")
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and the results")
    options = _parse(parser, argv)
    entries = [Entry.parse(text) for text in options["methods"]]
    for name, values in (("seeds", options["seeds"]), ("labels", [entry.label for entry in entries])):
        if len(set(values)) < len(values):
            hint = "; write LABEL=METHOD to name one" if name == "labels" else ""
            raise ValueError(f"{name} must differ, got {', '.join(map(str, values))}{hint}")

    from blokern import data

    out = Path(options["out"])
    test = data.load(options["data"], data_dir=options["data_dir"], test_limit=options["test_limit"]).test
    attack = {"attack": "pgd", "norm": "linf", "eps": options["eps"], "seed": 0}
    attack |= {option.name: options[option.name] for option in STRENGTH_OPTIONS}
    # All are parsed before the first run: a mistake in the last must not cost the time of the others.
    plans = {
        entry: [
            _parse(
                _train_parser(entry.method),
                [
                    *(f"{_flag(o.name)}={options[o.name]}" for o in passed_on if options[o.name] is not None),
                    *(f"{_flag(key)}={value}" for key, value in entry.options),
                    *(f"--seed={seed}", f"--out={out / entry.label / f'seed-{seed}'}", "--resume"),
                ],
            )
            for seed in options["seeds"]
        ]
        for entry in entries
    }
    runs = {entry: [_run(entry, plan, test, attack) for plan in plans[entry]] for entry in entries}
    _write_results(out, runs, options)
    print((out / "results.md").read_text(), end="")
    return 0


@dataclass(frozen=True)
class Entry:
    """One of the compared: a method, and the options that it alone has."""

    label: str
    method: str
    options: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read ``[LABEL=]METHOD[:KEY=VALUE,...]``."""
        head, _, tail = text.partition(":")
        label, _, method = head.rpartition("=")
        _choose("method", method, _methods())
        label = label or method
        if not re.fullmatch(r"[\w+-][\w.+-]*", label):  # it names a folder
            raise ValueError(f"methods: a label is made of letters, digits and - _ + ., got {label!r}")
        # Data and seeds are the same for all.
        own = _run_options(method)[len(DATA_OPTIONS) :]
        known = [option.name for option in own if option.name != "seed"]
        options = []
        for part in tail.split(",") if tail else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"methods: expected KEY=VALUE after the colon of {text!r}, got {part!r}")
            _choose(f"option of {method}", key := key.replace("-", "_"), known)
            options.append((key, value))
        return cls(label, method, tuple(options))


@dataclass(frozen=True)
class Run:
    """A run of a comparison, finished."""

    seed: int
    best: Options  # as _attacked returns it, on the test images
    last: Options
    history: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """Training time an epoch; the median, since other programs may disturb some epochs."""
        return statistics.median(record["train_seconds"] for record in self.history)


def _run(entry: Entry, options: Options, test: ImageDataset, attack: Options) -> Run:
    """Train and attack, except for what is there already."""
    from blokern.bilevel import checkpoint

    trainer = _trainer(entry.method, options)
    print(f"{entry.label}, seed {options['seed']}:", file=sys.stderr)
    history = trainer.fit()
    results: dict[str, Options] = {}
    for name in ("best", "last"):
        path = trainer.run_dir / f"{name}.pt"
        stored = trainer.run_dir / f"test-{name}.json"
        question = {**attack, "images": len(test), "checkpoint": checkpoint.fingerprint(path)}
        known = [*results.values(), *([json.loads(stored.read_text())] if stored.exists() else [])]
        # The last epoch is often the best one, and then one attack answers both.
        answers = [answer for answer in known if answer["question"] == question]
        if not answers:
            payload = checkpoint.load(path)
            answer = _attacked(payload, path, test, _device(options), **attack)
            answers = [{"question": question, "epoch": payload["epoch"], **answer}]
        results[name] = answers[0]
        _write(stored, _json(results[name]))
    return Run(options["seed"], results["best"], results["last"], history)


def _write_results(out: Path, runs: Mapping[Entry, Sequence[Run]], options: Options) -> None:
    from blokern import plots

    attack = next(iter(runs.values()))[0].best["attack"]
    rows = [
        f"{options['data']}, {options['model']}, eps {options['eps']:.4g}, {options['epochs']} epochs; "
        f"{attack} on {next(iter(runs.values()))[0].best['samples']} test images; "
        f"mean ± standard deviation over seeds {', '.join(map(str, options['seeds']))}.",
        "",
        f"| method | SA % | {attack} % | {attack} %, last epoch | s an epoch |",
        "|---|---|---|---|---|",
    ]
    for entry, own in runs.items():
        cells = (
            _mean([100 * run.best["clean_accuracy"] for run in own]),
            _mean([100 * run.best["robust_accuracy"] for run in own]),
            _mean([100 * run.last["robust_accuracy"] for run in own]),
            _mean([run.seconds for run in own]),
        )
        rows.append(f"| {entry.label} | {' | '.join(cells)} |")
    results = {
        "options": {key: value for key, value in options.items() if key not in ("config", "out", "debug")},
        "machine": _machine(),
        "methods": {
            entry.label: {
                "method": entry.method,
                "options": dict(entry.options),
                "runs": [
                    {"seed": run.seed, "best": run.best, "last": run.last, "seconds_an_epoch": run.seconds}
                    for run in own
                ],
            }
            for entry, own in runs.items()
        },
    }
    _write(out / "results.md", "\n".join(rows) + "\n")
    _write(out / "results.json", _json(results))
    plots.comparison(
        {
            entry.label: {
                "SA": [run.best["clean_accuracy"] for run in own],
                attack: [run.best["robust_accuracy"] for run in own],
            }
            for entry, own in runs.items()
        },
        out / "comparison.png",
    )
    plots.curves(
        {
            entry.label: [
                {key: statistics.fmean(record[key] for record in epoch) for key in epoch[0]}
                for epoch in zip(*(run.history for run in own), strict=True)
            ]
            for entry, own in runs.items()
        },
        out / "curves.png",
    )


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


# --- bench and info -----------------------------------------------------------------------------------------


def bench(argv: list[str]) -> int:
    """Measure the speed of ops and steps, in a checkout of the repository: blokern bench --help."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(f"the benchmarks come with the repository; {root} has no benchmarks/run.py")
    sys.path.insert(0, str(root))
    try:
        return int(importlib.import_module("benchmarks.run").main(argv) or 0)
    finally:
        sys.path.remove(str(root))


def info(argv: list[str]) -> int:
    """Print versions, the build and the machine, for bug reports."""
    _device(_parse(_parser("info", "Versions, the build and the machine.", MACHINE_OPTIONS), argv))
    for name, value in _machine().items():
        print(f"{name + ':':24} {value}")
    return 0


def _machine() -> dict[str, str]:
    import torch

    try:
        from blokern import _backend

        build = {f"build {name}": value for name, value in _backend.build_info().items()}
    except ImportError as error:
        build = {"build": f"not loaded: {error}"}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda = f"{torch.version.cuda}; {', '.join(devices) or 'no device'}" if torch.version.cuda else "not built"
    return {
        "blokern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        **build,
        "cpu instruction set": torch.backends.cpu.get_cpu_capability(),
        "cpu threads": str(torch.get_num_threads()),
        "cuda": f"{torch.version.cuda}; {', '.join(cuda) or 'no device'}"
        if torch.version.cuda
        else "not built",
    }


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "bench": bench,
    "info": info,
}


# --- Small things -------------------------------------------------------------------------------------------


def _choose(what: str, word: str, words: Iterable[str]) -> None:
    words = list(words)
    if word not in words:
        raise unknown_name(what, word, words)


def _device(options: Options) -> str:
    """The device that ``--device`` names; sets the threads that ``--threads`` asks for."""
    import torch

    if options["threads"] is not None:
        if options["threads"] < 1:
            raise ValueError(f"threads must be at least 1, got {options['threads']}")
        torch.set_num_threads(options["threads"])
    name: str = options["device"]
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there, torch sees {torch.cuda.device_count()} CUDA devices")
    return name


def _pick(options: Options, settings: type) -> Options:
    return {field.name: options[field.name] for field in fields(settings) if field.name in options}


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _message(error: BaseException) -> str:
    """In the user's terms: jsonargparse names Python classes."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(error)).replace("\n ", " ")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(path: str | Path, text: str) -> None:
    from blokern.bilevel.checkpoint import write_atomically

    write_atomically(path, text.encode())

"""What the commands' options are, how they are parsed, and what some of them mean."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from blokern._names import unknown_name
from blokern.cli.parser import Because, Parser, Text, flag

__all__ = [
    "CHECKPOINT_MINUTES",
    "DATA_OPTIONS",
    "INPUT_SHAPE",
    "KEEP_LAST",
    "MACHINE_OPTIONS",
    "MODEL_OPTIONS",
    "SETTINGS",
    "STRENGTH_OPTIONS",
    "TEST_LIMIT",
    "Densities",
    "Integers",
    "Names",
    "Number",
    "Option",
    "Options",
    "Shape",
    "Turns",
    "check_known",
    "counted",
    "drawn",
    "first_line",
    "flag",
    "in_words",
    "make_parser",
    "methods",
    "parse",
    "pick",
    "run_options",
    "say",
    "select_device",
    "set_threads",
    "settings_options",
    "told_of",
    "train_options",
]

#: The file in a run's folder that keeps the run's options.
SETTINGS = "settings.yaml"

#: The values that a command line gave, by the options' names.
Options: TypeAlias = dict[str, Any]


class Number(float, Text):
    """A float; as text also inf, or a fraction such as 8/255."""

    words = "a number, or a fraction such as 8/255"

    def __new__(cls, value: Any) -> Number:
        if isinstance(value, str) and "/" in value:
            above, below = map(float, value.split("/"))
            if below == 0:
                raise Because("division by zero")
            value = above / below
        if isinstance(value, bool):
            raise ValueError
        return super().__new__(cls, value)


class Integers(tuple[int, ...], Text):
    """Whole numbers; as text, separated by commas."""

    words = "integers, separated by commas"

    def __new__(cls, value: Any) -> Integers:
        return super().__new__(cls, _each(int, value))


class Shape(tuple[int, int, int], Text):
    """Channels, height and width; as text, separated by commas."""

    words = "channels, height and width, separated by commas"

    def __new__(cls, value: Any) -> Shape:
        sizes = tuple(_each(int, value))
        if len(sizes) != 3 or min(sizes) < 1:
            raise Because("expected three numbers >= 1, such as 3,32,32")
        return super().__new__(cls, sizes)


class Densities(tuple[float, ...], Text):
    """Numbers; as text, separated by commas."""

    words = "numbers, separated by commas"

    def __new__(cls, value: Any) -> Densities:
        return super().__new__(cls, map(float, _each(Number, value)))


class Names(tuple[str, ...], Text):
    """Names; as text, separated by commas."""

    words = "names, separated by commas"

    def __new__(cls, value: Any) -> Names:
        return super().__new__(cls, filter(None, _each(str, value)))


def _each(kind: type, value: Any) -> list[Any]:
    """The parts of a value: of text, between commas."""
    parts = value.split(",") if isinstance(value, str) else value
    found = []
    for part in parts if isinstance(parts, list | tuple) else [parts]:
        try:
            found.append(kind(part))
        except (ValueError, TypeError, OverflowError) as error:
            raise Because(f"{part!r} is none") from error
    return found


@dataclass(frozen=True)
class Option:
    """The flag ``--name``, and the key ``name`` of a YAML file; ``group`` is its heading in the help."""

    name: str
    type: Any
    default: Any
    help: str
    group: str = "options"


# --- Options of several commands ----------------------------------------------------------------------------

DATA_OPTIONS = (
    Option("data", str, "digits", "data set, see below; digits and synthetic need no files", "data"),
    Option("data_dir", str, None, "folder with the data set's files", "data"),
    Option(
        "val_fraction", Number, Number(0.1), "part of the training images set aside for validation", "data"
    ),
    Option("train_limit", int, None, "use only the first so many training images (default: all)", "data"),
)
MODEL_OPTIONS = (
    Option("model", str, "small_cnn", "network, see below; timm:NAME where timm is installed", "network"),
    Option(
        "width", int, None, "channels of the network's first stage (default: the network's own)", "network"
    ),
)
CHECKPOINT_MINUTES = Option(
    "checkpoint_minutes", Number, Number(10.0), "minutes between the checkpoints within an epoch", "run"
)
KEEP_LAST = Option("keep_last", int, 1, "how many of the last checkpoints to keep", "run")
TEST_LIMIT = Option("test_limit", int, None, "use only the first so many test images (default: all)", "test")
INPUT_SHAPE = Option(
    "input_shape",
    Shape,
    None,
    "channels, height and width of the images (default: as of the checkpoint's data)",
)
STRENGTH_OPTIONS = (
    Option("steps", int, 50, "steps of the attack on the test images; of eps / 4 for pgd", "test"),
    Option("restarts", int, 10, "random restarts of the attack on the test images", "test"),
)
MACHINE_OPTIONS = (
    Option("device", str, "auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one", "machine"),
    Option("threads", int, None, "CPU threads (default: torch's choice)", "machine"),
)


# --- Options of the trainer and of the methods --------------------------------------------------------------


def methods() -> dict[str, tuple[type, type]]:
    """Each method's rule and settings, by its name."""
    from blokern.bilevel import METHODS  # torch takes a second to import

    return METHODS


def pruning_methods() -> dict[str, tuple[type, type]]:
    """As :func:`methods`, those that prune."""
    from blokern.bilevel import PRUNERS, BiP, BiPSettings

    return {"bip": (BiP, BiPSettings), **PRUNERS}


def train_options() -> list[Option]:
    """Those of TrainSettings."""
    from blokern.bilevel import TrainSettings

    return [
        replace(option, group=_TRAIN_GROUPS.get(option.name.partition("_")[0], "training"))
        for option in settings_options(TrainSettings)
    ]


#: By the first word of a setting's name. The command line has one eps, for the method and for the validation.
_TRAIN_GROUPS = {"val": "validation", "eps": "attack"}


def settings_options(settings: type, without: Collection[str] = ()) -> list[Option]:
    """A dataclass of settings, but for some, in the words of its docstring and of those that it inherits."""
    words = _documented(settings)
    hints = get_type_hints(settings)
    options = []
    for field in fields(settings):
        if field.name in without:
            continue
        kind = _kind(hints[field.name])
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if kind in (Number, Names) and default is not None:
            default = kind(default)
        told = words.get(field.name, field.name.replace("_", " "))
        options.append(Option(field.name, kind, default, told, "method"))
    return options


def _documented(settings: type) -> dict[str, str]:
    """What the section Args of the docstrings says of each setting, a class's own before what it inherits."""
    words: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "")
        for names, said in re.findall(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", text, re.M):
            words |= dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", said).rstrip("."))
    return words


def _kind(hint: Any) -> Any:
    """The type of a setting's option; of an optional one, the type that it has when given."""
    if get_origin(hint) is Sequence:
        return Names
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    kind = next((kind for kind in members if kind in (int, float)), hint)
    return Number if kind is float else kind


def run_options(method: str) -> list[Option]:
    """All that makes a run what it is: what settings.yaml keeps."""
    # eps is one of train_options.
    own = settings_options(methods()[method][1], without=("eps", "clip_min", "clip_max"))
    return [*DATA_OPTIONS, *MODEL_OPTIONS, *train_options(), *own]


# --- Parsing ------------------------------------------------------------------------------------------------

#: One for each command.
_EXAMPLES = {
    "train": "blokern train fast-bat --data digits --eps 0.1 --step-size 20 --epochs 8 --out runs/bat",
    "prune": "blokern prune omp bip --density 0.2,0.1 --data digits --epochs 8 --seeds 0,1 --out runs/pruned",
    "evaluate": "blokern evaluate runs/bat/best.pt --steps 20 --restarts 1",
    "compare": "blokern compare fast-at fast-bat:step_size=20 --eps 0.1 --epochs 8 --seeds 0,1,2 --out runs/demo",
    "report": "blokern report runs/demo --out demo.html",
    "export": "blokern export runs/pruned/omp/density-0.1/seed-0/best.pt --form sparse --out small.safetensors",
    "spectrum": "blokern spectrum runs/bat/best.pt --images 500 --steps 30",
    "bench": "blokern bench model runs/pruned/omp/density-0.1/seed-0/best.pt --batch 1,128",
    "info": "blokern info",
}


def make_parser(
    command: str, description: str, options: Iterable[Option], of_run: Collection[str] | None = None
) -> Parser:
    """With the options that every command has; wrong words raise ValueError instead of ending the process.

    of_run: see :class:`Parser`.
    """
    parser = Parser(command, description, _last_words, of_run)
    parser.add_argument(
        "--config", type=str, help=f"YAML file of options, such as a run's {SETTINGS}; flags override it"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for option in options:
        parser.add_to(
            option.group, flag(option.name), type=option.type, default=option.default, help=option.help
        )
    return parser


def _last_words(parser: Parser) -> str:
    """Under the help: what names there are, and an example."""
    command, *method = parser.prog.split()[1:]
    own = {action.dest for action in parser._actions}
    lists: dict[str, Iterable[str]] = {}
    if command in ("compare", "prune"):
        lists["methods"] = methods() if command == "compare" else pruning_methods()
    if "data" in own:
        from blokern.data import NAMES

        lists["data sets"] = [*NAMES, "synthetic:CxHxWxK"]
    if "model" in own:
        from blokern.models import NAMES as NETWORKS

        lists["networks"] = [*NETWORKS, "timm:NAME"]
    example = _EXAMPLES[command]
    if command == "train" and method != ["fast-bat"]:
        example = (
            f"blokern train {' '.join(method)} --data digits --eps 0.1 --epochs 8 --out runs/{method[0]}"
        )
    lines = [f"{name}: {', '.join(words)}" for name, words in lists.items()]
    return "\n".join([*lines, "", f"example: {example}"])


def parse(parser: Parser, argv: Sequence[str]) -> Options:
    """The values of all options, numbers as plain floats."""
    return {name: float(v) if isinstance(v, Number) else v for name, v in parser.values(argv).items()}


# --- Small things -------------------------------------------------------------------------------------------


def check_known(what: str, word: str, words: Iterable[str]) -> None:
    """Raise unless ``word`` is one of ``words``."""
    words = list(words)
    if word not in words:
        raise unknown_name(what, word, words)


def select_device(options: Options) -> str:
    """The device that ``--device`` names; sets the threads that ``--threads`` asks for."""
    import torch

    if options["threads"] is not None:
        set_threads(options["threads"])
    name: str = options["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # each process of torchrun on its own
        name = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else name
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there, torch sees {torch.cuda.device_count()} CUDA devices")
    return name


def set_threads(count: int) -> None:
    """Have torch compute with so many threads."""
    import torch

    most = max(8, 4 * (os.cpu_count() or 1))  # more are slower by orders, and thousands end the process
    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    if count > most:
        raise ValueError(
            f"threads must be at most {most} on this machine of {os.cpu_count()} processors, got {count}"
        )
    torch.set_num_threads(count)


@contextlib.contextmanager
def told_of(what: str) -> Iterator[None]:
    """Errors about an argument `name` are told of the option of which it is the value."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("name"):
            raise
        raise type(error)(f"{what}{str(error).removeprefix('name')}") from error


def pick(options: Options, settings: type) -> Options:
    """Those of the options that are fields of ``settings``."""
    return {field.name: options[field.name] for field in fields(settings) if field.name in options}


def in_words(number: float) -> str:
    """A number as a command line takes it: 8/255 for 0.03137…"""
    parts = number * 255
    if parts >= 1 and abs(parts - round(parts)) < 1e-9 and number != round(number, 4):
        return f"{round(parts)}/255"
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def say(message: str) -> None:
    """A line of news; results go to stdout."""
    print(message, file=sys.stderr, flush=True)


def drawn(draw: Callable[[], None]) -> None:
    """Draw a picture of results that are written already: they stand without it."""
    try:
        draw()
    except Exception as error:  # of matplotlib, of its fonts, of the disk
        say(f"blokern: a picture is not drawn: {error}")


class Turns:
    """Says which of the runs of a study is next, and how long the rest will take.

    >>> turns = Turns(6)
    >>> turns.next("fast-at, seed 0")
    run 1 of 6: fast-at, seed 0
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._started = time.monotonic()

    def next(self, run: str) -> None:
        left = ""
        if self.done:  # each as long as those before; what was there already took no time
            seconds = (time.monotonic() - self._started) / self.done * (self.total - self.done)
            left = (
                f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"
            )
        self.done += 1
        say(f"run {self.done} of {self.total}: {run}{left}")


def counted(number: int, word: str) -> str:
    """As "1 epoch", "2 epochs"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]

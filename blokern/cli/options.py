"""What the commands' options are, how they are parsed, and what some of them mean."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from blokern._names import unknown_name

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
    "check_known",
    "first_line",
    "flag",
    "in_words",
    "make_parser",
    "methods",
    "parse",
    "pick",
    "run_options",
    "select_device",
    "set_threads",
    "settings_options",
    "train_options",
]

#: The file in a run's folder that keeps the run's options.
SETTINGS = "settings.yaml"

#: The values that a command line gave, by the options' names.
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


class Integers(tuple[int, ...]):
    """Whole numbers; as text, separated by commas."""

    def __new__(cls, value: Any) -> Integers:
        return super().__new__(cls, map(int, _parts(value)))


class Shape(tuple[int, int, int]):
    """Channels, height and width; as text, separated by commas."""

    def __new__(cls, value: Any) -> Shape:
        sizes = tuple(map(int, _parts(value)))
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError("expected three numbers >= 1, such as 3,32,32")
        return super().__new__(cls, sizes)


class Densities(tuple[float, ...]):
    """Numbers; as text, separated by commas."""

    def __new__(cls, value: Any) -> Densities:
        return super().__new__(cls, (float(Number(part)) for part in _parts(value)))


class Names(tuple[str, ...]):
    """Names; as text, separated by commas."""

    def __new__(cls, value: Any) -> Names:
        return super().__new__(cls, filter(None, map(str, _parts(value))))


def _parts(value: Any) -> list[Any] | tuple[Any, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    return parts if isinstance(parts, list | tuple) else [parts]


register_type(Number, serializer=float)
register_type(Integers, serializer=list)
register_type(Shape, serializer=list)
register_type(Densities, serializer=list)
register_type(Names, serializer=list)


@dataclass(frozen=True)
class Option:
    """The flag ``--name``, and the key ``name`` of a YAML file."""

    name: str
    type: Any
    default: Any
    help: str


# --- Options of several commands ----------------------------------------------------------------------------

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
KEEP_LAST = Option("keep_last", int, 1, "how many of the last checkpoints to keep")
TEST_LIMIT = Option("test_limit", int, None, "use only the first so many test images (default: all)")
INPUT_SHAPE = Option(
    "input_shape",
    Shape,
    None,
    "channels, height and width of the images (default: as of the checkpoint's data)",
)
STRENGTH_OPTIONS = (
    Option("steps", int, 50, "steps of the attack on the test images; of eps / 4 for pgd"),
    Option("restarts", int, 10, "random restarts of the attack on the test images"),
)
MACHINE_OPTIONS = (
    Option("device", str, "auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one"),
    Option("threads", int, None, "CPU threads (default: torch's choice)"),
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

    return settings_options(TrainSettings)


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
        options.append(Option(field.name, kind, default, words.get(field.name, field.name.replace("_", " "))))
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


def make_parser(command: str, description: str, options: Iterable[Option]) -> ArgumentParser:
    """With the options that every command has; wrong words raise instead of ending the process."""
    parser = ArgumentParser(
        prog=f"blokern {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help=f"YAML file of options, such as a run's {SETTINGS}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for option in options:
        parser.add_argument(flag(option.name), type=option.type, default=option.default, help=option.help)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Options:
    """The values of all options, numbers as plain floats."""
    parsed = parser.parse_args(list(argv)).as_dict()
    return {name: float(value) if isinstance(value, Number) else value for name, value in parsed.items()}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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

    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    torch.set_num_threads(count)


def pick(options: Options, settings: type) -> Options:
    """Those of the options that are fields of ``settings``."""
    return {field.name: options[field.name] for field in fields(settings) if field.name in options}


def in_words(number: float) -> str:
    """A number as a command line takes it: 8/255 for 0.03137…"""
    parts = number * 255
    if parts >= 1 and abs(parts - round(parts)) < 1e-9 and number != round(number, 4):
        return f"{round(parts)}/255"
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]

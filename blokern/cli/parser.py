"""From the words of a command, and from YAML files, to values; what is wrong is said in the options' own names."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from blokern._names import unknown_name

__all__ = ["Because", "Parser", "Text", "flag"]

#: What an option must be, in words, by its type.
_WORDS: dict[Any, str] = {int: "an integer", str: "a word that is not empty", bool: "true or false"}
_BOOLS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
#: What other programs call an option: by that, its flag here.
_ELSEWHERE = {
    "learning-rate": "lr",
    "dataset": "data",
    "arch": "model",
    "network": "model",
    "net": "model",
    "epsilon": "eps",
    "num-epochs": "epochs",
    "bs": "batch-size",
    "wd": "weight-decay",
    "output": "out",
    "output-dir": "out",
    "gpu": "device",
    "workers": "threads",
    "num-threads": "threads",
    "sparsity": "density",
    "alpha": "step-size",
    "num-steps": "steps",
    "iterations": "steps",
    "continue": "resume",
}


class Because(ValueError):
    """Why a text is no value of an option, in words that are worth showing."""


class Text:
    """Base of option types that are made from text: ``words`` says what such an option must be."""

    words: str


class Parser(argparse.ArgumentParser):
    """argparse's, with values from YAML files, and with errors that are ValueErrors in the options' names.

    A flag overrides a file, and a later file an earlier one.

    Args:
        of_run: which keys of a run's settings.yaml this command, which trains nothing, reads; None for one that trains,
            to which a key that it does not know is a mistake.
    """

    def __init__(
        self,
        command: str,
        description: str,
        epilog: Callable[[Parser], str],
        of_run: Collection[str] | None = None,
    ) -> None:
        super().__init__(
            prog=f"blokern {command}",
            description=description.replace("%", "%%"),
            formatter_class=_Formatter,
            exit_on_error=False,
            allow_abbrev=False,
        )
        self.of_run = of_run
        self.needed: list[str] = []
        self._last_words = epilog

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        return self._add(self, *names, **how)

    def add_to(self, group: str, *names: str, **how: Any) -> argparse.Action:
        """As add_argument, under this heading of the help."""
        headings = {one.title: one for one in self._action_groups}
        return self._add(headings.get(group) or self.add_argument_group(group), *names, **how)

    def _add(self, group: Any, *names: str, **how: Any) -> argparse.Action:
        name = names[-1].lstrip("-").replace("-", "_")
        needed = how.pop("required", not names[0].startswith("-"))
        if needed:  # argparse does not see what a file gives
            self.needed.append(name)
        if not names[0].startswith("-"):
            how["nargs"] = "*" if "nargs" in how else "?"
            how.setdefault("type", str)
        if "type" in how:
            how["type"] = _converter(name, how["type"])
        how["help"] = _help(how.get("help", ""), how.get("default")).replace("%", "%%")
        add = super().add_argument if group is self else group.add_argument
        action: argparse.Action = add(*names, **how)
        return action

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """All options by name. Raises ValueError for what is wrong."""
        self._check_flags(argv)
        given = argparse.Namespace()
        for path in self._files(argv):
            vars(given).update(self._of_file(path))
        before = dict(vars(given))
        try:
            parsed, left = self.parse_known_args(list(argv), given)
        except argparse.ArgumentError as error:
            name, message = (error.argument_name or "").strip("-"), error.message
            raise ValueError(
                message if message.startswith(name.replace("-", "_")) else f"--{name}: {message}"
            ) from None
        if left:
            raise ValueError(f"unexpected words: {' '.join(left)}; {self.prog} --help lists the options")
        values = vars(parsed)
        values |= {name: before[name] for name in before if values.get(name) in (None, [])}
        if missing := [name for name in self.needed if values.get(name) in (None, [])]:
            raise ValueError(f"required: {', '.join(missing)}; {self.prog} --help says more")
        return values

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def format_help(self) -> str:
        self.usage = self._short_usage()
        return f"{super().format_help()}\n{self._last_words(self)}".rstrip() + "\n"

    def _short_usage(self) -> str:
        own = {name: next(one for one in self._actions if one.dest == name) for name in self.needed}
        words = [
            f"{one.option_strings[-1]} {name.upper()}"
            if one.option_strings
            else str(one.metavar or name.upper())
            for name, one in own.items()
        ]
        words = [
            f"{word} ..." if own[name].nargs == "*" else word for name, word in zip(own, words, strict=True)
        ]
        return " ".join([self.prog, *words, "[OPTION ...]"]).replace("%", "%%")

    # --- Names ----------------------------------------------------------------------------------------------

    def _check_flags(self, argv: Sequence[str]) -> None:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                near = _near(name[2:], [flag[2:] for flag in known])
                hint = f"; did you mean --{near}?" if near else ""
                raise ValueError(f"unknown option {word}{hint}")

    # --- Files ----------------------------------------------------------------------------------------------

    def _files(self, argv: Sequence[str]) -> list[str]:
        found = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        found.add_argument("--config", action="append", default=[])
        found.error = self.error  # type: ignore[method-assign]
        files: list[str] = found.parse_known_args(list(argv))[0].config
        return files

    def _of_file(self, path: str) -> dict[str, Any]:
        text, told = _read(path)
        if self.of_run is not None and text.startswith("# blokern "):
            told = {key: value for key, value in told.items() if key in self.of_run}
        known = {one.dest: one for one in self._actions if one.dest not in ("help", "config", "debug")}
        values = {}
        for key, value in told.items():
            if key not in known:
                near = _near(str(key), list(known))
                hint = f"; did you mean {near!r}?" if near else ""
                raise ValueError(f"config: {path} has an unknown option {key!r}{hint}")
            if value is not None:
                values[key] = _of_yaml(known[key], value, path)
        return values


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(path: str) -> tuple[str, Mapping[Any, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        told = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(f"config: {path} cannot be read: {why}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or type(error).__name__
        raise ValueError(f"config: {path}{where} is no YAML: {what}") from error
    if not isinstance(told, Mapping):
        raise ValueError(f"config: {path} must hold options by name, got {type(told).__name__}")
    return text, told


def _of_yaml(action: argparse.Action, value: Any, path: str) -> Any:
    convert: Any = action.type
    try:
        if action.nargs == 0:  # a switch
            return _converter(action.dest, bool)(value)
        if action.nargs == "*":
            return [convert(one) for one in (value if isinstance(value, list) else [value])]
        return convert(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"config: {path}: {error}") from error


# --- Values -------------------------------------------------------------------------------------------------


def _converter(name: str, kind: Any) -> Callable[[Any], Any]:
    """From text, or from what YAML makes of it, to a value; the error names the option."""

    def convert(value: Any) -> Any:
        try:
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise unknown_name(name, value, get_args(kind))
                return value
            return _CONVERTERS.get(kind, kind)(value)
        except (ValueError, TypeError, OverflowError) as error:
            told = str(error)
            if told.startswith(name):
                raise argparse.ArgumentTypeError(told) from None
            why = f" ({told})" if isinstance(error, Because) else ""
            words = _WORDS.get(kind) or kind.words
            raise argparse.ArgumentTypeError(f"{name} must be {words}, got {value!r}{why}") from None

    return convert


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _str(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if not text.strip() or isinstance(value, list | dict):
        raise ValueError
    return text


def _bool(value: Any) -> bool:
    word = str(value).lower()  # YAML's own true is Python's True
    if word not in _BOOLS:
        raise ValueError
    return _BOOLS[word]


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {int: _int, str: _str, bool: _bool}


def _near(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one stands for: in other letters or in another program's words."""
    names = {one.replace("_", "-"): one for one in known}
    plain = name.lower().replace("_", "-")
    for found in (plain, _ELSEWHERE.get(plain)):
        if found in names:
            return names[found]
    close = difflib.get_close_matches(plain, names, n=3, cutoff=0.6)
    # The nearest; among a few as near, the one that begins alike: epoks is epochs, not eps.
    return names[max(close, key=lambda one: _alike(plain, one))] if close else None


def _alike(a: str, b: str) -> int:
    """How many letters two words have in common at their start."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


# --- Help ---------------------------------------------------------------------------------------------------


def _help(text: str, default: Any) -> str:
    if default in (None, argparse.SUPPRESS) or default is False or "(default" in text:
        return text
    if isinstance(default, tuple):
        return f"{text} (default: {','.join(map(str, default))})"
    words = f"{default:.4g}" if isinstance(default, float) else str(default)
    return f"{text} (default: {words.lower() if default is True else words})"


class _Formatter(argparse.HelpFormatter):
    """The description in its paragraphs; options in a wide column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size().columns - 2))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent)

"""The command: from folders to one file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blokern.cli.options import MACHINE_OPTIONS, Option, Options, make_parser, parse, say, select_device
from blokern.cli.output import PAGE, check_files

if TYPE_CHECKING:
    from blokern.cli.report.pictures import Attacked
    from blokern.cli.report.runs import Group

__all__ = ["report"]


def report(argv: list[str]) -> int:
    """Show runs side by side on one page: blokern report RUN ... --out FILE.html."""
    parser = make_parser(
        "report",
        "Writes one HTML file that needs no other and no network: accuracies, curves, attacked test images of runs "
        "whose validation attacks, kept weights by layer of pruned runs, settings. A RUN is a folder of blokern "
        "train, or one of compare or prune with all the runs below it; runs that differ in the seed only are one row.",
        [
            Option("out", str, None, "the file to write (default: report.html in the first RUN)"),
            Option("images", int, 8, "test images to attack for each run; 0 shows none"),
            Option("steps", int, 20, "steps of PGD on them, of eps / 4"),
            Option("data_dir", str, None, "folder with the data set's files (default: as trained)"),
            *MACHINE_OPTIONS,
        ],
        of_run=("data_dir",),
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of several")
    options = parse(parser, argv)
    for name, least in (("images", 0), ("steps", 1)):
        if options[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {options[name]}")
    folders = [Path(run) for run in options["runs"]]
    out = Path(options["out"] or folders[0] / "report.html")

    from blokern.bilevel.checkpoint import write_atomically
    from blokern.cli.report.page import page
    from blokern.cli.report.runs import find_groups

    check_files([("out", out, PAGE)] if out.parent.is_dir() or options["out"] else [])
    broken: list[Exception] = []
    groups = find_groups(folders, broken.append)
    data = page(groups, _attacks(groups, options)).encode()
    write_atomically(out, data)
    count = sum(len(group.runs) for group in groups)
    print(f"{out}: {count} {'run' if count == 1 else 'runs'}, {len(data):,} bytes")
    for error in broken:
        say(f"blokern: error: a run is left out: {error}")
    return 2 if broken else 0


def _attacks(groups: list[Group], options: Options) -> dict[str, Attacked | str]:
    """By label, the attacked images of runs whose validation attacks, or why there are none."""
    from blokern.cli.report.pictures import attacked

    device = select_device(options)
    shown: dict[str, Attacked | str] = {}
    for group in groups:
        if not options["images"] or not group.attacked:
            continue
        path = group.runs[0].folder / "best.pt"
        try:
            shown[group.label] = attacked(
                path, options["images"], options["steps"], options["data_dir"], device
            )
        except (
            OSError,
            ValueError,
            ImportError,
            FloatingPointError,
        ) as error:  # as without the data; the rest is worth showing
            shown[group.label] = str(error)
            print(f"blokern: no attacked images of {path}: {error}", file=sys.stderr)
    return shown

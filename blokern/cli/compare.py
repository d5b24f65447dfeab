"""``blokern compare``: several methods over several seeds, in one table and two pictures."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blokern.cli.evaluate import attacked, check_attack
from blokern.cli.info import machine
from blokern.cli.options import (
    CHECKPOINT_MINUTES,
    DATA_OPTIONS,
    MACHINE_OPTIONS,
    MODEL_OPTIONS,
    STRENGTH_OPTIONS,
    TEST_LIMIT,
    Integers,
    Option,
    Options,
    Turns,
    check_known,
    counted,
    drawn,
    flag,
    make_parser,
    methods,
    parse,
    run_options,
    select_device,
    told_of,
    train_options,
)
from blokern.cli.output import check_study_folder, write_json
from blokern.cli.source import Source
from blokern.cli.train import at_work, make_trainer, train_parser

if TYPE_CHECKING:
    from blokern.data import ImageDataset

__all__ = ["check_different", "compare", "mean_and_deviation", "parse_entries"]


def compare(argv: list[str]) -> int:
    """Train and attack several methods over several seeds: blokern compare METHOD ... --out FOLDER."""
    shared = [
        *DATA_OPTIONS,
        *MODEL_OPTIONS,
        *(option for option in train_options() if option.name != "seed"),
    ]
    passed_on = [*shared, CHECKPOINT_MINUTES, *MACHINE_OPTIONS]
    parser = make_parser(
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
    parser.add_argument("--seeds", type=Integers, default=Integers(0), help="such as 0,1,2: a run for each")
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and the results")
    options = parse(parser, argv)
    # Data and seeds are the same for all.
    entries = parse_entries(
        options["methods"],
        methods(),
        lambda method: (o for o in run_options(method)[len(DATA_OPTIONS) :] if o.name != "seed"),
    )
    check_different("seeds", options["seeds"])

    from blokern import data

    out = Path(options["out"])
    with told_of("data"):
        test = data.load(options["data"], data_dir=options["data_dir"], test_limit=options["test_limit"]).test
    attack = {"attack": "pgd", "norm": "linf", "eps": options["eps"], "seed": 0}
    attack |= {option.name: options[option.name] for option in STRENGTH_OPTIONS}
    check_attack(attack)
    planned = [f"{entry.label}, seed {seed}" for entry in entries for seed in options["seeds"]]
    check_study_folder(out, planned, _earlier)
    # All are parsed before the first run: a mistake in the last must not cost the time of the others.
    plans = {
        entry: [
            parse(
                train_parser(entry.method),
                [
                    *(f"{flag(o.name)}={options[o.name]}" for o in passed_on if options[o.name] is not None),
                    *(f"{flag(key)}={value}" for key, value in entry.options),
                    *(f"--seed={seed}", f"--out={out / entry.label / f'seed-{seed}'}", "--resume"),
                ],
            )
            for seed in options["seeds"]
        ]
        for entry in entries
    }
    turns = Turns(len(planned))
    runs = {entry: [_run(entry, plan, test, attack, turns) for plan in plans[entry]] for entry in entries}
    _write_results(out, runs, options)
    print((out / "results.md").read_text(encoding="utf-8"), end="")
    return 0


@dataclass(frozen=True)
class Entry:
    """One of the compared: a method, and the options that it alone has."""

    label: str
    method: str
    options: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str, known: Callable[[str], Iterable[Option]], methods: Iterable[str]) -> Entry:
        """Read ``[LABEL=]METHOD[:KEY=VALUE,...]``; `known` are the options that a method may have of its own."""
        head, _, tail = text.partition(":")
        label, _, method = head.rpartition("=")
        check_known("method", method, methods)
        label = label or method
        if not re.fullmatch(r"[\w+-][\w.+-]*", label):  # it names a folder
            raise ValueError(f"methods: a label is made of letters, digits and - _ + ., got {label!r}")
        names = [option.name for option in known(method)]
        options = []
        for part in tail.split(",") if tail else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"methods: expected KEY=VALUE after the colon of {text!r}, got {part!r}")
            check_known(f"option of {method}", key := key.replace("-", "_"), names)
            options.append((key, value))
        return cls(label, method, tuple(options))


def parse_entries(
    texts: Sequence[str], methods: Iterable[str], known: Callable[[str], Iterable[Option]]
) -> list[Entry]:
    """All entries of a command line, whose labels must differ."""
    entries = [Entry.parse(text, known, methods) for text in texts]
    check_different("labels", [entry.label for entry in entries], "; write LABEL=METHOD to name one")
    return entries


def check_different(name: str, values: Sequence[object], hint: str = "") -> None:
    """Raise unless no value is given twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must differ, got {', '.join(map(str, values))}{hint}")


def _earlier(results: Mapping[str, Any]) -> list[str]:
    """The runs of a results.json, in the words of `planned`."""
    return [
        f"{label}, seed {run['seed']}" for label, one in results["methods"].items() for run in one["runs"]
    ]


@dataclass(frozen=True)
class Run:
    """A run of a comparison, finished."""

    seed: int
    best: Options  # as attacked() returns it, on the test images
    last: Options
    history: list[dict[str, float]]

    @property
    def seconds(self) -> float:
        """Training time an epoch; the median, since other programs may disturb some epochs."""
        return statistics.median(record["train_seconds"] for record in self.history)


def _run(entry: Entry, options: Options, test: ImageDataset, attack: Options, turns: Turns) -> Run:
    """Train and attack, except for what is there already."""
    from blokern.bilevel import checkpoint

    trainer = make_trainer(entry.method, options)
    turns.next(f"{entry.label}, seed {options['seed']}; {at_work(trainer, options)}")
    history = trainer.fit()
    results: dict[str, Options] = {}
    for name in ("best", "last"):
        path = trainer.run_dir / f"{name}.pt"
        stored = trainer.run_dir / f"test-{name}.json"
        question = {**attack, "images": len(test), "checkpoint": checkpoint.fingerprint(path)}
        known = [
            *results.values(),
            *([json.loads(stored.read_text(encoding="utf-8"))] if stored.exists() else []),
        ]
        # The last epoch is often the best one, and then one attack answers both.
        answers = [answer for answer in known if answer["question"] == question]
        if not answers:
            source = Source.open(path)
            answer = attacked(source, test, select_device(options), **attack)
            answers = [{"question": question, "epoch": source.epoch, **answer}]
        results[name] = answers[0]
        write_json(stored, results[name])
    return Run(options["seed"], results["best"], results["last"], history)


def _write_results(out: Path, runs: Mapping[Entry, Sequence[Run]], options: Options) -> None:
    from blokern import plots
    from blokern.bilevel.checkpoint import write_atomically

    attack = next(iter(runs.values()))[0].best["attack"]
    rows = [
        f"{options['data']}, {options['model']}, eps {options['eps']:.4g}, {counted(options['epochs'], 'epoch')}; "
        f"{attack} within that eps on {next(iter(runs.values()))[0].best['samples']} test images; "
        f"mean ± standard deviation over seeds {', '.join(map(str, options['seeds']))}.",
        "",
        f"| method | SA % | {attack} % | {attack} %, last epoch | s an epoch |",
        "|---|---|---|---|---|",
    ]
    for entry, own in runs.items():
        cells = (
            mean_and_deviation([100 * run.best["clean_accuracy"] for run in own]),
            mean_and_deviation([100 * run.best["robust_accuracy"] for run in own]),
            mean_and_deviation([100 * run.last["robust_accuracy"] for run in own]),
            mean_and_deviation([run.seconds for run in own]),
        )
        rows.append(f"| {entry.label} | {' | '.join(cells)} |")
    results = {
        "options": {key: value for key, value in options.items() if key not in ("config", "out", "debug")},
        "machine": machine(),
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
    write_atomically(out / "results.md", ("\n".join(rows) + "\n").encode())
    write_json(out / "results.json", results)
    accuracies = {
        entry.label: {
            "SA": [run.best["clean_accuracy"] for run in own],
            attack: [run.best["robust_accuracy"] for run in own],
        }
        for entry, own in runs.items()
    }
    means = {
        entry.label: [
            {key: statistics.fmean(record[key] for record in epoch) for key in epoch[0]}
            for epoch in zip(*(run.history for run in own), strict=True)
        ]
        for entry, own in runs.items()
    }
    drawn(lambda: plots.comparison(accuracies, out / "comparison.png"))
    drawn(lambda: plots.curves(means, out / "curves.png"))


def mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean

"""``blokern prune``: networks pruned by several methods, to several densities, in one table and three pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from blokern.cli.compare import Entry, check_different, mean_and_deviation, parse_entries
from blokern.cli.info import machine
from blokern.cli.options import (
    CHECKPOINT_MINUTES,
    DATA_OPTIONS,
    MACHINE_OPTIONS,
    MODEL_OPTIONS,
    SETTINGS,
    TEST_LIMIT,
    Densities,
    Integers,
    Number,
    Option,
    Options,
    Turns,
    counted,
    drawn,
    flag,
    make_parser,
    parse,
    pick,
    pruning_methods,
    settings_options,
    train_options,
)
from blokern.cli.output import check_study_folder, write_json
from blokern.cli.train import load_data, train_parser

if TYPE_CHECKING:
    from blokern.cli.study import Dense, Plan, Run
    from blokern.distributed import Processes

__all__ = ["prune"]

#: Where fine-tuning has another default than TrainSettings, which are Fast-BAT's.
_DEFAULTS: Options = {"lr": Number(0.1), "schedule": "cosine"}

#: What is every method's; density has an option of its own.
_SHARED = ("density", "scope", "granularity", "exclude")

#: Kept of the dense training in any case: a later command may add imp, which rewinds to it.
_KEPT_EPOCH = 1


def prune(argv: list[str]) -> int:
    """Prune networks by one or more methods: blokern prune METHOD ... --density D --out FOLDER."""
    own = {name: ", ".join(option.name for option in _method_options(name)) for name in pruning_methods()}
    parser = make_parser(
        "prune",
        "Trains a dense network for each seed, prunes it by each METHOD to each density, and fine-tunes what is left, "
        "alike for all methods. Writes results.md, results.json, sparsity.png, minutes.png and layers.png. A METHOD "
        "may have a label and options of its own: omp short=hydra:score_epochs=5,epochs=10. Given again, the same "
        "command continues where it was stopped. METHODs, with the options that they alone have: "
        + ", ".join(f"{name} ({words})" if words else name for name, words in own.items()),
        [
            *(
                *DATA_OPTIONS,
                *MODEL_OPTIONS,
                *_run_options(),
                CHECKPOINT_MINUTES,
                *MACHINE_OPTIONS,
                TEST_LIMIT,
            ),
            Option("dense_epochs", int, None, "epochs of the dense training (default: as of fine-tuning)"),
            Option("dense", str, None, "checkpoint of a dense network to prune (default: one is trained)"),
        ],
    )
    parser.add_argument("methods", nargs="+", metavar="[LABEL=]METHOD[:KEY=VALUE,...]", help="what prunes")
    parser.add_argument(
        "--density", type=Densities, required=True, help="part of the weights that is kept, such as 0.2,0.1"
    )
    parser.add_argument("--seeds", type=Integers, default=Integers(0), help="such as 0,1,2: runs for each")
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and the results")
    options = parse(parser, argv)
    for name in ("density", "seeds"):
        check_different(name, options[name])
    entries = parse_entries(
        options["methods"], pruning_methods(), lambda name: [*_run_options(), *_method_options(name)]
    )

    from blokern.distributed import joined

    with joined() as processes:
        _prune(options, entries, processes)
    return 0


def _prune(options: Options, entries: Sequence[Entry], processes: Processes) -> None:
    from blokern import keep_freed_memory
    from blokern.cli.study import Study, given_dense, trained_dense

    # All are made before the first run: a mistake in the last must not cost the time of the others.
    plans = [plan for entry in entries for plan in _plans(entry, options)]
    planned = [_in_words(plan.label, plan.settings.density, plan.seed) for plan in plans]
    processes.lead(lambda: check_study_folder(Path(options["out"]), planned, _earlier))
    rewinds = {plan.settings.rewind_epoch for plan in plans if plan.method == "imp"}  # type: ignore[attr-defined]
    training = {seed: _dense_training(options, seed) for seed in options["seeds"]}
    load_data(options, options["seeds"][0])  # what is wrong with them is said now
    given = None if options["dense"] is None else given_dense(Path(options["dense"]), options)
    keep_freed_memory()
    dense, runs = {}, []
    turns = Turns(len(plans) + (0 if given else len(options["seeds"])))
    news = turns.next if processes.leads else lambda run: None
    for seed in options["seeds"]:
        if given is None:
            news(f"dense, seed {seed}")
        network = given or trained_dense(training[seed], rewinds | {_KEPT_EPOCH}, processes)
        for epoch in rewinds:
            network.early(epoch)
        processes.lead(lambda: _write_settings(options))
        study = Study(options, network, processes)
        dense[network] = study.accuracy(network.path, study.out / "dense" / f"test-{network.seed}.json")
        for plan in plans:
            if plan.seed == seed:
                news(_in_words(plan.label, plan.settings.density, seed))
                runs.append(study.run(plan))
    if processes.leads:
        _write_results(options, dense, runs)
        print(Path(options["out"], "results.md").read_text(encoding="utf-8"), end="")


# --- What is to be done -------------------------------------------------------------------------------------


def _run_options() -> list[Option]:
    """What every pruned run has, whatever the method."""
    from blokern.bilevel import PruningSettings

    left_out = (
        "seed",
        "cycle_momentum",
        "eps",
        "val_steps",
        "val_restarts",
    )  # the validation does not attack
    return [
        *(
            replace(o, default=_DEFAULTS.get(o.name, o.default))
            for o in train_options()
            if o.name not in left_out
        ),
        *settings_options(PruningSettings, without=("density",)),
        Option("score_batches", int, 10, "batches of training images that snip and grasp look at"),
    ]


def _method_options(method: str) -> list[Option]:
    return settings_options(pruning_methods()[method][1], without=(*_SHARED, "seed"))


def _plans(entry: Entry, options: Options) -> Iterator[Plan]:
    from blokern.bilevel import TrainSettings
    from blokern.cli.study import Plan

    shared, own = _run_options(), _method_options(entry.method)
    flags = [
        *(f"{flag(option.name)}={_text(options[option.name])}" for option in shared),
        *(f"{flag(key)}={value}" for key, value in entry.options),
    ]
    values = parse(make_parser(f"prune {entry.method}", "", [*shared, *own]), flags)
    if values["score_batches"] < 1:
        raise ValueError(f"score_batches must be at least 1, got {values['score_batches']}")
    settings_type = pruning_methods()[entry.method][1]
    for density in options["density"]:
        for seed in options["seeds"]:
            these = {**values, "density": density, "seed": seed, "val_steps": 0}
            yield Plan(
                entry.label,
                entry.method,
                seed,
                settings_type(**pick(these, settings_type)),
                TrainSettings(**pick(these, TrainSettings)),
                values["score_batches"],
            )


def _text(value: object) -> object:
    """A value as an option has it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else value


def _dense_training(options: Options, seed: int) -> Options:
    """The options of ``blokern train plain`` for the dense network."""
    epochs = options["epochs"] if options["dense_epochs"] is None else options["dense_epochs"]
    words = {**options, "epochs": epochs, "seed": seed, "val_steps": 0}
    known = (*DATA_OPTIONS, *MODEL_OPTIONS, *train_options(), CHECKPOINT_MINUTES, *MACHINE_OPTIONS)
    flags = [f"{flag(o.name)}={words[o.name]}" for o in known if words.get(o.name) is not None]
    out = Path(options["out"], "dense", f"seed-{seed}")
    return parse(train_parser("plain"), [*flags, f"--out={out}", "--resume"])


def _in_words(label: str, density: float, seed: int) -> str:
    return f"{label}, density {density:g}, seed {seed}"


def _earlier(results: Mapping[str, Any]) -> list[str]:
    """The runs of a results.json, as :func:`_in_words` has them."""
    plans = [run["plan"] for run in results["runs"]]
    return [_in_words(plan["label"], plan["settings"]["density"], plan["seed"]) for plan in plans]


def _write_settings(options: Options) -> None:
    from blokern.bilevel.checkpoint import write_atomically

    kept = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
        if value is not None and key not in ("config", "debug", "out")
    }
    if options["data_dir"] is not None:  # for commands that are given from elsewhere
        kept["data_dir"] = str(Path(options["data_dir"]).absolute())
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    text = f"# blokern prune --config {SETTINGS} --out FOLDER\n{yaml.safe_dump(kept, sort_keys=False)}"
    write_atomically(out / SETTINGS, text.encode())


# --- What came of it ----------------------------------------------------------------------------------------


def _write_results(options: Options, dense: Mapping[Dense, float], runs: Sequence[Run]) -> None:
    from blokern import plots
    from blokern.bilevel.checkpoint import write_atomically

    out = Path(options["out"])
    points: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        points.setdefault(run.plan.label, {}).setdefault(run.plan.settings.density, []).append(run)

    trained = [network.seconds for network in dense if network.seconds is not None]
    rows = [
        f"{options['data']}, {options['model']}, {options['granularity']} pruning, "
        f"{counted(options['epochs'], 'epoch')} of training after it; "
        "weights kept as counted, of the layers that have masks and of all parameters; accuracy of the best epoch on "
        "the test images, seconds of pruning and training; mean ± standard deviation over seeds "
        f"{', '.join(map(str, options['seeds']))}.",
        "",
        "| method | kept % | kept % of all | accuracy % | seconds |",
        "|---|---|---|---|---|",
        f"| dense | 100 | 100 | {_percent(dense.values())} | {mean_and_deviation(trained) if trained else '–'} |",
    ]
    for label, densities in points.items():
        for own in densities.values():
            shares = ([run.masked_share for run in own], [run.share for run in own])
            cells = (
                *(f"{100 * statistics.fmean(share):.4g}" for share in shares),
                _percent(run.accuracy for run in own),
                mean_and_deviation([run.seconds for run in own]),
            )
            rows.append(f"| {label} | {' | '.join(cells)} |")
    write_atomically(out / "results.md", ("\n".join(rows) + "\n").encode())
    write_json(
        out / "results.json",
        {
            "options": {
                key: value for key, value in options.items() if key not in ("config", "out", "debug")
            },
            "machine": machine(),
            "dense": [
                {"seed": network.seed, "accuracy": accuracy, "training_seconds": network.seconds}
                for network, accuracy in dense.items()
            ],
            "runs": [asdict(run) for run in runs],
        },
    )

    def each(value: Callable[[Run], float]) -> plots.Points:
        return {
            label: {density: [value(run) for run in own] for density, own in densities.items()}
            for label, densities in points.items()
        }

    accuracies = each(lambda run: run.accuracy)
    trained_ones = [*dense.values()]
    seconds = each(lambda run: run.seconds / 60)
    kept = {
        density: {label: _kept(densities[density]) for label, densities in points.items()}
        for density in options["density"]
    }
    drawn(lambda: plots.sparsity(accuracies, trained_ones, out / "sparsity.png"))
    drawn(lambda: plots.minutes(accuracies, seconds, trained_ones, out / "minutes.png"))
    drawn(lambda: plots.layers(kept, out / "layers.png"))


def _kept(runs: Sequence[Run]) -> dict[str, float]:
    """The mean density of each layer."""
    return {
        name: statistics.fmean(run.kept[name][0] / run.kept[name][1] for run in runs) for name in runs[0].kept
    }


def _percent(shares: Iterable[float]) -> str:
    return mean_and_deviation([100 * share for share in shares])

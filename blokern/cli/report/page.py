"""The page: HTML without scripts, that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from blokern._version import __version__
from blokern.cli.compare import mean_and_deviation
from blokern.cli.report.pictures import PANELS, STYLES, Attacked, curve_svg, image_uri
from blokern.cli.report.runs import Group

__all__ = ["page"]


class _Html(str):
    """Text that is HTML already; any other is escaped."""


def _tag(name: str, *content: object, **attributes: str) -> _Html:
    """An element; an attribute ``class_`` is written class."""
    words = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return _Html(f"<{name}{words}>{''.join(map(_escaped, content))}</{name}>")


def _escaped(content: object) -> str:
    return content if isinstance(content, _Html) else html.escape(str(content))


def page(groups: Sequence[Group], attacks: Mapping[str, Attacked | str]) -> str:
    """The whole page; `attacks` by label, or why there is none.

    >>> page(find_groups([Path("runs/demo")]), {})[:15]
    '<!doctype html>'
    """
    title = f"blokern: {', '.join(group.label for group in groups[:4])}{', …' if len(groups) > 4 else ''}"
    css = resources.files("blokern.cli.report").joinpath("page.css").read_text(encoding="utf-8")
    count = sum(len(group.runs) for group in groups)
    parts = [
        _tag("h1", title),
        _tag(
            "p",
            f"{count} {'run' if count == 1 else 'runs'}; written by blokern {__version__}.",
            class_="note",
        ),
        *_accuracies(groups),
        *_curves(groups),
        *_attacks(attacks),
        *_layers(groups),
        *_settings(groups),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{_tag("title", title)}<style>{css}</style>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


# --- Sections -----------------------------------------------------------------------------------------------


def _accuracies(groups: Sequence[Group]) -> list[_Html]:
    rows = [_accuracy_row(group) for group in groups]
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    several = any(len(group.runs) > 1 for group in groups)
    note = (
        "SA: standard accuracy, RA: accuracy under attack; of the best epoch, which validation images choose"
        + ("; mean ± standard deviation over the seeds." if several else ".")
    )
    table = _table(
        ["run", *names], [[g.label, *(row[n] for n in names)] for g, row in zip(groups, rows, strict=True)]
    )
    return [_tag("h2", "Accuracy"), _tag("p", note, class_="note"), table]


def _accuracy_row(group: Group) -> dict[str, str]:
    """By column; empty where there is nothing to say."""
    runs = group.runs
    done = {f"{len(run.history)} of {run.settings['training.epochs']}" for run in runs}

    def percent(values: Iterable[float | None]) -> str:
        known = [100 * value for value in values if value is not None]
        return mean_and_deviation(known) if len(known) == len(runs) else ""

    attacks = {run.test.get("attack", "") for run in runs}
    kept = [[sum(numbers) for numbers in zip(*run.kept.values(), strict=True)] for run in runs if run.kept]
    seconds = [sum(r["train_seconds"] for r in run.history) / len(run.history) for run in runs]
    return {
        "seeds": ", ".join(str(run.seed) for run in runs),
        "epochs": "; ".join(sorted(done)),
        "masked weights kept %": percent([left / every for left, every in kept] if kept else [None]),
        "SA %, validation": percent(run.best["val_accuracy"] for run in runs),
        "RA %, validation": percent(run.best.get("val_robust_accuracy") for run in runs),
        "SA %, test": percent(run.test.get("SA") for run in runs),
        "RA %, test": percent(run.test.get("RA") for run in runs),
        "test attack": ", ".join(sorted(attacks)),
        "s an epoch": mean_and_deviation(seconds),
    }


def _curves(groups: Sequence[Group]) -> list[_Html]:
    figures = []
    for key, title in PANELS.items():
        runs = {
            group.label: (number, means)
            for number, group in enumerate(groups)
            if key in (means := group.means())[0]
        }
        if runs:
            picture = _Html(curve_svg(key, runs))
            figures.append(_tag("figure", _tag("figcaption", title), picture))
    legend = [_tag("li", _swatch(number), group.label) for number, group in enumerate(groups)]
    return [
        _tag("h2", "Curves"),
        *([_tag("ul", *legend, class_="legend")] if len(groups) > 1 else []),
        _tag("div", *figures, class_="panels"),
    ]


def _swatch(number: int) -> _Html:
    color, dashes = STYLES[number % len(STYLES)]
    pattern = (
        "" if dashes is None else f' stroke-dasharray="{" ".join(str(2 * length) for length in dashes)}"'
    )
    line = f'<path d="M0 4H28" stroke="{color}" stroke-width="3"{pattern}/>'
    return _Html(f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">{line}</svg>')


def _attacks(attacks: Mapping[str, Attacked | str]) -> list[_Html]:
    parts = []
    for label, shown in attacks.items():
        parts.append(_tag("h3", label))
        if isinstance(shown, str):
            parts.append(_tag("p", f"No images: {shown}", class_="note"))
            continue
        standing = int((shown.after == shown.labels).sum())
        fact = f"{shown.attack}, {shown.threat}, {shown.why}: {standing} of {len(shown.labels)} stand."
        parts.append(_tag("p", fact, class_="note"))
        amplified = 0.5 + (shown.x_adv - shown.x) * (0.5 / shown.eps if shown.eps > 0 else 0.0)
        rows = (
            ("image", shown.x, shown.before),
            ("perturbation", amplified, None),
            ("attacked image", shown.x_adv, shown.after),
        )
        columns = [
            _tag(
                "div",
                *(
                    _image(name, images[i], predictions, int(shown.labels[i]), i)
                    for name, images, predictions in rows
                ),
            )
            for i in range(len(shown.labels))
        ]
        parts.append(_tag("div", *columns, class_="attacks"))
    note = (
        "best.pt of the first seed under the library's PGD. From the top: image; perturbation, where grey is "
        "none, black −eps and white +eps; attacked image. Below an image is what the network takes it for."
    )
    return [_tag("h2", "Attacked test images"), _tag("p", note, class_="note"), *parts] if parts else []


def _image(name: str, image: Any, predictions: Any, label: int, index: int) -> _Html:
    picture = _Html(f'<img src="{image_uri(image)}" alt="{name} {index}, of class {label}">')
    if predictions is None:
        return _tag("figure", picture)
    right = int(predictions[index]) == label
    word = f"{int(predictions[index])} ✓" if right else f"{int(predictions[index])} ✗, is {label}"
    return _tag("figure", picture, _tag("figcaption", word, class_="right" if right else "wrong"))


def _layers(groups: Sequence[Group]) -> list[_Html]:
    tables: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if names := tuple(group.runs[0].kept):
            tables.setdefault(names, []).append(group)
    parts = []
    for names, pruned in tables.items():
        rows = [[name, *(_share(group, name) for group in pruned)] for name in names]
        parts.append(_table(["layer", *(group.label for group in pruned)], rows))
    note = _tag(
        "p", "Weights that the masks keep, in percent of the layer's; the mean over seeds.", class_="note"
    )
    return [_tag("h2", "Kept weights by layer"), note, *parts] if parts else []


def _share(group: Group, name: str) -> _Html:
    counts = [run.kept[name] for run in group.runs if name in run.kept]
    percent = 100 * sum(left / max(every, 1) for left, every in counts) / len(counts)
    title = "; ".join(f"{left:,} of {every:,}" for left, every in counts)
    return _tag("span", f"{percent:.3g}", class_="share", style=f"--share:{percent:.3f}%", title=title)


def _settings(groups: Sequence[Group]) -> list[_Html]:
    names = list(dict.fromkeys(name for group in groups for name in group.settings))
    values = {name: [_value(group.settings.get(name)) for group in groups] for name in names}
    same = [name for name in names if len(set(values[name])) == 1]
    other = [name for name in names if name not in same]
    parts = [_tag("h2", "Settings")]
    if other:
        rows = [[group.label, *(values[name][i] for name in other)] for i, group in enumerate(groups)]
        parts.append(_table(["run", *other], rows))
    pairs = [_tag("div", _tag("dt", name), _tag("dd", values[name][0])) for name in same]
    if same:
        parts += [_tag("h3", "The same for all")] if other else []
        parts.append(_tag("dl", *pairs))
    return parts


# --- Elements -----------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> _Html:
    """The first column is each row's name."""
    top = _tag("tr", *(_tag("th", name, scope="col") for name in head))
    body = [
        _tag("tr", _tag("th", row[0], scope="row"), *(_tag("td", cell) for cell in row[1:])) for row in rows
    ]
    table = _tag("table", _tag("thead", top), _tag("tbody", *body))
    return _tag("div", table, class_="scroll", tabindex="0")  # wide tables scroll alone, by keyboard too


def _value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

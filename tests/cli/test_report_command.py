"""``blokern report``."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from commands import QUICK, error
from matplotlib.image import imread

from blokern import cli, data, plots
from blokern.attack import PGD
from blokern.bilevel import Trainer, checkpoint
from blokern.cli.report import pictures
from blokern.cli.report.page import page
from blokern.cli.report.runs import Group, Run, find_groups

QUIET = ["--test-limit=20", "--epochs=1", *QUICK]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A comparison of two methods over two seeds, and a pruning study."""
    out = tmp_path_factory.mktemp("runs")
    command = [
        "compare",
        "fast-at",
        "plain",
        "--seeds=0,1",
        "--steps=2",
        "--restarts=1",
        "--out",
        str(out / "adv"),
    ]
    quick = [flag for flag in QUIET if not flag.startswith(("--eps", "--val-steps"))]
    prune = ["prune", "omp", "imp:rate=0.5", "--density=0.3", "--out", str(out / "pruned")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", lambda trainer: None)
        patch.setattr(plots, "_write", lambda figure, path: None)
        assert cli.main([*command, *QUIET]) == 0
        assert cli.main([*prune, *quick]) == 0
    return out


@pytest.fixture
def runs(studies, tmp_path):
    """As studies, to be broken."""
    return shutil.copytree(studies, tmp_path / "runs")


class Page(HTMLParser):
    """Refuses tags that do not match; collects what is asked of it."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.images, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.images += [attrs["src"]] if tag == "img" else []
        self.rows += [[]] if tag == "tr" else []
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += text


def written(path):
    text = path.read_text()
    assert "http" not in text
    parsed = Page(text)
    assert not {"script", "link", "iframe", "base"} & set(parsed.tags)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert all(image.startswith("data:image/png;base64,") for image in parsed.images)
    return text, parsed


def test_a_report_shows_studies_side_by_side(studies, tmp_path, capsys):
    command = ["report", str(studies / "adv"), str(studies / "pruned"), "--images=3", "--steps=2"]
    assert cli.main([*command, "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.html'}: 7 runs, ")
    text, parsed = written(tmp_path / "a.html")

    rows = {row[0]: row[1:] for row in parsed.rows[:6]}
    labels = ["adv/fast-at", "adv/plain", "pruned/dense", "pruned/imp/density-0.3", "pruned/omp/density-0.3"]
    assert list(rows) == ["run", *labels]
    results = json.loads((studies / "adv" / "results.json").read_text())["methods"]["fast-at"]["runs"]
    robust = [100 * run["best"]["robust_accuracy"] for run in results]
    column = {name: place for place, name in enumerate(rows["run"])}
    at = rows["adv/fast-at"]
    assert at[column["seeds"]] == "0, 1"
    assert at[column["epochs"]] == "1 of 1"
    assert at[column["RA %, test"]].startswith(f"{sum(robust) / 2:.2f} ± ")
    assert at[column["test attack"]] == "PGD-2"
    runs = json.loads((studies / "pruned" / "results.json").read_text())["runs"]
    (omp,) = [run for run in runs if run["plan"]["label"] == "omp"]
    left, every = map(sum, zip(*omp["kept"].values(), strict=True))
    assert f"{100 * omp['accuracy']:.2f}" in rows["pruned/omp/density-0.3"]
    assert f"{100 * left / every:.2f}" in rows["pruned/omp/density-0.3"]

    layers = {row[0]: row[2] for row in parsed.rows if row[0] in omp["kept"]}
    assert layers == {name: f"{100 * left / every:.3g}" for name, (left, every) in omp["kept"].items()}
    # Three of each of the two methods whose validation attacks, in three rows.
    assert len(parsed.images) == 2 * 3 * 3
    for title in pictures.PANELS.values():
        assert text.count(f"<figcaption>{title}</figcaption>") == 1


def test_the_images_are_those_of_the_librarys_pgd(studies, tmp_path):
    path = studies / "adv" / "fast-at" / "seed-0" / "best.pt"
    shown = pictures.attacked(path, 4, 3, None, "cpu")
    payload = checkpoint.load(path)
    model = checkpoint.load_model(payload, path)
    test = data.load("synthetic:1x8x8x3", test_limit=4).test
    pgd = PGD(model, 0.1, 0.025, 3, generator=torch.Generator().manual_seed(0))
    x = test.images / 255
    assert torch.equal(shown.x, x)
    assert torch.equal(shown.x_adv, pgd(x, test.labels))
    assert torch.equal(shown.after, model.eval()(shown.x_adv).argmax(1))
    assert (shown.attack, shown.eps) == ("PGD-3", 0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_its_pixels(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7)) / 255
    (tmp_path / "a.png").write_bytes(base64.b64decode(pictures.image_uri(image).partition(",")[2]))
    pixels = torch.from_numpy(imread(tmp_path / "a.png").copy())[..., :3].permute(2, 0, 1)
    torch.testing.assert_close(pixels, image.expand(3, 5, 7), rtol=0, atol=1 / 255)


def test_a_single_run_has_its_page_beside_it_and_the_same_bytes_each_time(runs, capsys):
    run = runs / "adv" / "fast-at" / "seed-1"
    command = ["report", str(run), "--images=2", "--steps=1"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: 1 run, ")
    text, parsed = written(run / "report.html")
    assert parsed.rows[1][0] == "fast-at"
    assert 'class="legend"' not in text
    assert cli.main(command) == 0
    assert (run / "report.html").read_text() == text


def test_no_images_asks_for_no_data(studies, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "attacked", None)
    out = tmp_path / "a.html"
    assert cli.main(["report", str(studies / "adv"), "--images=0", "--out", str(out)]) == 0
    assert not written(out)[1].images


def test_missing_data_are_said_on_the_page(studies, tmp_path, monkeypatch, capsys):
    def missing(name, **_):
        raise FileNotFoundError(f"{name} <is> not here")

    monkeypatch.setattr(data, "load", missing)
    out = tmp_path / "a.html"
    assert cli.main(["report", str(studies / "adv" / "plain"), "--out", str(out)]) == 0
    assert "No images: synthetic:1x8x8x3 &lt;is&gt; not here" in written(out)[0]
    assert "no attacked images of " in capsys.readouterr().err


def test_imps_rounds_are_shown_when_asked_for(studies):
    (group,) = find_groups([studies / "pruned" / "imp" / "rounds" / "seed-0" / "round-01"])
    assert group.label == "round-01"


def test_runs_of_other_settings_are_not_averaged(runs):
    path = runs / "adv" / "plain" / "seed-1" / "best.pt"
    payload = checkpoint.load(path)
    checkpoint.save(path, {**payload, "settings": {**payload["settings"], "lr": 0.7}})
    labels = [group.label for group in find_groups([runs / "adv"])]
    assert labels == ["fast-at", "plain/seed-0", "plain/seed-1"]
    text = page(find_groups([runs / "adv" / "plain"]), {})
    assert '<th scope="col">training.lr</th>' in text


def test_a_result_of_another_checkpoint_is_not_shown(runs):
    run = runs / "adv" / "plain" / "seed-0"
    shutil.copy(runs / "adv" / "fast-at" / "seed-0" / "best.pt", run / "best.pt")
    assert find_groups([run])[0].runs[0].test == {}


def test_everything_is_escaped(tmp_path):
    evil = "<script>&\"'"
    record = {"epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5, "train_seconds": 1.0}
    settings = {"training.epochs": 1, f"data.{evil}": evil}
    run = Run(tmp_path, 0, settings, [record], {evil: (1, 4)}, {"SA": 0.5, "RA": 0.5, "attack": evil})
    text = page([Group(evil, [run]), Group("b", [run])], {evil: evil})
    assert "<script" not in text
    assert text.count("&lt;script&gt;&amp;&quot;&#x27;") >= 8
    Page(text)


GOOD = '{"epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5, "train_seconds": 1.0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty"),
        (b"\xff\xfe", " is broken: "),
        (b'{"epoch": 1', ", line 1 is broken: "),
        (b"[1]", ", line 1 is no epoch's record: it is no JSON object"),
        (b'{"epoch": 1, "loss": 1}', ", line 1 is no epoch's record: it lacks train_accuracy, val_accuracy"),
        (GOOD.replace("1.0", "NaN").encode(), ", line 1: loss must be a finite number, got nan"),
        (GOOD.replace("0.5", '"a"').encode(), ", line 1: train_accuracy must be a finite number, got 'a'"),
        (f"{GOOD}\n{GOOD}".encode(), ", line 2 must be of epoch 2, got epoch 1"),
        (f'{GOOD}\n{GOOD[:-1]}, "a": 1}}'.replace('1, "l', '2, "l').encode(), ", line 1 must be of epoch 1"),
    ],
)
def test_broken_metrics_are_named(runs, capsys, content, message):
    file = runs / "adv" / "plain" / "seed-0" / "metrics.jsonl"
    file.write_bytes(content)
    assert f"a run is left out: {file}{message}" in error(capsys, "report", runs / "adv", "--images=0")
    text, _ = written(runs / "adv" / "report.html")
    assert "3 runs; " in text
    assert f"{file}{message}" in error(capsys, "report", file.parent)
    assert not (file.parent / "report.html").exists()


def test_epochs_that_differ_in_their_metrics_are_named(runs, capsys):
    file = runs / "adv" / "plain" / "seed-0" / "metrics.jsonl"
    second = GOOD.replace('"epoch": 1', '"epoch": 2').replace("}", ', "extra": 1}')
    file.write_text(f"{GOOD}\n{second}\n")
    assert f"{file}, line 2 and line 1 differ in what they have: extra" in error(
        capsys, "report", runs / "adv"
    )


def test_what_is_no_run_is_named(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty is no run: neither it nor" in error(capsys, "report", tmp_path / "empty")
    assert "nowhere is no folder" in error(capsys, "report", tmp_path / "nowhere")
    run = runs / "adv" / "plain" / "seed-0"
    (run / "metrics.jsonl").unlink()
    assert "seed-0 has finished no epoch yet" in error(capsys, "report", run)
    for name, value in (("images", -1), ("steps", 0)):
        assert f"{name} must be at least" in error(capsys, "report", run, f"--{name}={value}")


def test_broken_files_are_named(runs, capsys):
    run = runs / "adv" / "plain" / "seed-0"
    (run / "test-best.json").write_text('{"question": {}}')
    assert f"{run / 'test-best.json'} is broken: KeyError: 'checkpoint'" in error(capsys, "report", run)
    checkpoint.save(run / "best.pt", {"model": {}})
    assert f"{run / 'best.pt'} is no checkpoint of a training run" in error(capsys, "report", run)
    (run / "best.pt").write_bytes(b"nothing")
    assert f"{run / 'best.pt'} is not a checkpoint" in error(capsys, "report", run)
    (run / "best.pt").unlink()
    assert "best.pt" in error(capsys, "report", run, code=1)


def test_a_curve_takes_the_pages_colour(studies):
    svg = pictures.curve_svg("loss", {"a": (0, [{"epoch": 1.0, "loss": 0.5}])})
    assert svg.startswith("<svg ")
    assert "currentColor" in svg
    assert pictures.STYLES[0][0] in svg
    assert not re.search(r"#0{6}|#f{6}|<rect[^>]*fill: #", svg)

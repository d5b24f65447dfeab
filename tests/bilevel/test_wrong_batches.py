"""A rule's first batch must be what the rule is for, and what a rule is built of cannot change unnoticed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from blokern.bilevel import METHODS, FastAT, FastATSettings, Plain, PlainSettings

each_rule = pytest.mark.parametrize("name", METHODS)


class Net(nn.Module):
    """What `wrap` makes of the logits."""

    def __init__(self, wrap=lambda z: z, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, classes))
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.layers(x))


def make(name: str, model: nn.Module, **words):
    rule, settings = METHODS[name]
    return rule(model, torch.optim.SGD(model.parameters(), lr=0.1), settings(**words))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 5


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda x: (x - 0.45) / 0.2, r"\[-2.\d+, 2.7\d+\]"),
        (lambda x: 255 * x, r"\[2.\d+, 25\d.\d+\]"),
        (lambda x: x - 2e-4 - x.min(), r"\[-0.0001999\d*, 0.9\d+\]"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), r"\[nan, nan\]"),
    ],
)
def test_images_outside_the_box_are_refused_with_their_range(name, change, seen) -> None:
    model = Net()
    rule, before = make(name, model), copy.deepcopy(model.state_dict())
    x, y = batch()
    with pytest.raises(
        ValueError, match=rf"^x must lie in .* = \[0.0, 1.0\].*got values in {seen}; normalise inside"
    ):
        rule.step(change(x), y)
    assert unchanged(model, before)
    assert rule.step(x, y).loss.isfinite()


@each_rule
def test_rounding_may_leave_the_box(name) -> None:
    x, y = batch()
    x[0, 0, 0, :2] = torch.tensor([-3e-8, 1.0000001])
    assert make(name, Net()).step(x, y).loss.isfinite()


@each_rule
def test_values_are_read_once(name, monkeypatch) -> None:
    rule, (x, y) = make(name, Net()), batch()
    rule.step(x, y)
    monkeypatch.setattr(Tensor, "aminmax", None)
    rule.step(x, y)
    rule.settings = METHODS[name][1](precision="bf16")  # of another box, perhaps
    with pytest.raises(TypeError):
        rule.step(x, y)


@each_rule
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (lambda y: y - 100, ValueError, "^y must hold class labels from 0, got -100"),
        (lambda y: y + 5, ValueError, "^y holds label 9, but the model has 5 classes"),
        (lambda y: y.int(), TypeError, "^y must be class labels, torch.int64, got torch.int32"),
        (lambda y: nn.functional.one_hot(y).float(), TypeError, "of one-hot rows"),
        (lambda y: y.tolist(), TypeError, "^y must be a tensor, got list"),
    ],
)
def test_labels_that_are_none(name, labels, error, message) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    with pytest.raises(error, match=message):
        make(name, model).step(x, labels(y))
    assert unchanged(model, before)


@each_rule
def test_no_label_leaves_a_sample_out_later_either(name) -> None:
    rule, (x, y) = make(name, Net()), batch()
    rule.step(x, y)
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        rule.step(x, y - 100)


@each_rule
@pytest.mark.parametrize(
    "wrap", [lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z, "aux": z[:, :1]}]
)
def test_logits_are_taken_out_of_what_holds_them(name, wrap) -> None:
    x, y = batch()
    found = []
    for model in (Net(), Net(wrap)):
        torch.manual_seed(0)
        rule = make(name, model)
        found.append(rule.step(x, y).logits)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[2:], found[:2])


@each_rule
@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (
            lambda z: (z, z),
            TypeError,
            "^model must return its logits.*got a tuple of Tensor, Tensor; wrap it",
        ),
        (lambda z: {"out": z}, TypeError, "got a dict with 'out'; wrap it"),
        (lambda z: z[:, :1], ValueError, "at least two classes"),
        (lambda z: z.unsqueeze(2), ValueError, r"shape \[8, K\], got torch.float32 of shape \(8, 5, 1\)"),
        (lambda z: z.repeat(2, 1), ValueError, r"shape \[8, K\], got torch.float32 of shape \(16, 5\)"),
    ],
)
def test_outputs_that_are_no_logits(name, wrap, error, message) -> None:
    x, y = batch()
    with pytest.raises(error, match=message):
        make(name, Net(wrap)).step(x, 0 * y)


# ---- Attributes.


@each_rule
def test_settings_count_from_the_next_step_on(name) -> None:
    rule_type, settings = METHODS[name]
    other = settings(precision="bf16") if name == "plain" else settings(eps=0.2, clip_max=2.0)
    x, y = batch()
    found = []
    for change in (False, True):
        model = Net()
        rule = rule_type(model, torch.optim.SGD(model.parameters(), lr=0.1), settings() if change else other)
        if change:
            rule.settings = other
        torch.manual_seed(0)
        found.append(rule.step(x, y).logits)
    assert torch.equal(*found)
    with pytest.raises(TypeError, match=r"^settings must be of type"):
        rule.settings = "other"


def test_what_a_rule_is_built_on_stays() -> None:
    model = Net()
    rule = make("fast-at", model)
    with pytest.raises(
        AttributeError, match=r"FastAT.model cannot be changed: make a new rule, with an optimizer"
    ):
        rule.model = Net()
    with pytest.raises(AttributeError, match=r"FastAT.processes cannot be changed: make a new rule"):
        rule.processes = rule.processes
    assert rule.model is model
    with pytest.raises(AttributeError):
        rule.settings.eps = 0.5


def test_the_optimizer_is_live_and_must_be_the_models() -> None:
    model = Net()
    rule = make("plain", model)
    rule.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = copy.deepcopy(model.state_dict())
    rule.step(*batch())
    assert unchanged(model, before)
    for rule_type, settings in ((Plain, PlainSettings()), (FastAT, FastATSettings())):
        with pytest.raises(
            ValueError, match=r"^optimizer must hold parameters of the model, got one that holds none"
        ):
            rule_type(model, torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1), settings)

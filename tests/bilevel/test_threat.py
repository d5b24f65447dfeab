"""The threat model: what it refuses, and that it travels from the training to every file made of it."""

import json

import pytest
import torch
from checkpoints import half_of_the_filters, pruned, single_weights
from runs import SETTINGS, SPLITS, make, sending

from blokern import models
from blokern.attack import APGD, FGSM, PGD, evaluate
from blokern.bilevel import (
    METHODS,
    FastAT,
    FastATSettings,
    FastBATSettings,
    Interrupted,
    Plain,
    PlainSettings,
    ThreatModel,
    Trainer,
    TrainSettings,
    checkpoint,
)
from blokern.bilevel.export import load_sparse, save_compacted, save_sparse

pytestmark = pytest.mark.usefixtures("no_pictures")


def told(run_dir, name="best.pt"):
    return ThreatModel.of_checkpoint(checkpoint.load(run_dir / name), run_dir / name)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"eps": 8.0}, ValueError, r"eps must be at most .* = 1 in linf, got 8; do you mean 8/255\?"),
        ({"eps": 1.01}, ValueError, "eps must be at most"),
        ({"eps": 300.0}, ValueError, "got 300$"),
        ({"eps": 300.0, "clip_max": 255.0}, ValueError, "= 255 in linf, got 300"),
        ({"eps": -0.1}, ValueError, "eps must be finite and at least 0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": "8"}, TypeError, "eps must be a number, got '8'"),
        ({"eps": 0.1, "norm": "l3"}, ValueError, "norm must be one of"),
        ({"eps": 0.1, "clip_min": 1.0}, ValueError, "clip_min must be less than clip_max"),
    ],
)
def test_what_is_no_threat_model_is_refused(words, kind, message):
    with pytest.raises(kind, match=message):
        ThreatModel(**words)


def test_a_ball_may_be_as_large_as_the_box_and_larger_in_other_norms():
    ThreatModel(eps=1.0)
    ThreatModel(eps=8.0, clip_max=255.0)
    ThreatModel(eps=0.7 - 0.1, clip_min=0.1, clip_max=0.7)  # to rounding
    ThreatModel(eps=8.0, norm="l2")


@pytest.mark.parametrize("attack", [PGD, APGD, FGSM])
@pytest.mark.parametrize("eps", [8.0, torch.tensor([0.1, 8.0])])
def test_no_attack_takes_a_budget_in_255ths(attack, eps):
    model = torch.nn.Flatten()
    with pytest.raises(ValueError, match=r"do you mean 8/255\?"):
        attack(model, eps)
    attack(model, eps, clip_max=255.0)
    attack(model, eps, norm="l2")


def test_neither_does_an_evaluation_or_a_rule_or_a_training():
    with pytest.raises(ValueError, match=r"do you mean 8/255\?"):
        evaluate(torch.nn.Flatten(), [], eps=8.0)
    for _, settings in METHODS.values():
        if hasattr(settings, "eps"):
            with pytest.raises(ValueError, match=r"do you mean 8/255\?"):
                settings(eps=8.0)
    with pytest.raises(ValueError, match=r"do you mean 8/255\?"):
        TrainSettings(eps=8)


def test_a_checkpoint_carries_what_its_rule_attacks_with(tmp_path):
    make(tmp_path / "at", FastAT, FastATSettings(eps=0.1)).fit()
    assert told(tmp_path / "at") == told(tmp_path / "at", "last.pt") == ThreatModel(eps=0.1)
    make(tmp_path / "plain", Plain, PlainSettings()).fit()
    assert told(tmp_path / "plain") is None  # its validation attacks, its training does not
    make(tmp_path / "tuned", Plain, PlainSettings(), threat=ThreatModel(eps=0.2)).fit()
    assert told(tmp_path / "tuned") == ThreatModel(eps=0.2)


def test_checkpoints_of_before_tell_it_by_their_method(tmp_path):
    method = {
        "name": "fast-at",
        "precision": "fp32",
        "eps": 0.1,
        "step_size": None,
        "clip_min": 0.0,
        "clip_max": 1.0,
    }
    of = ThreatModel.of_checkpoint
    assert of({"recipe": {"method": method}, "settings": {"eps": 0.3}}, "a") == ThreatModel(eps=0.1)
    assert of({"recipe": {"method": {"name": "plain"}}, "settings": {"eps": 0.3}}, "a") is None
    assert of({"settings": {"eps": 0.3}}, "a") is None
    for broken in ({"eps": 7.0}, {"eps": "x"}, {"radius": 1}, 3):
        with pytest.raises(checkpoint.CheckpointError, match="a says nothing sound of its threat model"):
            of({"threat": broken}, "a")


def test_a_run_is_not_continued_for_another_threat_model(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path, sending(3)).fit()
    with (
        pytest.warns(
            UserWarning, match=r"validation attacks with settings\.eps = 0\.1, the rule with eps = 0\.2"
        ),
        pytest.raises(checkpoint.CheckpointError, match=r"threat\.eps is 0\.1 there and 0\.2 here"),
    ):
        make(tmp_path, method=FastBATSettings(eps=0.2, step_size=20.0), resume=True)


def test_the_trainer_refuses_a_rule_for_other_images(tmp_path):
    with pytest.raises(ValueError, match=r"clip_min and clip_max must be 0 and 1.*got 0 and 255"):
        make(tmp_path, FastAT, FastATSettings(eps=25.5, clip_max=255.0))
    model = models.small_cnn(num_classes=3, in_channels=1, width=1)
    rule = FastAT(model, SETTINGS.optimizer(model), FastATSettings(eps=0.1))
    with pytest.raises(ValueError, match=r"threat must be the rule's own, linf, eps 0\.1, or None"):
        Trainer(rule, SPLITS, SETTINGS, tmp_path, threat=ThreatModel(eps=0.2))


def test_exports_carry_it(tmp_path):
    threat = ThreatModel(eps=0.1, norm="l2").plain()
    payload = {**pruned(single_weights), "threat": threat}
    save_sparse(payload, "a.pt", tmp_path / "a.safetensors")
    assert load_sparse(tmp_path / "a.safetensors")["threat"] == threat
    save_compacted({**pruned(half_of_the_filters), "threat": threat}, "a.pt", tmp_path / "a.pt2")
    extra = {"threat.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["threat.json"]) == threat

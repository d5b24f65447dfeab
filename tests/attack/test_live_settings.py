"""A setting that is changed after construction counts, or is refused: nothing is copied and forgotten."""

import inspect

import pytest
import torch
from attack_twins import images, small_net

from blokern import attack
from blokern.attack import APGD, FGSM, NFGSM, PGD, Evaluation
from blokern.attack.base import AttackOptions

#: For every setting another value, and what it needs beside it.
CHANGES = {
    "eps": (0.2, {}),
    "step_size": (0.003, {}),
    "steps": (7, {}),
    "norm": ("l2", {}),
    "restarts": (3, {}),
    "random_start": (True, {"steps": 1}),
    "early_stop": (True, {}),
    "noise": (1.0, {}),
    "rho": (0.2, {"steps": 30}),
    "multi_radius": (True, {"norm": "l1", "eps": 3.0, "steps": 10}),
    "loss": ("margin", {}),
    "targeted": (True, {}),
    "target_classes": (3, {}),
    "clip_min": (-1.0, {"eps": 0.9}),
    "clip_max": (2.0, {"eps": 0.9}),
    "generator": (torch.Generator().manual_seed(9), {"random_start": True}),
    "eval_mode": (False, {}),
}
UNSEEN = {"model", "surrogate", "eot", "cuda_graph"}  # tested below
KINDS = [APGD, FGSM, NFGSM, PGD]
SETTINGS = [
    (kind, name)
    for kind in KINDS
    for name in (*inspect.signature(kind).parameters, *AttackOptions.__annotations__)
    if name not in ("options", *UNSEEN)
]


def test_every_class_and_setting_is_walked():
    classes = {kind for name in attack.__all__ if isinstance(kind := getattr(attack, name), type)}
    assert classes == {*KINDS, attack.Attack, Evaluation}
    for kind in KINDS:
        public = {name.lstrip("_") for name in vars(kind(small_net())) if name.strip("_") in CHANGES}
        assert public <= set(CHANGES)


@pytest.mark.parametrize(("kind", "name"), SETTINGS)
def test_a_changed_setting_is_a_given_one(kind, name):
    net = small_net()
    net[6].p = 0.0
    net.train()
    x, y = images(net.eval(), n=6)
    net.train()
    value, beside = CHANGES[name]
    value = kind is FGSM if name == "random_start" else value
    taken = {*inspect.signature(kind).parameters, *AttackOptions.__annotations__}
    start = {"steps": 5, "random_start": False} if kind is PGD and name not in ("restarts",) else {}
    start = start | {"steps": 5} if kind is APGD else start
    beside = {key: v for key, v in (start | {"eps": 0.02} | beside).items() if key in taken and key != name}

    def found(one):
        torch.manual_seed(0)
        net.load_state_dict(state)
        if name == "generator":
            value.manual_seed(9)
        return one(x, (y + 1) % 6 if name == "targeted" else y)

    state = {key: t.clone() for key, t in net.state_dict().items()}
    changed = kind(net, **beside)
    before = found(changed)
    setattr(changed, name, value)
    assert torch.equal(found(changed), found(kind(net, **beside, **{name: value})))
    unseen = name == "restarts" and kind in (FGSM, NFGSM)
    assert unseen or not torch.equal(found(changed), before), "the change should have been one"
    assert repr(changed) == repr(kind(net, **beside, **{name: value}))


def test_what_follows_from_a_setting_follows_its_changes():
    net = small_net()
    for kind, factor in ((FGSM, 1.0), (NFGSM, 1.0), (PGD, 0.25), (APGD, 2.0)):
        one = kind(net, 1 / 255)
        one.eps = 8 / 255
        assert one.step_size == factor * (8 / 255)
        assert f"{8 / 255:.4g}" in repr(one)
        one.eps = None
        one.clip_max = 255.0
        assert one.eps == 8.0


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (FGSM, "steps", "FGSM.steps cannot be changed: it is one step; take PGD"),
        (NFGSM, "steps", "NFGSM.steps cannot be changed: it is one step; take PGD"),
        (NFGSM, "random_start", "noise=0.0 starts at x"),
        (APGD, "step_size", "APGD.step_size follows eps: set eps, or take PGD"),
        (PGD, "name", "name"),
    ],
)
def test_what_is_no_setting_cannot_be_set(kind, name, message):
    with pytest.raises(AttributeError, match=message):
        setattr(kind(small_net()), name, 3)


def test_another_model_is_attacked():
    nets = small_net(), small_net(seed=3)
    x, y = images(nets[0], n=4)
    one = PGD(nets[0], random_start=False)
    one.model = nets[1]
    assert torch.equal(one(x, y), PGD(nets[1], random_start=False)(x, y))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eps", -1.0, "eps must be finite"),
        ("steps", 0, "steps must be at least 1"),
        ("loss", "cee", "loss must be one of"),
        ("norm", "inf", "norm must be one of"),
        ("clip_min", 2.0, "clip_min must be less than clip_max"),
        ("surrogate", "fp8", "surrogate must be one of"),
        ("eot", 0, "eot must be at least 1"),
        ("cuda_graph", True, "x must be on a CUDA device"),
    ],
)
def test_a_change_is_checked_in_the_call(name, value, message):
    net = small_net()
    x, y = images(net, n=4)
    one = PGD(net)
    setattr(one, name, value)
    with pytest.raises(ValueError, match=message):
        one(x, y)

"""What a model may return, and what is no answer of a classifier."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from attack_twins import images, small_net
from torch import nn

from blokern.attack import APGD, FGSM, NFGSM, PGD, evaluate, logits_of

Named = namedtuple("Named", ["logits", "aux"])
TAKEN = {
    "object": lambda z: SimpleNamespace(logits=z, hidden=None),
    "dict": lambda z: {"aux": z[:, :2], "logits": z},
    "named tuple": lambda z: Named(z, None),
}
REFUSED = {
    "tuple": (
        lambda z: (z, z),
        r"got a tuple of Tensor, Tensor; wrap it in an nn.Module.*self.model\(x\)\[0\]",
    ),
    "list": (lambda z: [z], "got a list of Tensor; wrap it"),
    "dict": (
        lambda z: {"out": z, "aux": z},
        r"got a dict with 'out', 'aux'; wrap it.*self.model\(x\)\['out'\]",
    ),
    "nothing": (lambda z: None, "got NoneType"),
    "no tensor": (lambda z: SimpleNamespace(logits=[1.0]), "got SimpleNamespace"),
}


class Wrapped(nn.Module):
    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x))


CALLS = {
    "fgsm": lambda net, x, y: FGSM(net)(x, y),
    "n-fgsm": lambda net, x, y: NFGSM(net, generator=torch.Generator().manual_seed(0))(x, y),
    "pgd": lambda net, x, y: PGD(net, steps=3, random_start=False, early_stop=True)(x, y),
    "surrogate": lambda net, x, y: PGD(net, steps=3, random_start=False, surrogate="fp32")(x, y),
    "apgd": lambda net, x, y: APGD(net, steps=4, generator=torch.Generator().manual_seed(0))(x, y),
    "evaluate": lambda net, x, y: torch.tensor(evaluate(net, [(x, y)], FGSM(net)).robust_accuracy),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
@pytest.mark.parametrize("wrap", TAKEN.values(), ids=TAKEN)
def test_logits_are_taken_out_of_what_holds_them(call, wrap):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=8)
    torch.testing.assert_close(call(Wrapped(net, wrap), x, y), call(net, x, y))


@each_call
@pytest.mark.parametrize(("wrap", "message"), REFUSED.values(), ids=REFUSED)
def test_the_rest_is_refused_with_what_came(call, wrap, message):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=8)
    with pytest.raises(TypeError, match=f"^model must return its logits.*{message}"):
        call(Wrapped(net, wrap), x, y)
    with pytest.raises(TypeError, match=message):
        logits_of(wrap(net(x)))


WRONG = {
    "one column": (lambda z: z[:, :1], r"logits of at least two classes, got shape \(8, 1\); of one logit z"),
    "a vector": (lambda z: z[:, 0], r"shape \[8, K\], got torch.float32 of shape \(8,\)"),
    "a picture": (
        lambda z: z[:, :, None, None],
        r"shape \[8, K\], got torch.float32 of shape \(8, 6, 1, 1\)",
    ),
    "a sequence": (lambda z: z.unsqueeze(1), r"shape \[8, K\], got torch.float32 of shape \(8, 1, 6\)"),
    "other samples": (lambda z: z.repeat(2, 1), r"shape \[8, K\], got torch.float32 of shape \(16, 6\)"),
    "classes": (lambda z: z.long(), r"floating-point logits of shape \[8, K\], got torch.int64"),
}


@pytest.mark.parametrize("call", [CALLS["fgsm"], CALLS["apgd"], CALLS["evaluate"]])
@pytest.mark.parametrize(("wrap", "message"), WRONG.values(), ids=WRONG)
def test_logits_of_no_classifier(call, wrap, message):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=8)
    with pytest.raises(ValueError, match=f"^model must return .*{message}"):
        call(Wrapped(net, wrap), x, 0 * y)


@each_call
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (lambda y: nn.functional.one_hot(y), ValueError, r"y must have shape \(8,\)"),
        (
            lambda y: nn.functional.one_hot(y).float(),
            TypeError,
            r"got torch.float32 of shape .*y.argmax\(1\)",
        ),
        (lambda y: y.int(), TypeError, r"y must be class labels, torch.int64, got torch.int32.*y.long\(\)"),
        (lambda y: y - 100, ValueError, "y must hold class labels from 0, got -"),
        (lambda y: y + 6, ValueError, "but the model has 6 classes"),
        (lambda y: y.tolist(), TypeError, "y must be a tensor, got list"),
    ],
)
def test_labels_that_are_none(call, labels, error, message):
    net = small_net(dtype=torch.float32)
    x, y = images(net, n=8)
    with pytest.raises(error, match=message):
        call(net, x, labels(y))

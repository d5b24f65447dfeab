"""Batches, outputs and losses of other people's networks: every method against plain torch, or refused."""

import dataclasses
import math
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blokern.bilevel import PRUNERS, SNIP, BiP, BiPSettings, GraSPSettings, HydraSettings, SNIPSettings
from blokern.bilevel.loss import as_batch, call, cross_entropy, logits_of, model_loss
from blokern.bilevel.masking import prunable

LOSSES = {  # the methods that take a loss
    "snip": SNIPSettings(density=0.3),
    "grasp": GraSPSettings(density=0.3),
    "hydra": HydraSettings(density=0.3, score_epochs=1),
}


class Pixels(nn.Module):
    """A small segmentation network, whose output is packed as one likes."""

    def __init__(self, packed=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.packed = packed

    def forward(self, x):
        return self.packed(self.b(F.silu(self.a(x))))


class Texture(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(108, 4))


class Words(nn.Module):
    """A small network of tokens: classes of the text, or of each token."""

    def __init__(self, each=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.each = nn.Embedding(11, 8), each
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.embedding(input_ids)
        if attention_mask is not None:
            h = h * attention_mask.unsqueeze(-1)
        logits = self.b(F.silu(self.a(h if self.each else h.mean(1))))
        if labels is None:
            return logits
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


class Two(nn.Module):
    """Of two inputs, to a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 1)

    def forward(self, left, right):
        return self.c(torch.tanh(self.a(left) + self.b(right)))


IMAGES, IDS = torch.rand(4, 3, 6, 6), torch.randint(11, (4, 7))
PIXELS = torch.randint(4, (4, 6, 6))
SHARED = torch.rand(4, 4).softmax(1)
LEFT, RIGHT, NUMBERS = torch.rand(4, 3), torch.rand(4, 2), torch.rand(4, 1)

#: network, batch, loss_fn, and the same loss in plain torch.
CASES = {
    "segmentation": (Pixels, (IMAGES, PIXELS), None, lambda m: F.cross_entropy(m(IMAGES), PIXELS)),
    "segmentation, bytes": (
        Pixels,
        (IMAGES, PIXELS.to(torch.uint8)),
        None,
        lambda m: F.cross_entropy(m(IMAGES), PIXELS),
    ),
    "dict": (
        lambda: Pixels(lambda z: {"aux": z.neg(), "out": z}),
        (IMAGES, PIXELS),
        None,
        lambda m: F.cross_entropy(m(IMAGES)["out"], PIXELS),
    ),
    "object": (
        lambda: Pixels(lambda z: SimpleNamespace(logits=z, hidden=z.neg())),
        (IMAGES, PIXELS),
        None,
        lambda m: F.cross_entropy(m(IMAGES).logits, PIXELS),
    ),
    "tuple": (
        lambda: Pixels(lambda z: (z, z.neg())),
        (IMAGES, PIXELS),
        model_loss(F.cross_entropy, logits=lambda output: output[1]),
        lambda m: F.cross_entropy(m(IMAGES)[1], PIXELS),
    ),
    "tuple of one": (
        lambda: Pixels(lambda z: (z, None)),
        (IMAGES, PIXELS),
        None,
        lambda m: F.cross_entropy(m(IMAGES)[0], PIXELS),
    ),
    "tokens": (Words, (IDS, torch.arange(4)), None, lambda m: F.cross_entropy(m(IDS), torch.arange(4))),
    "a class for each token": (
        lambda: Words(each=True),
        (IDS, IDS % 4),
        None,
        lambda m: F.cross_entropy(m(IDS).flatten(0, 1), (IDS % 4).flatten()),
    ),
    "mapping": (
        Words,
        (UserDict(input_ids=IDS, attention_mask=(IDS > 2).float()), torch.arange(4)),
        None,
        lambda m: F.cross_entropy(m(IDS, (IDS > 2).float()), torch.arange(4)),
    ),
    "the model's own loss": (
        Words,
        {"input_ids": IDS, "labels": torch.arange(4)},
        None,
        lambda m: F.cross_entropy(m(IDS), torch.arange(4)),
    ),
    "soft labels": (
        Texture,
        (IMAGES, SHARED),
        None,
        lambda m: F.cross_entropy(m(IMAGES), SHARED),
    ),
    "regression of two inputs": (
        Two,
        ((LEFT, RIGHT), NUMBERS),
        model_loss(F.mse_loss),
        lambda m: F.mse_loss(m(LEFT, RIGHT), NUMBERS),
    ),
    "any loss": (
        Two,
        ((LEFT, RIGHT), None),
        lambda model, x, y: ((out := call(model, x)).square().mean(), out),
        lambda m: m(LEFT, RIGHT).square().mean(),
    ),
}


@pytest.mark.filterwarnings("ignore:.*cannot be masked")
@pytest.mark.parametrize("case", CASES)
def test_every_method_takes_what_a_network_takes(case):
    net, batch, loss_fn, plain = CASES[case]
    how = {} if loss_fn is None else {"loss_fn": loss_fn}
    model = net()
    weights = prunable(model)
    grads = torch.autograd.grad(plain(model), [*weights.values()])
    expected = {n: (w * g).abs().detach() for (n, w), g in zip(weights.items(), grads, strict=True)}
    twin = net()
    found = SNIP(SNIPSettings(), **how)._scores(twin, prunable(twin), [batch])
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=1e-8)

    total = sum(weight.numel() for weight in weights.values())
    for name, settings in LOSSES.items():
        if name == "grasp" and case in ("the model's own loss", "any loss"):
            settings = GraSPSettings(density=0.3, temperature=1.0)
        masks = PRUNERS[name][0](settings, **how).masks(model, [batch, batch])
        assert sum(mask.kept for mask in masks.values()) == round(0.3 * total)

    for implicit in ("bilinear", "cg"):
        rule = BiP(
            twin := net(), torch.optim.SGD(twin.parameters(), 0.1), BiPSettings(implicit=implicit), **how
        )
        result = rule.step(batch, batch)
        assert all(torch.isfinite(t).all() for t in (result.loss, result.logits, *result.metrics.values()))
        assert not result.logits.requires_grad


def test_the_mean_is_over_samples_of_all_batches():
    model = nn.Linear(3, 2)
    x, y = torch.rand(7, 3), torch.arange(7) % 2
    whole = SNIP(SNIPSettings())._scores(model, prunable(model), [(x, y)])
    parts = SNIP(SNIPSettings())._scores(model, prunable(model), [(x[:2], y[:2]), (x[2:], y[2:])])
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("logits", "y", "error", "message"),
    [
        (torch.rand(4, 1), torch.rand(4, 1), ValueError, "K >= 2 classes .* got shape .4, 1.; .*loss_fn"),
        (torch.rand(4), torch.rand(4), ValueError, "K >= 2 classes"),
        (torch.rand(4, 3), torch.rand(4), ValueError, "probabilities of shape .4, 3., .*for regression"),
        (torch.rand(4, 3), torch.randn(4, 3), ValueError, "probabilities, >= 0 and of sum 1"),
        (torch.rand(4, 3), torch.full((4, 3), math.nan), ValueError, "probabilities, >= 0 and of sum 1"),
        (
            torch.rand(4, 3),
            torch.ones(4, dtype=torch.bool),
            TypeError,
            "integers, or probabilities, got torch.bool",
        ),
        (
            torch.rand(4, 3, 5, 5),
            torch.ones(4).long(),
            ValueError,
            r"y must have shape \(4, 5, 5\) to fit logits",
        ),
        (torch.rand(4, 3, 3), torch.ones(4, 3).long(), ValueError, "fit with the classes in dimension 1 and"),
        (torch.rand(4, 3), [0, 1, 2, 0], TypeError, "classes or probabilities, got list"),
    ],
)
def test_targets_that_the_cross_entropy_would_misread_are_refused(logits, y, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(nn.Identity(), logits, y)


def test_an_output_of_several_tensors_without_a_name_is_refused():
    pair = torch.rand(2, 3), torch.rand(2, 3)
    for output, count in ((pair, 2), ({"a": pair}, 2), (SimpleNamespace(n=3), 0)):
        with pytest.raises(
            TypeError, match=f"with {count} tensors, none of them called logits or out; say which"
        ):
            logits_of(output)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (IMAGES, TypeError, "must be a pair .x, y.*got Tensor"),
        ((IMAGES, PIXELS, PIXELS), TypeError, "got tuple of 3"),
        (("text", PIXELS), TypeError, "x must be a tensor, or a tuple or mapping of tensors, got str"),
        ((IMAGES[:0], PIXELS[:0]), ValueError, r"x must be a batch, \[N, ...\] with N >= 1"),
        ((IMAGES, PIXELS[:3]), ValueError, r"y must have 4 samples to fit x, got shape \(3, 6, 6\)"),
        (({"x": IMAGES}, torch.tensor(1)), ValueError, r"y must have 4 samples to fit x, got shape \(\)"),
    ],
)
def test_what_is_no_batch_is_refused(batch, error, message):
    with pytest.raises(error, match=message):
        as_batch(batch)


def test_a_mapping_that_makes_no_loss_is_refused():
    with pytest.raises(TypeError, match="a mapping must make the model return a loss"):
        SNIP(SNIPSettings()).masks(Two(), [{"left": LEFT, "right": RIGHT}])


@pytest.mark.filterwarnings("ignore:.*cannot be masked")
def test_a_temperature_that_cannot_be_applied_is_refused():
    grasp = PRUNERS["grasp"][0]
    own = grasp(GraSPSettings(), loss_fn=lambda model, x, y: (model(x).mean(), y))
    with pytest.raises(
        ValueError, match="temperature must be 1 for a loss_fn that takes its own logits, got 200"
    ):
        own.masks(Pixels(), [(IMAGES, PIXELS)])
    with pytest.raises(ValueError, match="temperature must be 1 where the model computes the loss itself"):
        grasp(GraSPSettings()).masks(Words(), [{"input_ids": IDS, "labels": torch.arange(4)}])


def test_a_loss_that_is_no_mean_or_a_constant_is_refused():
    many = model_loss(lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    with pytest.raises(ValueError, match="loss_fn must give a scalar"):
        SNIP(SNIPSettings(), loss_fn=many).masks(Pixels(), [(IMAGES, PIXELS)])
    with pytest.raises(ValueError, match="depends on the model's weights, got a constant"):
        SNIP(SNIPSettings(), loss_fn=lambda model, x, y: (torch.ones(()), y)).masks(
            Pixels(), [(IMAGES, PIXELS)]
        )


@pytest.mark.parametrize("name", [*LOSSES, "bip"])
@pytest.mark.parametrize(
    ("reduction", "packed", "error", "message"),
    [
        (
            "mean",
            lambda loss, z: loss,
            TypeError,
            r"loss_fn must give .*\(loss, logits\), got Tensor; .*model_loss",
        ),
        ("none", lambda loss, z: loss, TypeError, r"loss_fn must give .*\(loss, logits\), got Tensor"),
        ("none", lambda loss, z: (loss, z), ValueError, r"loss_fn must give a scalar, .* got \(2,\)"),
    ],
)
def test_a_loss_alone_or_of_each_sample_is_refused(name, reduction, packed, error, message):
    """Of two samples' losses, the first would be taken for the loss, and the second for the logits."""

    def loss_fn(model, x, y):
        logits = model(x)
        return packed(F.cross_entropy(logits, y, reduction=reduction), logits)

    def use():
        model = Texture()
        if name == "bip":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            BiP(model, optimizer, BiPSettings(density=0.3), loss_fn=loss_fn).step(batch, batch)
        else:
            words = {"temperature": 1.0} if name == "grasp" else {}
            settings = dataclasses.replace(LOSSES[name], **words)
            PRUNERS[name][0](settings, loss_fn=loss_fn).masks(model, [batch])

    batch = torch.rand(2, 3, 6, 6), torch.tensor([1, 3])
    with pytest.raises(error, match=message):
        use()

"""BiP against a plain-torch twin, its budget of passes, what each granularity keeps, and what it refuses."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import data, models
from blokern.attack import PGD
from blokern.bilevel import BiP, BiPSettings
from blokern.bilevel.bip import cross_entropy
from blokern.ops import reference
from blokern.sparse import MaskedConv2d, MaskedLinear, masks_of


def conv_net(norm: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3, padding=1, bias=not norm), norms[0], nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    ).to(dtype)


WEIGHTS = ["0.weight", "3.weight", "7.weight"]  # of conv_net
#: Those that stay whole: classes, the images' channels, and of the inputs 4, 6 and 72 what 4 does not divide.
WHOLE = {"filter": ["7.weight"], "channel": ["0.weight"], "2:4": ["3.weight"], "1:4": ["3.weight"]}


def batch(seed: int, dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 5


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def bip(model: nn.Module, loss_fn: Any = cross_entropy, **settings: Any) -> BiP:
    settings = {"density": 0.3} | settings
    return BiP(model, sgd(model), BiPSettings(**settings), loss_fn)


def kept(rule: BiP) -> dict[str, Tensor]:
    return {name: mask.to_dense() for name, mask in masks_of(rule.model).items()}


@dataclass
class Twin:
    """The algorithm as written, on a dense model whose masked weights are leaves."""

    model: nn.Module
    settings: BiPSettings
    scores: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = sgd(self.model)
        self.theta = {name: self.model.get_parameter(name) for name in WEIGHTS}
        self.buffers = {name: torch.zeros_like(t) for name, t in self.theta.items()}
        if self.settings.mode == "paper":
            self.scores = {
                name: math.sqrt(6 / t[0].numel()) * t.detach().abs() / t.detach().abs().max()
                for name, t in self.theta.items()
            }
        else:
            self.scores = {name: t.detach() for name, t in self.theta.items()}
        self.select()

    def select(self) -> None:
        flat = torch.cat([s.flatten() for s in self.scores.values()])
        flat = flat if self.settings.mode == "paper" else flat.abs()
        largest = reference.topk_mask(flat, self.settings.density)
        parts = largest.split([s.numel() for s in self.scores.values()])
        self.masks = {
            name: part.view_as(s) for part, (name, s) in zip(parts, self.scores.items(), strict=True)
        }

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and ∇_w; leaves the other parameters' gradients in .grad."""
        w = {name: (self.masks[name] * t).detach().requires_grad_() for name, t in self.theta.items()}
        loss = F.cross_entropy(torch.func.functional_call(self.model, w, (x,)), y)
        loss.backward()
        return loss.detach(), {name: leaf.grad for name, leaf in w.items() if leaf.grad is not None}

    def step(
        self, lower: tuple[Tensor, Tensor], upper: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        self.optimizer.zero_grad()
        loss, g = self.gradients(*lower)
        for name, t in self.theta.items():
            t.grad = self.masks[name] * g[name]
        self.optimizer.step()

        upper_loss, g = self.gradients(*upper)
        settings, before = self.settings, self.masks
        for name, s in self.scores.items():
            theta, m = self.theta[name].detach(), before[name]
            if settings.mode == "paper":
                grad = (theta - m * g[name] / settings.implicit_gamma) * g[name]
            else:
                grad = theta.abs() * g[name] - (theta * g[name]) ** 2 / settings.implicit_gamma
            grad = grad + settings.score_weight_decay * s
            self.buffers[name] = settings.score_momentum * self.buffers[name] + grad
            s -= settings.score_lr * self.buffers[name]
        self.select()
        flips = sum(int((before[name] != m).sum()) for name, m in self.masks.items())
        return loss, upper_loss, flips / sum(m.numel() for m in before.values())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"score_momentum": 0.0, "score_lr": 5.0},
        {"gamma": 0.3, "score_lr": 2.0},
        {"gamma": math.inf, "density": 0.5},
        {"mode": "released"},
        {"mode": "released", "gamma": 2.0, "score_momentum": 0.5, "score_weight_decay": 1e-2},
    ],
)
def test_steps_equal_the_twins(norm: bool, settings: dict[str, Any]) -> None:
    rule, twin = (
        bip(conv_net(norm), **settings),
        Twin(conv_net(norm), BiPSettings(**{"density": 0.3} | settings)),
    )
    changes = []
    for seed in range(6):
        batches = batch(seed), batch(100 + seed)
        result = rule.step(*batches)
        loss, upper_loss, changed = twin.step(*batches)
        changes.append(changed)
        torch.testing.assert_close(result.loss, loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.metrics["upper_loss"], upper_loss, rtol=1e-10, atol=1e-10)
        assert result.metrics["changed"].item() == pytest.approx(changed)
        for name, scores in rule.scores.items():
            torch.testing.assert_close(scores, twin.scores[name], rtol=1e-10, atol=1e-10)
        assert all(torch.equal(mask, twin.masks[name]) for name, mask in kept(rule).items())
    assert max(changes) > 0
    theirs = twin.model.state_dict()
    for name, theta in rule.theta.items():
        torch.testing.assert_close(theta, theirs[name], rtol=1e-10, atol=1e-10)
        assert torch.equal(rule.model.get_parameter(name), theta * twin.masks[name])
        theirs[name] *= twin.masks[name]
    for name, tensor in rule.model.state_dict().items():
        if "mask_" not in name:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-10, atol=1e-10)
    if norm:
        assert rule.model[1].num_batches_tracked == 12


def test_a_score_step_is_the_formula() -> None:
    """s − α (θ − m ⊙ g / γ) ⊙ g, with g by differences of the loss in w: no derivative of torch's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3), nn.Softplus(), nn.Linear(3, 5)).double()
    settings = BiPSettings(density=0.3, gamma=0.5, score_lr=0.7, score_momentum=0.0)
    rule = BiP(model, torch.optim.SGD(model.parameters(), lr=0.0), settings)
    before, masks = {name: s.clone() for name, s in rule.scores.items()}, kept(rule)
    x, y = batch(1)
    rule.step(batch(0), (x, y))
    h = 1e-5
    for name, score in rule.scores.items():
        theta = rule.theta[name]
        for index in [(0, 0), (1, 2), (2, 1)]:

            def loss(shift: float, name: str = name, index: tuple[int, int] = index) -> float:
                w = {n: masks[n] * rule.theta[n] for n in masks}
                w[name][index] += shift
                dense = nn.Sequential(
                    nn.Flatten(), nn.Linear(256, 3), nn.Softplus(), nn.Linear(3, 5)
                ).double()
                rest = {n: p.detach() for n, p in model.named_parameters()}
                return F.cross_entropy(torch.func.functional_call(dense, rest | w, (x,)), y).item()

            g = (loss(h) - loss(-h)) / (2 * h)
            want = before[name][index] - 0.7 * (theta[index] - 2 * masks[name][index] * g) * g
            torch.testing.assert_close(score[index], want, rtol=1e-7, atol=1e-9)


def test_the_implicit_term_matters() -> None:
    scores = []
    for gamma in (0.5, math.inf):
        rule = bip(conv_net(), gamma=gamma)
        rule.step(batch(0), batch(1))
        scores.append(torch.cat([s.flatten() for s in rule.scores.values()]))
    assert (scores[0] - scores[1]).norm() > 1e-3 * scores[1].norm()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"density": 0.13}, None),
        ({"density": 0.13, "scope": "layer"}, lambda m: round(0.13 * m.numel())),
        ({"granularity": "filter", "density": 0.5}, lambda m: round(0.5 * m.shape[0]) * m[0].numel()),
        ({"granularity": "channel", "density": 0.3}, lambda m: round(0.3 * m.shape[1]) * m[:, 0].numel()),
        ({"granularity": "1:2", "density": 0.5}, lambda m: m.numel() // 2),
        ({"granularity": "2:4", "density": 0.5}, lambda m: m.numel() // 2),
    ],
)
@pytest.mark.parametrize("mode", ["paper", "released"])
def test_each_granularity_keeps_its_exact_count(
    settings: dict[str, Any], count: Callable[[Tensor], int] | None, mode: Any
) -> None:
    rule = bip(conv_net(), mode=mode, score_lr=3.0, **settings)
    changed = 0.0
    for seed in range(3):
        masks = kept(rule)
        if count is None:
            total = sum(m.numel() for m in masks.values())
            assert sum(int(m.sum()) for m in masks.values()) == round(0.13 * total)
        else:
            pruned = {
                name: m for name, m in masks.items() if name not in WHOLE.get(rule.settings.granularity, ())
            }
            assert len(pruned) >= 2
            assert all(int(m.sum()) == count(m) for m in pruned.values())
            assert all(bool(masks[name].all()) for name in masks.keys() - pruned.keys())
        changed += float(rule.step(batch(seed), batch(9 + seed)).metrics["changed"])
    # Filters and channels are few, and may keep their order.
    assert changed > 0 or settings.get("granularity") in ("filter", "channel")


def test_weights_that_require_no_grad_stay_dense() -> None:
    model = conv_net()
    model[3].weight.requires_grad_(False)
    assert list(masks_of(bip(model).model)) == ["0.weight", "7.weight"]
    assert type(model[3]) is nn.Conv2d


def test_n_of_m_holds_in_each_group_of_inputs() -> None:
    for name, mask in kept(bip(conv_net(), granularity="1:4", density=0.25)).items():
        if name in WHOLE["1:4"]:
            continue
        groups = mask.transpose(0, 1).flatten(1).view(mask.shape[1] // 4, 4, -1)
        assert (groups.sum(1) == 1).all()


def test_scores_start_from_scaled_magnitudes_of_their_own() -> None:
    model = conv_net()
    with torch.no_grad():
        model[3].weight.zero_()
    theta = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"'3\.weight' keeps no weight"):
        rule = bip(model)
    want = math.sqrt(6 / 36) * theta.abs() / theta.abs().max()
    torch.testing.assert_close(rule.scores["0.weight"], want)
    assert (rule.scores["3.weight"] == 0).all()
    released = bip(conv_net(), mode="released")
    assert torch.equal(released.scores["0.weight"], conv_net()[0].weight)


def test_a_sparse_model_may_come_in() -> None:
    model = bip(conv_net(), density=0.5).model
    layers = [m for m in model.modules() if isinstance(m, MaskedConv2d | MaskedLinear)]
    rule = bip(model, density=0.2)
    assert [m for m in model.modules() if isinstance(m, MaskedConv2d | MaskedLinear)] == layers
    total = sum(m.numel() for m in kept(rule).values())
    assert sum(m.kept for m in masks_of(model).values()) == round(0.2 * total)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_two_forwards_and_two_backwards(mode: Any) -> None:
    calls: Counter[str] = Counter()
    model = conv_net()
    model.register_forward_hook(lambda *_: calls.update(["forward"]))
    rule = bip(model, mode=mode)

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        logits.register_hook(lambda _: calls.update(["backward"]))
        return F.cross_entropy(logits, y), logits

    rule.loss_fn = loss_fn
    rule.step(batch(0), batch(1))
    assert calls == {"forward": 2, "backward": 2}


def test_the_upper_level_leaves_other_parameters_and_their_gradients_alone() -> None:
    model, twin = conv_net(), conv_net()
    rule, other = bip(model), bip(twin)
    rule.step(batch(0), batch(1))
    other.step(batch(0), batch(2))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p.grad, q.grad), name
    assert any(not torch.equal(s, other.scores[name]) for name, s in rule.scores.items())
    assert not any(getattr(m, "dense_grad", False) for m in model.modules())


def test_the_lower_level_uses_kept_gradients_only() -> None:
    rule = bip(conv_net())
    masks = kept(rule)
    rule.step(batch(0), batch(1))
    for name, mask in masks.items():
        grad = rule.model.get_parameter(name).grad
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).any()


def test_layers_go_back_to_sparse_gradients_after_an_error() -> None:
    rule = bip(conv_net())

    def broken(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if model[0].dense_grad:
            raise RuntimeError("broken")
        return cross_entropy(model, x, y)

    rule.loss_fn = broken
    with pytest.raises(RuntimeError, match="broken"):
        rule.step(batch(0), batch(1))
    assert not any(getattr(m, "dense_grad", False) for m in rule.model.modules())


def test_an_unused_layer_has_no_gradient() -> None:
    model = conv_net()
    model.add_module("unused", nn.Linear(7, 7).double())
    rule = bip(model, lambda m, x, y: cross_entropy(m[:8], x, y), score_momentum=0.0)
    before = rule.scores["unused.weight"].clone()
    rule.step(batch(0), batch(1))
    assert torch.equal(rule.scores["unused.weight"], before)


def test_any_loss_robust_pruning_learns_from_its_attack() -> None:
    """On adversarial examples, made anew in each pass, the robust loss falls."""

    def robust(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy(model, PGD(model, eps=0.05, step_size=0.03, steps=2)(x, y), y)

    torch.manual_seed(0)
    model = conv_net(dtype=torch.float32)
    rule = bip(model, robust, density=0.3)
    batches = batch(0, torch.float32, 40), batch(0, torch.float32, 40)
    losses = [rule.step(*batches) for _ in range(30)]
    first, last = losses[0], losses[-1]
    assert last.loss < 0.8 * first.loss
    assert last.metrics["upper_loss"] < 0.8 * first.metrics["upper_loss"]
    clean = cross_entropy(model.eval(), *batches[0])[0]
    attacked = robust(model, *batches[0])[0]
    assert attacked > clean


def test_a_training_on_digits_prunes_and_learns() -> None:
    splits = data.load("digits")
    torch.manual_seed(0)
    model = models.build("small_cnn", num_classes=10, in_channels=1, width=8)
    rule = BiP(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), BiPSettings(density=0.2))
    lower, upper = (data.Batches(splits.train, 128, shuffle=True, seed=seed) for seed in (0, 1))
    records = []
    for epoch in range(5):
        steps = [rule.step(*b) for b in zip(lower.epoch(epoch), upper.epoch(epoch), strict=True)]
        records.append(torch.stack([torch.stack([s.loss, s.metrics["upper_loss"]]) for s in steps]).mean(0))
    assert (records[-1] < 0.4 * records[0]).all()
    images, labels = next(iter(data.Batches(splits.test, 360)))
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.85
    total = sum(m.numel() for m in kept(rule).values())
    assert sum(m.kept for m in masks_of(model).values()) == round(0.2 * total)


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_state_brings_a_rule_back_bit_for_bit(mode: Any) -> None:
    rule = bip(conv_net(), mode=mode)
    for seed in range(2):
        rule.step(batch(seed), batch(10 + seed))
    torch.manual_seed(7)
    model = conv_net()
    for p in model.parameters():
        nn.init.normal_(p)
    other = bip(model, mode=mode)
    other.model.load_state_dict(rule.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(rule.optimizer.state_dict()))
    other.load_state_dict(rule.state_dict())
    for _ in range(2):
        results = [r.step(batch(5), batch(6)) for r in (rule, other)]
        assert torch.equal(results[0].loss, results[1].loss)
    for name, tensor in rule.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert all(torch.equal(s, other.scores[name]) for name, s in rule.scores.items())


def test_state_of_another_model_is_refused_and_changes_nothing() -> None:
    rule = bip(conv_net())
    before = {name: s.clone() for name, s in rule.scores.items()}
    other = bip(nn.Sequential(nn.Linear(3, 2)).double()).state_dict()
    with pytest.raises(ValueError, match=r"state is of other layers: scores of .*0\.weight.*\(2, 3\)"):
        rule.load_state_dict(other)
    older = {part: tensors for part, tensors in rule.state_dict().items() if part != "theta"}
    with pytest.raises(ValueError, match=r"state is of other layers: theta of \{\}"):
        rule.load_state_dict(older)
    with pytest.raises(ValueError, match=r"state is of other layers: momentum of \{\}"):
        rule.load_state_dict({"scores": rule.state_dict()["scores"], "momentum": {}})
    assert all(torch.equal(s, before[name]) for name, s in rule.scores.items())


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\]"),
        ({"density": math.nan}, ValueError, "density must be .* got nan"),
        ({"density": "0.1"}, TypeError, "density must be .* got '0.1'"),
        (
            {"density": 0.1, "granularity": "2:4"},
            ValueError,
            "density must be 0.5 for granularity 2:4, got 0.1",
        ),
        (
            {"granularity": "filters"},
            ValueError,
            "granularity must be one of 'weight'.*did you mean 'filter'",
        ),
        ({"granularity": "n:m"}, ValueError, "granularity must be one of|granularity n:m"),
        ({"granularity": "5:4"}, ValueError, "granularity must be n:m with 1 <= n <= m, got 5:4"),
        ({"granularity": "0:4"}, ValueError, "granularity must be n:m with 1 <= n <= m"),
        ({"scope": "model"}, ValueError, "scope must be one of 'global', 'layer', got 'model'"),
        ({"mode": "release"}, ValueError, "mode must be one of .*did you mean 'released'"),
        ({"gamma": 0.0}, ValueError, "gamma must be a number > 0"),
        ({"score_lr": -0.1}, ValueError, "score_lr must be a finite number >= 0"),
        ({"score_lr": None}, TypeError, "score_lr must be a finite number >= 0, got None"),
        ({"score_momentum": 1.0}, ValueError, r"score_momentum must be a number in \[0, 1\)"),
        ({"score_weight_decay": math.inf}, ValueError, "score_weight_decay must be a finite number >= 0"),
    ],
)
def test_wrong_settings_are_named(setting: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BiPSettings(**setting)


def test_settings_fill_in_the_modes_defaults() -> None:
    assert BiPSettings().implicit_gamma == 1.0
    assert BiPSettings(mode="released").implicit_gamma == 1e4


def test_models_that_cannot_be_pruned_are_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match=r"nn\.Linear or nn\.Conv2d to prune, got ReLU"):
        BiP(nn.ReLU(), sgd(conv_net()), BiPSettings())
    linear = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="2:4 needs a layer with a multiple of 4 input channels"):
        bip(linear, granularity="2:4", density=0.5)
    frozen = nn.Sequential(nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="a layer to prune whose weight requires grad, got none"):
        BiP(frozen, sgd(conv_net()), BiPSettings())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(
        ValueError, match=r"'0\.weight' and 1 more is shared between '0' and '1'; untie it first"
    ):
        bip(tied)
    broken = conv_net()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"scores of '3\.weight' must be finite"):
        bip(broken)
    assert all(
        type(m) in (nn.Linear, nn.Conv2d, nn.Sequential) for m in (*linear, *frozen, *tied, broken, broken[3])
    )


def test_wrong_arguments_are_named() -> None:
    model = conv_net()
    with pytest.raises(TypeError, match="model must be of type Module, got str"):
        BiP("net", sgd(model), BiPSettings())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="settings must be of type BiPSettings, got dict"):
        BiP(model, sgd(model), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_wrong_batches_are_named_before_anything_is_learned(side: str) -> None:
    rule = bip(conv_net())
    before = {name: t.clone() for name, t in rule.model.state_dict().items()}
    x, y = batch(0)
    pair = f"{side}: a batch must be a pair (x, y), in which x may be a tuple or mapping, or a mapping, got "
    for error, message, wrong in (
        (TypeError, f"{pair}Tensor", x),
        (TypeError, f"{pair}tuple of 1", (x,)),
        (TypeError, f"{pair}tuple of 3", (x, x, y)),
        (TypeError, f"{side}: x must be a tensor, or a tuple or mapping of tensors, got int", (3, y)),
        (
            ValueError,
            f"{side}: x must be a batch, [N, ...] with N >= 1, got shape (0, 4, 8, 8)",
            (x[:0], y[:0]),
        ),
        (ValueError, f"{side}: y must have 8 samples to fit x, got shape (7,)", (x, y[:7])),
    ):
        batches = {"lower": (x, y), "upper": (x, y)} | {side: wrong}
        with pytest.raises(error, match=re.escape(message)):
            rule.step(**batches)  # type: ignore[arg-type]
    assert all(torch.equal(t, before[name]) for name, t in rule.model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_longer_finite_stop_the_run(value: float) -> None:
    rule = bip(conv_net())
    masks = kept(rule)
    rule.scores["3.weight"][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"scores of '3\.weight' must be finite"):
        rule.step(batch(0), batch(1))
    assert all(torch.equal(mask, masks[name]) for name, mask in kept(rule).items())


# ---- Mixed precision


@pytest.mark.parametrize("implicit", ["bilinear", "cg"])
def test_bfloat16_agrees_with_float32(implicit: str) -> None:
    """Weights, scores and results stay float32; an autocast around the step changes nothing."""
    batches = batch(1, torch.float32, n=32), batch(2, torch.float32, n=32)
    moves, results = {}, {}
    for name, precision, surrounded in (
        ("fp32", "fp32", True),
        ("bf16", "bf16", False),
        ("in", "bf16", True),
    ):
        rule = bip(conv_net(dtype=torch.float32), precision=precision, implicit=implicit)
        before = [t.detach().clone() for t in (*rule.model.parameters(), *rule.scores.values())]
        with torch.autocast("cpu", torch.bfloat16, enabled=surrounded):
            results[name] = rule.step(*batches)
        after = [*rule.model.parameters(), *rule.scores.values()]
        assert {t.dtype for t in after} == {torch.float32}
        moves[name] = torch.cat([(a - b).detach().flatten() for a, b in zip(after, before, strict=True)])
    for result in results.values():
        assert result.loss.dtype == result.logits.dtype == torch.float32
    assert torch.equal(moves["in"], moves["bf16"])
    assert not torch.equal(moves["bf16"], moves["fp32"])
    assert F.cosine_similarity(moves["bf16"], moves["fp32"], dim=0) > 0.98
    with pytest.raises(ValueError, match="precision must be one of 'fp32', 'bf16', got 'fp16'"):
        BiPSettings(density=0.3, precision="fp16")

import dataclasses

import pytest
import torch
from attack_twins import images, small_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from blokern.attack import APGD, FGSM, PGD, Evaluation, evaluate
from blokern.attack.losses import correct


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def loader(net):
    return DataLoader(TensorDataset(*images(net, n=50, wrong=0.2)), batch_size=16)


def noise(x, y):
    return (x + 0.01).clamp(0, 1)


def test_counts(net, loader):
    result = evaluate(net, loader, noise)
    x, y = loader.dataset.tensors
    sound = correct(net(x), y)
    held = sound & correct(net(noise(x, y)), y)
    assert result.samples == 50
    assert result.clean_accuracy == float(sound.double().mean())
    assert result.robust_accuracy == float(held.double().mean())
    assert result.per_attack == {"noise": result.robust_accuracy}
    assert result.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.samples = 1


def test_default_is_pgd_50_10_with_steps_of_a_quarter(net, loader):
    default = evaluate(net, loader, eps=3 / 255, generator=torch.Generator().manual_seed(0))
    pgd = PGD(
        net,
        3 / 255,
        0.75 / 255,
        50,
        restarts=10,
        early_stop=True,
        generator=torch.Generator().manual_seed(0),
    )
    spelt = evaluate(net, loader, pgd)
    assert list(default.per_attack) == ["PGD-50-10"]
    assert 0 < default.robust_accuracy < default.clean_accuracy == 0.8
    assert dataclasses.replace(default, seconds=0) == dataclasses.replace(spelt, seconds=0)


def test_no_attack_is_standard_accuracy(net, loader):
    result = evaluate(net, loader, {})
    assert result.per_attack == {}
    assert result.robust_accuracy == result.clean_accuracy == evaluate(net, loader).clean_accuracy
    assert str(result).startswith(f"SA {result.clean_accuracy:.2%}; ")


def test_several_attacks_count_the_worst_case(net, loader):
    fallen = {"a": set(), "b": set()}
    x, _ = loader.dataset.tensors

    def spoil(name, which):
        def attack(x_some, y):
            flip = torch.tensor([bool(which(int((x == one).flatten(1).all(1).nonzero()))) for one in x_some])
            fallen[name].update(flip.nonzero().squeeze(1).tolist())
            return torch.where(flip.view(-1, 1, 1, 1), _misleading(net, x_some, y), x_some)

        return attack

    result = evaluate(
        net, loader, {"a": spoil("a", lambda i: i % 4 == 0), "b": spoil("b", lambda i: i % 4 == 1)}
    )
    each = list(result.per_attack.values())
    assert result.clean_accuracy - result.robust_accuracy == pytest.approx(sum(0.8 - e for e in each))
    assert 0 < result.robust_accuracy < min(each)


def _misleading(net, x, y):
    """Far points of another class."""
    return PGD(net, 1.0, 0.1, 30)(x, y)


def test_only_the_correctly_classified_are_attacked(net, loader):
    sizes = []

    def attack(x, y):
        assert correct(net(x), y).all()
        sizes.append(len(x))
        return x

    result = evaluate(net, loader, attack)
    assert sum(sizes) == 40
    assert result.robust_accuracy == result.clean_accuracy == 0.8
    x, y = images(net, n=8)
    hopeless = evaluate(net, [(x, (y + 1) % 6)], attack)
    assert (hopeless.clean_accuracy, hopeless.robust_accuracy) == (0.0, 0.0)
    assert len(sizes) == 4  # not called on nobody


def test_model_is_in_eval_mode_frozen_and_restored(net, loader):
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]

    def attack(x, y):
        assert torch.is_grad_enabled()
        assert not any(p.requires_grad for p in net.parameters())
        net.train()  # a careless attack
        return x

    with torch.no_grad():
        result = evaluate(net, loader, attack)
    assert result.robust_accuracy == result.clean_accuracy  # judged in eval mode all the same: no dropout
    assert before == ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])


def test_inference_mode_and_autocast(loader):
    net = small_net(dtype=torch.float32)
    batches = [(x.float(), y) for x, y in loader]
    with torch.inference_mode():
        a = evaluate(net, batches, FGSM(net, 2 / 255))
    b = evaluate(net, batches, FGSM(net, 2 / 255))
    assert a.robust_accuracy == b.robust_accuracy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(net, batches, FGSM(net, 2 / 255))
        net(batches[0][0]).sum().backward()  # autocast's weight cache still has gradients
    assert all(p.grad is not None for p in net.parameters())


def test_progress(net, loader):
    calls = []
    evaluate(net, loader, noise, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    calls.clear()
    evaluate(
        net, (batch for batch in loader), noise, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (4, None)


def test_prints(net, loader):
    text = str(Evaluation(0.8239, 0.4549, {"PGD-50-10": 0.4549}, 10000, 12.34))
    assert text == "SA 82.39%, RA 45.49% (PGD-50-10 45.49%); 10000 samples in 12.3 s"


@pytest.mark.parametrize(
    ("attack", "settings", "error", "message"),
    [
        (lambda x, y: x[:-1], {}, ValueError, "attack 'bad' returned shape"),
        (lambda x, y: x.numpy(), {}, TypeError, "attack 'bad' must return a tensor, got ndarray"),
        (lambda x, y: x * torch.nan, {}, ValueError, r"attack 'bad' left the box .* values in \[nan"),
        (lambda x, y: x + 0.5, {}, ValueError, "attack 'bad' left the box"),
        (
            lambda x, y: 1 - x,
            {"eps": 8 / 255},
            ValueError,
            "left the linf ball of radius 0.031372549: distance",
        ),
        (lambda x, y: 1 - x, {"eps": 0.5, "norm": "l2"}, ValueError, "left the l2 ball"),
        (lambda x, y: 1 - x, {"eps": 5.0, "norm": "l1"}, ValueError, "left the l1 ball"),
        ("pgd", {}, TypeError, "attack 'bad' must be a callable"),
    ],
)
def test_bad_attacks_are_named(net, loader, attack, settings, error, message):
    with pytest.raises(error, match=message):
        evaluate(net, loader, {"bad": attack}, **settings)


def test_check_false_and_tolerance(net, loader):
    evaluate(net, loader, lambda x, y: 1 - x, eps=8 / 255, check=False)
    evaluate(net, loader, lambda x, y: (x + 8 / 255 + 5e-5).clamp(0, 1), eps=8 / 255)


def test_wrong_calls(net, loader):
    x, y = images(net, n=4)
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(net, [])
    with pytest.raises(ValueError, match="attack 'PGD-10' is targeted"):
        evaluate(net, loader, PGD(net, targeted=True))
    with pytest.raises(TypeError, match=r"loader must give batches \(x, y\), got Tensor"):
        evaluate(net, [x])
    with pytest.raises(ValueError, match="x must lie in"):
        evaluate(net, [(3 * x, y)])
    with pytest.raises(ValueError, match="y holds label 6, but the model has 6 classes"):
        evaluate(net, [(x, torch.full_like(y, 6))])
    with pytest.raises(ValueError, match="did you mean 'linf'"):
        evaluate(net, loader, norm="inf")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        evaluate(net.forward, loader)


def test_models_without_parameters():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    x = torch.rand(6, 3, 4, 4)
    result = evaluate(Mean(), [(x, x.mean((2, 3)).argmax(1))], APGD(Mean(), 0.5, 5))
    assert (result.clean_accuracy, result.robust_accuracy) == (1.0, 0.0)

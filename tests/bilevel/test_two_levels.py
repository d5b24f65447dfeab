"""The trainer with a rule that takes two batches, keeps scores and changes masks."""

import signal
from dataclasses import replace

import pytest
import torch
from runs import BATCHES, SETTINGS, SPLITS, assert_same_run, make, state

from blokern.bilevel import BiP, BiPSettings, Interrupted
from blokern.sparse import masks_of

pytestmark = pytest.mark.usefixtures("no_pictures")


def make_bip(run_dir, mode="paper", rule=BiP, **options):
    method = BiPSettings(density=0.3, mode=mode, score_lr=2.0)
    return make(run_dir, rule, method, options.pop("settings", SETTINGS), width=4, **options)


def test_the_second_batch_is_of_the_same_images_in_another_order(tmp_path):
    seen = []

    class Watching(BiP):
        def step(self, lower, upper):
            seen.append((lower, upper))
            return super().step(lower, upper)

    settings = replace(SETTINGS, epochs=2, augment=False)
    make_bip(tmp_path, rule=Watching, settings=settings).fit()
    assert len(seen) == 2 * BATCHES
    train = {image.numpy().tobytes() for image in (SPLITS.train.images.float() / 255)}
    images = [torch.cat([pair[level][0] for pair in seen]) for level in (0, 1)]
    for level in images:
        assert {image.numpy().tobytes() for image in level} <= train
    for lower, upper in seen:
        assert not torch.equal(lower[0], upper[0])
    assert not torch.equal(images[1][: 16 * BATCHES], images[1][16 * BATCHES :])  # a new order each epoch


def test_the_scores_rate_falls_at_a_half_and_at_three_quarters(tmp_path):
    rates = []

    class Watching(BiP):
        def step(self, lower, upper):
            rates.append(self.score_lr)
            return super().step(lower, upper)

    make_bip(tmp_path, rule=Watching, settings=replace(SETTINGS, epochs=4)).fit()
    half, quarter = 2 * BATCHES, BATCHES
    assert rates == pytest.approx([2.0] * half + [0.2] * quarter + [0.02] * quarter)


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("step", [2, BATCHES, 2 * BATCHES + 1])
def test_a_resumed_bip_has_the_same_bits(tmp_path, mode, step):
    class Stopping(BiP):
        steps = 0

        def step(self, lower, upper):
            self.steps += 1
            if self.steps == step:
                signal.raise_signal(signal.SIGINT)
            return super().step(lower, upper)

    Stopping.__name__ = "BiP"
    make_bip(tmp_path / "whole", mode).fit()
    with pytest.raises(Interrupted):
        make_bip(tmp_path / "parts", mode, Stopping).fit()
    make_bip(tmp_path / "parts", mode, resume=True, seed=99).fit()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    saved = state(tmp_path / "whole")
    assert any(name.endswith("mask_words") for name in saved["model"])
    assert saved["rule"]["momentum"].keys() == masks_of(make_bip(tmp_path / "new").rule.model).keys()
    assert any(record["changed"] > 0 for record in saved["history"])


def test_bip_in_channels_last_runs_and_resumes(tmp_path):
    settings = replace(SETTINGS, channels_last=True, epochs=1)
    for mode in ("paper", "released"):
        make_bip(tmp_path / mode, mode, settings=settings).fit()
        trainer = make_bip(tmp_path / mode, mode, settings=settings, resume=True)
        assert trainer.complete
        saved, rule = state(tmp_path / mode), trainer.rule
        assert all(torch.equal(t, saved["model"][name]) for name, t in rule.model.state_dict().items())
        assert all(torch.equal(s, saved["rule"]["scores"].get(name, s)) for name, s in rule.scores.items())

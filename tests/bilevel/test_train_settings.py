import math

import pytest

from blokern.bilevel import TrainSettings


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"val_steps": -1}, ValueError, "val_steps must be at least 0, got -1"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
        ({"schedule": "cos"}, ValueError, "schedule must be one of 'cyclic'"),
        ({"momentum": 1.0}, ValueError, "momentum must be in"),
        ({"momentum": 0.05, "cycle_momentum": True}, ValueError, r"momentum must be in \[0.1, 1\), got 0.05"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
        ({"eps": 0.0}, ValueError, r"eps must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_wrong_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        TrainSettings(**change)

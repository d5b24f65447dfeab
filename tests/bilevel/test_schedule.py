from itertools import pairwise

import pytest

from blokern.bilevel.schedule import SCHEDULES, constant, cosine, cyclic, learning_rate, momentum, multistep


def test_cyclic_is_a_triangle_with_its_peak_in_the_middle():
    rates = [learning_rate(step, 8, peak=0.2, schedule="cyclic") for step in range(9)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05, 0])


def test_multistep_falls_exactly_at_half_and_three_quarters():
    rates = [learning_rate(step, 8, peak=1.0, schedule="multistep") for step in range(8)]
    assert rates == [1.0] * 4 + [0.1] * 2 + [0.01] * 2


@pytest.mark.parametrize("total", [1, 3, 7, 1000, 999_983])
def test_multistep_boundaries_hold_for_totals_that_do_not_divide(total):
    for step in {0, total // 2, (total + 1) // 2, 3 * total // 4, -(-3 * total // 4), total}:
        expected = 1.0 if 2 * step < total else 0.1 if 4 * step < 3 * total else 0.01
        assert multistep(step / total) == expected


def test_cosine_falls_from_peak_to_zero():
    rates = [learning_rate(step, 4, peak=0.2, schedule="cosine") for step in range(5)]
    assert rates == pytest.approx([0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5, 0.0])
    assert cosine(1.0) == 0.0


def test_constant_stays():
    assert {learning_rate(step, 5, peak=0.3, schedule="constant") for step in range(6)} == {0.3}
    assert constant(0.5) == 1.0


def test_momentum_dips_where_the_rate_peaks_only_when_asked():
    cycled = [momentum(step, 4, base=0.9, cycle=True) for step in range(5)]
    assert cycled == pytest.approx([0.9, 0.85, 0.8, 0.85, 0.9])
    assert momentum(2, 4, base=0.9) == 0.9


def test_every_schedule_stays_within_zero_and_peak():
    for name in SCHEDULES:
        rates = [learning_rate(step, 100, peak=1.0, schedule=name) for step in range(101)]
        assert all(0 <= rate <= 1 for rate in rates)
    assert all(a < b for a, b in pairwise(cyclic(p / 10) for p in range(6)))


@pytest.mark.parametrize(
    ("step", "total", "schedule", "message"),
    [
        (0, 10, "cos", "schedule must be one of 'cyclic', 'multistep', 'cosine', 'constant', got 'cos'"),
        (11, 10, "cyclic", r"step must be in \[0, 10\], got 11"),
        (-1, 10, "cyclic", "got -1"),
        (0, 0, "cyclic", "total must be at least 1, got 0"),
    ],
)
def test_wrong_calls_name_the_argument(step, total, schedule, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(step, total, peak=1.0, schedule=schedule)

"""The plateau rule and the learning-rate schedule against traces worked out by hand."""

import math

import pytest

from etude.practice.trigger import Plateau, ScheduleConfig, TriggerConfig


def test_plateau_follows_a_trace_worked_out_by_hand() -> None:
    config = TriggerConfig(evaluate_every=1, patience=2, patience_growth=1)
    plateau = Plateau()
    # accuracy, T after the look, Tmax at the look, asks for a round
    trace = [
        (0.10, 0, 2, False),
        (0.30, 0, 2, False),
        (0.30, 1, 2, False),  # equal is no improvement
        (0.29, 2, 2, True),
        (0.30, 1, 3, False),  # the best, 0.30, survived the round; T did not
        (0.31, 0, 3, False),
        (0.20, 1, 3, False),
        (0.20, 2, 3, False),
        (0.20, 3, 3, True),
        (0.20, 1, 4, False),
        (0.20, 2, 4, False),
        (0.20, 3, 4, False),
        (0.20, 4, 4, True),
    ]
    for look, (accuracy, waited, patience, asks) in enumerate(trace):
        assert plateau.patience(config) == patience, look
        assert plateau.observe(accuracy, config) is asks, look
        assert plateau.waited == waited, look
        if asks:
            plateau.add_round(config)
    assert plateau == Plateau(best=0.31, waited=0, rounds=3)


def test_fractional_growth_and_minimal_improvement() -> None:
    config = TriggerConfig(evaluate_every=1, patience=1, patience_growth=0.5, min_delta=0.05)
    plateau = Plateau()
    assert not plateau.observe(0.0, config)  # the first look always sets the best
    assert plateau.observe(0.05, config)  # 0.05 is not above 0.00 + 0.05
    plateau.add_round(config)
    assert not plateau.observe(0.04, config)  # Tmax is 1.5 now: one look is not enough
    assert plateau.observe(0.04, config)


def test_a_round_that_may_not_be_added_is_asked_for_again() -> None:
    config = TriggerConfig(evaluate_every=1, patience=1, patience_growth=0)
    plateau = Plateau()
    plateau.observe(0.5, config)
    assert [plateau.observe(0.4, config) for _ in range(3)] == [True, True, True]


def test_warm_up_stable_decay_values() -> None:
    schedule = ScheduleConfig(steps=100)
    assert (schedule.warmup_steps, schedule.cooldown_start) == (10, 80)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[85] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.95)))
    assert min(rates) > 0
    assert schedule.may_add(79) and not schedule.may_add(80) and not schedule.may_add(100)

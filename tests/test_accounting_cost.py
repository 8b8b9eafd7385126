"""What is stated: exact for one Gaussian, never below the truth, refused where it may not hold."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootnoise import RootnoiseError, accounting
from rootnoise.accounting import gaussian
from rootnoise.causal import Toeplitz
from rootnoise.cli import main
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSepPoisson
from rootnoise.participation import SingleParticipation as Single
from rootnoise.workload import prefix_sum


def exact_log_delta(sigma: float, epsilon: float) -> mpmath.mpf:
    with mpmath.workdps(90):
        mu, e = 1 / mpmath.mpf(sigma), mpmath.mpf(epsilon)
        a = e / mu - mu / 2
        tail = [mpmath.erfc(x / mpmath.sqrt(2)) / 2 for x in (a, a + mu)]
        return mpmath.log(tail[0] - mpmath.exp(e) * tail[1])


@given(st.floats(-20, 6), st.floats(-30, -0.31))
def test_gaussian_calibration_is_on_the_private_side_at_every_epsilon(log_epsilon, log_delta):
    epsilon, delta = 10**log_epsilon, 10**log_delta
    excess = exact_log_delta(gaussian.gaussian_multiplier(epsilon, delta), epsilon)
    assert -1e-7 < excess - mpmath.log(delta) <= 0


@given(st.floats(-2, 10), st.floats(-40, -0.31))
def test_gaussian_epsilon_is_on_the_private_side(log_sigma, log_delta):
    sigma, delta = 10**log_sigma, 10**log_delta
    epsilon = gaussian.gaussian_epsilon(sigma, delta)
    excess = exact_log_delta(sigma, epsilon) - mpmath.log(delta)
    assert excess <= 0
    assert epsilon == 0 or excess > -1e-9


@given(st.floats(1e-300, 1e300))
def test_shown_numbers_are_never_below_the_computed_ones(value):
    for digits in (6, 9):
        assert (
            value <= float(accounting.round_up(value, digits)) <= value * (1 + 10 ** (2 - digits))
        )


@given(st.floats(1e-290, 1e290))
def test_noise_is_never_shown_above_the_computed_one(value):
    shown = float(accounting.round_down(value))
    assert value * (1 - 1e-8) <= shown <= value * (1 + 2e-12)
    assert float(accounting.exactly(value)) == value


def test_methods_say_what_was_done():
    def method(q, sigma):
        return accounting.privacy_cost(CyclicPoisson(1, q), 100, sigma, 1e-9).method

    alone = "analytic Gaussian of 100 rounds, not amplified, for independent noise"
    assert method(1.0, 20.0) == alone
    assert method(0.01, 2.0) == "PLD of 100 Poisson-subsampled Gaussians, for independent noise"
    # Below the finest grid the noise is that without amplification, and said to be.
    assert (
        method(0.01, accounting.noise_multiplier(CyclicPoisson(1, 0.01), 100, 1e-7, 1e-9)) == alone
    )


def account(capsys, line):
    status = main(["account", *line.split()])
    out, err = capsys.readouterr()
    return status, " ".join(out.replace("\u2502", " ").split()), err


def test_account_shows_numbers_on_the_private_side(capsys):
    _, out, _ = account(capsys, "--epsilon 1e-300 --delta 1e-5")
    assert "(1e-300, 1e-05)-differential" in out
    assert "epsilon 0" not in out
    _, out, _ = account(capsys, "--noise-multiplier 2.123456789012 --delta 1.0000004e-5")
    assert out.count("2.123456789012") == 2
    assert "1.0000004e-05)-differential" in out
    _, out, _ = account(capsys, "--epsilon 2 --delta 1e-5")
    needed = accounting.noise_multiplier(Single(), 1, 2.0, 1e-5)
    shown = out.split("noise multiplier ")[1].split()[0]
    assert needed <= float(shown) <= needed * (1 + 1e-8)


def test_account_refuses_bands_that_sampling_cannot_amplify(capsys, tmp_path):
    """Both ways, in one line: 12 bands, and one group that may be drawn at every step."""
    path = tmp_path / "mechanism.json"
    cycle = FixedCycle(12, 2)
    made = factorize(prefix_sum(24), cycle, "bsr", bands=12)
    Mechanism.calibrate(made, cycle, epsilon=2, delta=1e-5).save(path)
    for goal in ("--noise-multiplier 1", "--epsilon 1"):
        line = f"{goal} --delta 1e-5 --mechanism-file {path} --sampling-probability 0.01"
        status, out, err = account(capsys, line)
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "bands must be in [1, groups=1] under cyclic Poisson" in err
        assert "got 12" in err


BANDED = Toeplitz(np.ones(12), 24)


@pytest.mark.parametrize("ask", [accounting.privacy_cost, accounting.noise_multiplier])
@pytest.mark.parametrize(
    ("who", "n", "line"),
    [
        (CyclicPoisson(1, 0.01), 24, r"bands must be in \[1, groups=1\] under cyclic Poisson"),
        (MinSepPoisson(3, 0.01), 24, r"bands must be in \[1, min_sep=3\] under min-sep Poisson"),
        (CyclicPoisson(12, 0.01), 36, "strategy must have n_steps=36, got 24"),
        (FixedCycle(12, 3), 36, "strategy must have n_steps=36, got 24"),
        (BallsInBins(12, 3), 36, "strategy must have n_steps=36, got 24"),
        (Single(), 23, "strategy must have n_steps=23, got 24"),
        (Single(), 0, "n_steps must be >= 1, got 0"),
    ],
)
def test_every_entry_refuses_a_strategy_that_does_not_fit(ask, who, n, line):
    with pytest.raises(RootnoiseError, match=f"^{line}"):
        ask(who, n, 1.0, 1e-5, strategy=BANDED)


@pytest.mark.parametrize("ask", [accounting.privacy_cost, accounting.noise_multiplier])
def test_a_hundred_bands_are_not_amplified(ask):
    """They once got epsilon 0.718, where delta is 0.03 at epsilon 1."""
    wide = Toeplitz(np.ones(100), 100)
    with pytest.raises(RootnoiseError, match=r"^bands must be in \[1, groups=1\].*got 100"):
        ask(CyclicPoisson(1, 0.01), 100, 1.0, 1e-5, strategy=wide)


def test_what_is_assumed_of_a_missing_strategy_is_said():
    assert accounting.privacy_cost(CyclicPoisson(4, 0.1), 8, 2.0, 1e-5).method.endswith(
        ", for strategies of at most 4 bands"
    )
    assert accounting.privacy_cost(CyclicPoisson(1, 0.1), 8, 2.0, 1e-5).method.endswith(
        ", for independent noise"
    )


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: gaussian.gaussian_epsilon(1e-160, 1e-5), "noise_multiplier must be in .*1e-160"),
        (lambda: gaussian.gaussian_multiplier(1e300, 1e-5), "epsilon must have a .*got 1e\\+300"),
    ],
)
def test_beyond_the_floats(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_far_too_little_noise_is_answered_by_what_holds_anyway():
    found = gaussian.poisson_epsilon(0.01, 0.5, 10, 1e-5)
    assert found == pytest.approx(gaussian.gaussian_epsilon(0.01 / math.sqrt(10), 1e-5), rel=1e-9)
    sigma = gaussian.poisson_multiplier(1e13, 0.5, 10, 1e-5)
    assert gaussian.poisson_epsilon(sigma, 0.5, 10, 1e-5) <= 1e13

"""From the transform of a chain to its deltas: every error is paid for, and on the right side."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from scipy.stats import norm

from chain_cases import SMALL, gram_of, quadrature
from rootnoise.accounting import bin_chain as chains
from rootnoise.accounting import bin_series as series
from rootnoise.accounting.bin_chain import Chain
from rootnoise.accounting.bin_series import Law


@pytest.mark.parametrize("rough", [0.1, 0.3])
def test_what_is_smoothed_is_taken_back(monkeypatch, rough):
    """By r^2 times a density: what is above the truth without it is below it, and not by much."""
    for name in ("SMOOTHEST", "ROUGHEST"):
        monkeypatch.setattr(series, name, rough)
    exact = quadrature(SMALL[0], 0.5)[0]
    law = SMALL[0].law(math.exp(0.5), 1e-5, above=False)
    assert law.smooth == pytest.approx(rough * 2 * math.exp(0.5))
    put = quadrature_put(SMALL[0], math.exp(0.5))
    plain = replace(law, above=True, mean=1.0, lost=0.0).put(math.exp(0.5))
    assert plain > put * (1 + rough**2 / 20)
    assert put - 3 * (plain - put) - 1e-3 * put < law.put(math.exp(0.5)) < put
    assert law.remove(0.5) < exact * (1 + 3e-3)


def quadrature_put(chain: Chain, strike: float) -> float:
    """As remove is put + 1 - strike."""
    return quadrature(chain, math.log(strike))[0] + strike - 1


@pytest.mark.parametrize("strike", [0.6, 1.5, 3.0])
def test_one_series_gives_the_puts_of_a_log_normal(strike):
    """One mean, alone: the formula of Black and Scholes."""
    chain = Chain.plain(1, 0.9, 0.5)
    root = math.sqrt(0.9)
    d = (math.log(strike) + 0.45) / root
    exact = strike * norm.cdf(d) - norm.cdf(d - root)
    above = chain.law(strike, 1e-6, above=True).put(strike)
    below = chain.law(strike, 1e-6, above=False).put(strike)
    assert exact < above < exact * 1.01
    assert 0.99 * exact < below < exact
    for law_above in (True, False):
        law = chain.law(strike, 1e-6, above=law_above)
        assert law.put(0.0) == 0


def test_each_error_of_a_law_is_paid_for():
    chain, more, strike = Chain.plain(3, 0.5, 0.8, 0.5), 1e-4, 1.5
    above = chain.law(strike, 1e-5, above=True)
    below = chain.law(strike, 1e-5, above=False)
    for name, law, sign, least in (
        ("error", above, 1, strike / 4 * more),
        ("lost", above, 1, strike * more),
        ("error", below, -1, strike / 4 * more),
        ("beyond", below, -1, strike * more),
    ):
        rough = replace(law, **{name: getattr(law, name) + more})
        assert sign * (rough.put(strike) - law.put(strike)) >= 0.99 * least, name
    assert replace(below, lost=1.0).put(strike) == below.put(strike)
    assert 4 * 3 * math.exp(-0.5 * 2 * math.log(4 * 3 * strike / (chains.SPARE * 1e-5))) == (
        pytest.approx(above.lost, rel=1e-9)
    )


def test_what_lies_beyond_the_period_is_bounded():
    """By samples: three means seldom add up to more than so many times the largest strike."""
    chain = Chain.plain(3, 0.5, 0.8, 0.5)
    rng = np.random.default_rng(0)
    logs = rng.standard_normal((10**6, 3)) @ np.linalg.cholesky(gram_of(chain)).T - 0.5
    values = np.exp(logs)
    for room in (1.2, 2.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(series, "ROOMS", (room,))
            law = chain.law(1.5, 1e-5, above=False)
        assert law.period == pytest.approx(room * 4.5 + 2 * series.FAR * law.smooth)
        beyond = (values.max(axis=1) < 4.5) & (values.sum(axis=1) >= room * 4.5)
        assert 0 < beyond.mean() <= law.beyond < 1
    # The first period that costs a little part of delta, over the strike, is taken.
    law = chain.law(1.5, 1e-5, above=False)
    assert law.beyond <= 1e-3 * 1e-5 / 1.5
    # And a chain so strong that its sums overflow is bounded by a short one of the tilts, or by 1.
    strong = Chain.plain(3000, 20.0, 0.9)
    assert 0 < strong.law(1.5, 1e-5, chains.COARSE, above=False).beyond <= 1


def test_a_law_knows_its_mean_and_a_lower_bound_may_be_small(monkeypatch):
    chain = SMALL[0]
    assert chain.law(1.5, 1e-5, above=True).mean == chain._mean(1.0) < 1
    assert chain.law(1.5, 1e-5, above=False).mean == 1
    monkeypatch.setattr(Law, "remove", lambda self, epsilon: 1e-5 * (1.5 - 50 * epsilon))
    assert chain.lower(1e-5, 0.05) == pytest.approx(0.01, rel=0.02)


def test_rounding_is_paid_for_where_the_parts_of_a_term_cancel():
    """A wave that is long compared with the strike, to 40 digits."""
    law = SMALL[0].law(1.5, 1e-5, above=True)
    for w in (1e-2, 1e-4, 1e-6):
        one = replace(
            law,
            error=0.0,
            lost=0.0,
            waves=np.array([0.0, w, 1e9]),
            series=np.array([1.0, 0.7 + 0.2j, 0.0]),
        )
        with mpmath.workdps(40):
            k = mpmath.mpf(1.5) * 2
            u = k + series.FAR * mpmath.mpf(law.smooth)
            e = mpmath.expj(w * u)
            part = u * e / (1j * mpmath.mpf(w)) + (e - 1) / mpmath.mpf(w) ** 2
            term = mpmath.expj(-w * k) * part * mpmath.mpc(0.7, 0.2)
            exact = float((u * u / 2 + 2 * term.real) / (law.period * 2))
        assert exact <= one.put(1.5) <= exact + 1e-6 * max(1, 1e-9 / w)

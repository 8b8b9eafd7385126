"""Tuning: the epsilon of releasing the best trial, by proof, by another theorem, by attack.

Independent of the closed forms: the number of trials summed term by term, the best of them found by
brute force on small discrete trials, quadrature for continuous ones, dp-accounting for the papers'
theorems, and mpmath for the ratio.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import permutations

import mpmath
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, dp_event
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import chi2, norm, poisson

from rootnoise import accounting
from rootnoise._check import RootnoiseError
from rootnoise.accounting import Trials, tuned_noise_multiplier, tuned_privacy_cost
from rootnoise.accounting.gaussian import gaussian_delta, gaussian_epsilon
from rootnoise.accounting.selection import largest_log_ratio
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, SingleParticipation

ONCE = SingleParticipation()
DELTA = 1e-5
SHAPES = [0.0, 0.5, 1.0, 5.0, math.inf]
DISTRIBUTIONS = [Trials(mean, shape) for mean in (1.5, 10, 100) for shape in SHAPES]
SIGMAS = [0.4, 4.0]


def tuned(sigma, trials, delta=DELTA):
    return tuned_privacy_cost(ONCE, 20, sigma, delta, trials).epsilon


def by_sum(chance, trials, most=20_000):
    """Return E[chance^K], term by term."""
    k = np.arange(most + 1)
    return float((trials.probabilities(most) * chance**k).sum())


@pytest.mark.parametrize("trials", DISTRIBUTIONS, ids=str)
def test_the_number_of_trials_has_the_stated_distribution(trials):
    chances = trials.probabilities(20_000)
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    assert (chances * np.arange(20_001)).sum() == pytest.approx(trials.mean, rel=1e-9)
    if trials.shape == math.inf:
        assert chances[:50] == pytest.approx(poisson.pmf(np.arange(50), trials.mean))
        return
    assert chances[0] == 0
    gamma, eta = trials.gamma, trials.shape
    for k in (1, 2, 7):  # Papernot and Steinke (2022), Definition 1
        weight = (1 - gamma) ** k * math.prod((i + eta) / (i + 1) for i in range(k))
        if eta:
            weight /= gamma**-eta - 1
        else:
            weight = (1 - gamma) ** k / (k * math.log(1 / gamma))
        assert chances[k] == pytest.approx(weight, rel=1e-9)


def test_geometric_is_shape_one():
    chances = Trials(4.0, 1).probabilities(30)[1:]
    assert chances == pytest.approx(0.25 * 0.75 ** np.arange(30))


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_discrete_trials_by_brute_force(mu):
    """Outcomes of a Gaussian cut in five, in any order of merit; the best of K, summed over K.

    The chance that the best of k is y is P(all at most y) - P(all below y), and K is summed over.
    """
    cuts = [-np.inf, -1.5 * mu - 0.3, 0.0, mu, 2.2 * mu + 0.5, np.inf]
    without, with_ = np.diff(norm.cdf(cuts)), np.diff(norm.cdf(cuts, loc=mu))
    epsilons = (0.1, 0.5, 1.0, 3.0)
    for trials in (Trials(1.5, 0), Trials(3), Trials(3, 4.0), Trials(3, math.inf)):
        most = np.zeros(len(epsilons))
        for order in list(permutations(range(5)))[::8]:
            best = []
            for chances in (without, with_):
                up_to = np.minimum(np.append(0, np.cumsum(chances[list(order)])), 1)
                best.append(np.diff([by_sum(x, trials, 400) for x in up_to]))
            for a, b in (best, best[::-1]):
                found = [np.clip(a - math.exp(e) * b, 0, None).sum() for e in epsilons]
                most = np.maximum(most, found)
        for epsilon, delta in zip(epsilons, most, strict=True):
            if delta > 1e-12:
                assert tuned(1 / mu, trials, float(delta)) >= epsilon


def attack(sigma, trials, delta=DELTA):
    """Return the epsilon that an adversary who chose the scores reaches, by quadrature.

    Best of all is z > cut, which is likelier with the person by e^mu or so; next the lowest z,
    which are likelier without. Or the score is z itself.
    """
    mu, step = 1 / sigma, 2e-3
    z = np.arange(-9 - mu, 9 + mu, step)
    found = 0.0
    for cut in (math.inf, 1.0, 2.0, 3.0):
        best = []
        for shift in (0.0, mu):
            better = norm.cdf(z, shift) + norm.sf(cut, shift)
            top = z > cut
            better[top] = norm.sf(z[top], shift)
            best.append(norm.pdf(z, shift) * slope(1 - better, trials) * step)
        for a, b in (best, best[::-1]):

            def excess(e, a=a, b=b):
                return np.clip(a - math.exp(e) * b, 0, None).sum() - delta

            if excess(0) > 0:
                found = max(found, brentq(excess, 0, 200, xtol=1e-3) - 1e-3)
    return found


def slope(x, trials):
    """Return the derivative of E x^K."""
    if trials.shape == math.inf:
        return trials.mean * np.exp(trials.mean * (x - 1))
    g = trials.gamma
    return trials.mean * (g / (1 - (1 - g) * x)) ** (1 + trials.shape)


@pytest.mark.parametrize("trials", [Trials(3), Trials(50, 0.5), Trials(20, 5)], ids=str)
def test_the_slope_of_the_attack_is_that_of_the_sum(trials):
    for x in (0.2, 0.6, 0.9):
        near = (by_sum(x + 1e-5, trials) - by_sum(x - 1e-5, trials)) / 2e-5
        assert slope(x, trials) == pytest.approx(near, rel=1e-6)


@pytest.mark.parametrize("trials", DISTRIBUTIONS, ids=str)
def test_between_an_attack_and_the_papers_theorems(trials):
    """Never below what an adversary reaches; never above Theorems 2 and 6 of the paper."""
    orders = 1 + np.geomspace(1e-2, 3e3, 100)
    for sigma in SIGMAS:
        ours = tuned(sigma, trials)
        accountant = RdpAccountant(orders)
        one = GaussianDpEvent(sigma)
        accountant.compose(dp_event.RepeatAndSelectDpEvent(one, trials.mean, trials.shape))
        assert attack(sigma, trials) <= ours <= accountant.get_epsilon(DELTA) * (1 + 1e-9)


@pytest.mark.parametrize("trials", [Trials(10), Trials(10, 5.0), Trials(100), Trials(100, 0)])
def test_the_bound_is_not_far_from_the_attack(trials):
    """Within a third: so an epsilon that forgets a part of it would be below the attack."""
    for sigma in SIGMAS:
        assert tuned(sigma, trials) < 1.35 * attack(sigma, trials)


def test_poisson_by_hand():
    """Theorem 6 at one order, written out."""
    sigma, mean, order = 2.0, 10.0, 9.0
    near = math.log(1 + 1 / (order - 1))
    renyi = order / (2 * sigma**2) + mean * gaussian_delta(sigma, near)
    renyi += math.log(mean) / (order - 1)
    by_hand = renyi + math.log(1 - 1 / order) - math.log(DELTA * order) / (order - 1)
    ours = tuned(sigma, Trials(mean, math.inf))
    assert ours <= by_hand
    orders = 1 + np.geomspace(1e-3, 1e5, 1000)
    other = []
    for a in orders:
        e = math.log1p(1 / (a - 1))
        d = norm.cdf(0.5 / sigma - e * sigma) - math.exp(e) * norm.cdf(-0.5 / sigma - e * sigma)
        r = a / (2 * sigma**2) + mean * d + math.log(mean) / (a - 1)
        other.append(r + math.log(1 - 1 / a) - math.log(DELTA * a) / (a - 1))
    assert ours == pytest.approx(min(other), rel=1e-4)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_delta_of_the_gaussian_inverts_epsilon(sigma):
    for epsilon in (0.01, 0.3, 2.0, 8.0):
        delta = gaussian_delta(sigma, epsilon)
        closed = norm.cdf(0.5 / sigma - epsilon * sigma)
        closed -= math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
        assert delta == pytest.approx(closed, rel=1e-6, abs=1e-14)
        if delta > 1e-200:
            assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("offset", [1e-4, 0.1, 5.0])
@pytest.mark.parametrize("mu", [1e-3, 0.3, 2.0, 30.0])
def test_the_ratio_is_the_largest(offset, mu):
    """Against 30 digits at many places; above all of them, and by no more than the tolerance."""
    found = largest_log_ratio(offset, mu)

    def exactly(z):
        with mpmath.workdps(30):
            return float(mpmath.log((offset + mpmath.ncdf(z + mu)) / (offset + mpmath.ncdf(z))))

    places = np.linspace(-8 - mu, 4, 120)
    values = [exactly(z) for z in places]
    for _ in range(4):  # nearer and nearer to the largest
        at, gap = places[int(np.argmax(values))], places[1] - places[0]
        places = np.linspace(at - gap, at + gap, 41)
        values = [exactly(z) for z in places]
    assert max(values) <= found <= (1 + 6 * min(mu, 0.01)) * max(values) + 3e-7


def test_the_cost_says_what_it_rests_on():
    cost = tuned_privacy_cost(FixedCycle(10, 4), 40, 2.0, DELTA, Trials(10))
    assert (cost.exact, cost.mu, cost.rho) == (False, None, None)
    assert cost.method == (
        "private selection by privacy profiles, of trials that are one Gaussian mechanism; their "
        "number is truncated negative binomial of shape 1 and mean 10"
    )
    poisson_cost = tuned_privacy_cost(ONCE, 40, 2.0, DELTA, Trials(10, math.inf))
    assert poisson_cost.method.endswith("their number is Poisson of mean 10")


@pytest.mark.parametrize("trials", [Trials(1.01), Trials(3, 0.0), Trials(8), Trials(6, math.inf)])
def test_the_number_drawn_has_the_stated_distribution(trials):
    """Chi-square over the numbers that come often; seeded: only a wrong law fails."""
    rng = np.random.default_rng(5)
    draws = np.array(
        [trials.draw(lambda n: int.from_bytes(rng.bytes(n // 8))) for _ in range(4000)]
    )
    chances = trials.probabilities(400)
    often = np.flatnonzero(chances * draws.size >= 10)
    counts = np.array([np.count_nonzero(draws == k) for k in often])
    expected = chances[often] * draws.size
    rest, left = draws.size - counts.sum(), draws.size - expected.sum()
    statistic = ((counts - expected) ** 2 / expected).sum() + (rest - left) ** 2 / max(left, 1)
    assert statistic < chi2.isf(1e-7, often.size)
    assert draws.min() == (0 if trials.shape == math.inf else 1)


@pytest.mark.parametrize("trials", DISTRIBUTIONS, ids=str)
def test_a_draw_stops_with_the_chance_of_its_number(trials):
    """Uniform numbers just below and just above a chance stop, and go on."""
    chances = trials.probabilities(50)
    first = int(np.flatnonzero(chances)[0])
    top = 2**256
    below, above = (int(Fraction(chances[first] * (1 + e)) * top) for e in (-1e-9, 1e-9))
    assert trials.draw(lambda n: below) == first
    answers = iter([min(above, top - 1), 0])
    if chances[first] < 1 - 1e-8:
        assert trials.draw(lambda n: next(answers)) == first + 1


def test_far_numbers_are_drawn_with_their_own_chance():
    """Geometric: at every number, however far, the chance to stop is 1 / mean."""
    trials, asked = Trials(4), []

    def bits(n):
        asked.append(n)
        return 2**254 + 2**214 if len(asked) < 200 else 2**254 - 2**214

    assert trials.draw(bits) == 200
    assert set(asked) == {256}


def test_a_draw_is_fresh_each_time():
    drawn = {Trials(500).draw() for _ in range(12)}
    assert len(drawn) > 1  # all alike: less than 1e-30


def test_trials_are_written_and_read_back():
    for trials in DISTRIBUTIONS:
        assert Trials.from_dict(json.loads(json.dumps(trials.to_dict(), allow_nan=False))) == trials


def test_more_trials_and_less_spread_cost_more():
    costs = [tuned(2.0, Trials(mean)) for mean in (1.01, 2, 10, 100, 1e6)]
    assert costs == sorted(costs)
    assert accounting.privacy_cost(ONCE, 20, 2.0, DELTA).epsilon < costs[0]
    costs = [tuned(2.0, Trials(10, shape)) for shape in SHAPES]
    assert costs == sorted(costs)


@pytest.mark.parametrize("trials", [Trials(10), Trials(10, math.inf), Trials(1e6, 0)], ids=str)
@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 20.0])
def test_calibration_inverts_the_cost(trials, epsilon):
    sigma = tuned_noise_multiplier(ONCE, 20, epsilon, DELTA, trials)
    assert tuned(sigma, trials) <= epsilon
    assert tuned(0.999 * sigma, trials) > 0.98 * epsilon


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: Trials(1.0), "mean must be a finite number >= 1.01 and <= 1e\\+06, got 1.0"),
        (lambda: Trials(math.inf), "mean must be a finite number"),
        (lambda: Trials(2, -0.5), "shape must be a finite number >= 0 and <= 100, got -0.5"),
        (lambda: Trials(2, math.nan), "shape must be a finite number >= 0 and <= 100, got nan"),
        (lambda: Trials(2).probabilities(0), "most must be >= 1, got 0"),
        (lambda: Trials(1001).draw(), "mean of trials that are made must be .* <= 1000.*got 1001"),
        (lambda: Trials(2).draw(lambda n: 2**n - 1), "secret randomness must be uniform, got"),
        (lambda: Trials.from_dict({"mean": 2.0}), "trials must have a mean and a shape, got"),
        (lambda: Trials.from_dict({"mean": 2.0, "shape": "x"}), "shape must be a number, got 'x'"),
        (lambda: tuned(1.0, Trials(2), 1.0), "delta must be a finite number > 0 and < 1, got 1.0"),
        (
            lambda: tuned_privacy_cost(CyclicPoisson(1, 0.1), 20, 1.0, DELTA, Trials(2)),
            "participation must have steps that are not random for tuning .* got cyclic-poisson",
        ),
        (
            lambda: tuned_noise_multiplier(BallsInBins(5, 4), 20, 1.0, DELTA, Trials(2)),
            "participation must have steps that are not random .* got balls-in-bins",
        ),
        (
            lambda: tuned_noise_multiplier(ONCE, 20, 0.0, DELTA, Trials(2)),
            "epsilon must be a finite number > 0, got 0.0",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()

"""Chains of log-normals against quadrature, paths, samples and the normals that they stand for."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from rootnoise import accounting
from rootnoise.accounting import MonteCarlo, bin_bounds
from rootnoise.accounting import bin_chain as chains
from rootnoise.accounting.balls_in_bins import bin_gram
from rootnoise.accounting.bin_bounds import bounds, linked_above, linked_below
from rootnoise.accounting.bin_chain import Chain, _Lattice, _Law
from rootnoise.accounting.run import _search
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.participation import BallsInBins
from rootnoise.workload import prefix_sum


def gram_of(chain: Chain) -> np.ndarray:
    moving = chain.bins - chain.still
    i = np.arange(moving)
    gram = chain.linked * chain.decay ** np.abs(i - i[:, None]).astype(float)
    gram *= i // chain.run == i[:, None] // chain.run
    whole = np.zeros((chain.bins, chain.bins))
    whole[:moving, :moving] = gram + chain.alone * np.eye(moving)
    return whole


def quadrature(chain: Chain, epsilon: float) -> tuple[float, float]:
    """Integrate both directions over the space of the means that are not 0."""
    moving = chain.bins - chain.still
    gram = gram_of(chain)[:moving, :moving]
    means = np.linalg.cholesky(gram)
    axis = np.linspace(-8, 8, {1: 20_001, 2: 501, 3: 101}[moving])
    grid = np.stack(np.meshgrid(*[axis] * moving, indexing="ij"))
    weight = np.prod(norm.pdf(grid), axis=0) * (axis[1] - axis[0]) ** moving
    logs = np.tensordot(means, grid, 1) - np.diag(gram).reshape(-1, *[1] * moving) / 2
    ratio, e = (np.exp(logs).sum(axis=0) + chain.still) / chain.bins, math.exp(epsilon)
    return float((np.maximum(ratio - e, 0) * weight).sum()), float(
        (np.maximum(1 - e * ratio, 0) * weight).sum()
    )


SMALL = [
    Chain(2, 0.8, 0.6, 0.4, 2),
    Chain(2, 1.0, 0.3, 0.0, 2),
    Chain(3, 0.5, 0.8, 0.5, 3),
]
BROKEN = [Chain(3, 0.8, 0.6, 0.4, 2), Chain(3, 0.8, 0.6, 0.4, 2, still=1)]


@pytest.mark.parametrize("chain", SMALL, ids=str)
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_both_directions_are_just_above_quadrature(chain, epsilon):
    """What rounding adds is in the bound; quadrature is right to 3e-3."""
    remove, add = quadrature(chain, epsilon)
    law = _Law.of(chain, math.exp(epsilon), 1e-5, 1.0, above=True)
    assert remove * (1 - 3e-3) <= law.remove(epsilon) <= remove * 1.02 + 1e-6
    law = _Law.of(chain, math.exp(-epsilon), 1e-5, 1.0, above=True)
    assert add * (1 - 3e-3) <= law.add(epsilon) <= add * 1.03 + 1e-6


@pytest.mark.parametrize("chain", SMALL + BROKEN, ids=str)
def test_lower_bounds_are_just_below_quadrature(chain):
    for epsilon in (0.3, 1.0):
        law = _Law.of(chain, 1.01 * math.exp(epsilon), 1e-5, 1.0, above=False)
        remove = quadrature(chain, epsilon)[0]
        assert 0.93 * remove - 1e-6 <= law.remove(epsilon) <= remove * (1 + 3e-3)


@pytest.mark.parametrize("chain", SMALL, ids=str)
def test_epsilon_lies_between_and_quadrature_says_so(chain):
    delta = 1e-3
    upper = chain.upper(delta, 6.0)
    lower = chain.lower(delta, upper)
    assert max(*quadrature(chain, lower)) >= delta * (1 - 5e-3)
    assert max(*quadrature(chain, upper)) <= delta * (1 + 5e-3)
    assert lower < upper < 1.06 * lower
    assert chain.upper(delta, 0.9 * lower) == math.inf
    assert upper <= chain.upper(delta, 6.0, chains.COARSE) < 1.2 * upper


@given(
    st.integers(2, 40),
    st.floats(0.1, 0.95),
    st.floats(0.05, 1.0),
    st.floats(0.5, 3.0),
    st.sampled_from([1e-3, 1e-5]),
)
@settings(max_examples=6)
def test_bounds_are_in_order_for_all_sizes(b, decay, part, own, delta):
    chain = Chain(b, part * own, decay, (1 - part) * own, b)
    alone = accounting.gaussian.gaussian_epsilon(own**-0.5, delta)
    upper = chain.upper(delta, alone, chains.COARSE)
    lower = chain.lower(delta, min(upper, alone), chains.COARSE)
    more = replace(chain, linked=1.3 * chain.linked).upper(delta, 2 * alone, chains.COARSE)
    assert lower <= upper
    assert lower <= more
    assert lower <= alone * (1 + 1e-9)


def test_the_add_direction_is_not_forgotten(monkeypatch):
    """It is seldom the larger one: here the other is said to be 0."""
    chain, delta = SMALL[0], 1e-2
    monkeypatch.setattr(_Law, "remove", lambda self, epsilon: 0.0)
    upper = chain.upper(delta, 6.0)
    assert 0.9 * delta < quadrature(chain, upper)[1] <= delta * (1 + 5e-3)
    assert chain._geometric(upper) >= delta


def test_what_is_smoothed_is_taken_back(monkeypatch):
    monkeypatch.setitem(chains.SMOOTH, False, 0.1)
    exact = quadrature(SMALL[0], 0.5)[0]
    law = _Law.of(SMALL[0], 2.0, 1e-5, 1.0, above=False)
    assert law.put(math.exp(0.5)) + 1 - math.exp(0.5) > 1.003 * exact
    assert law.remove(0.5) < 0.997 * exact
    # E (R - t)_+ is no more than what is paid for it.
    r, t = law.smooth / 2, 5 * law.smooth / 2
    moved = math.exp(0.5) + t
    slipped = law.put(moved) + 1 - moved - law.remove(0.5)
    assert 0 < r * (norm.pdf(5) - 5 * norm.sf(5)) < slipped < 2e-6


def test_the_mean_on_the_lattice_is_that_of_its_masses():
    chain = Chain(5, 1.0, 0.5, 0.7, 5)
    lattice = _Lattice.of(chain, 1e6, 9.0, 4.0, above=True)
    wide, law, total = len(lattice.alone), lattice.start, 0.0
    m = len(law)
    for _ in range(5):
        total += sum(law @ lattice.values[j : j + m] * lattice.alone[j] for j in range(wide)) / 5
        law = law @ lattice.steps
    assert -1e-10 < total - chain._mean(4.0) <= 1e-14  # the next term of the series
    assert total < 1 - 1e-6


def test_importance_samples_lie_between():
    """(1 - K / L)_+ under the mixture: 5 standard errors each way, a false alarm in 1e6."""
    chain, epsilon = Chain(20, 1.5, 0.7, 0.8, 20), 2.2
    gram, rng, size = gram_of(chain), np.random.default_rng(1), 200_000
    noise = rng.standard_normal((size, 20)) @ np.linalg.cholesky(gram).T
    logs = noise + gram[rng.integers(20, size=size)] - np.diag(gram) / 2
    gain = np.maximum(1 - math.exp(epsilon) / np.exp(logs).mean(axis=1), 0)
    error = 5 * gain.std() / math.sqrt(size)
    above = _Law.of(chain, math.exp(epsilon), 1e-4, 1.0, above=True).remove(epsilon)
    below = _Law.of(chain, 1.01 * math.exp(epsilon), 1e-4, 1.0, above=False).remove(epsilon)
    assert below <= gain.mean() + error
    assert above >= gain.mean() - error
    assert below > 0.9 * above


# ---------------------------------------------------------------------- the parts of the proof


@pytest.mark.parametrize("variance", [0.4, 1.0])
@pytest.mark.parametrize("phase", [0.0, 0.03])
def test_discrete_normals_hide_more_and_less_than_normals(variance, phase):
    """Their masses and moments are exact, and all calls are on the right side."""
    h = 0.3
    for above, sign in ((True, 1), (False, -1)):
        v = chains._discrete(variance, h, above=above)
        x = phase + h * np.arange(-40, 41.0)
        masses = chains._masses(x, v, h, above=above)
        assert masses.sum() == pytest.approx(1, abs=1e-13)
        assert x @ masses == pytest.approx(0, abs=1e-13)
        assert x**2 @ masses == pytest.approx(v, abs=1e-12)
        if not above:
            assert np.exp(x) @ masses == pytest.approx(math.exp(v / 2), rel=1e-12)
        # E e^x of the spline falls short of that by the fourth power, for an upper bound.
        assert 0 <= 1 - np.exp(x - v / 2) @ masses < 1e-5
        root = math.sqrt(variance)
        for level in (0.5, 1.0, 1.7, 3.0):
            d = (variance / 2 - math.log(level)) / root
            exact = norm.cdf(d) - level * norm.cdf(d - root)
            found = np.maximum(np.exp(x - v / 2) - level, 0) @ masses
            assert sign * (found - exact) > 0


def test_a_discrete_normal_too_narrow_for_its_lattice_is_widened_or_left_out():
    assert chains._discrete(0.01, 0.3, above=True) == pytest.approx((chains.LEAST + 0.25) * 0.09)
    assert chains._discrete(0.3, 0.3, above=False) == 0
    assert chains._discrete(0.0, 0.3, above=True) == 0


def test_the_kernels_of_rounding_reproduce_exponentials():
    """The chance is 1 and the mean of e^(a y) is e^(a x) but for what `_shift` pays."""
    h, above = 0.4, []
    for x in np.linspace(0, h, 7):
        y = h * np.arange(-30, 31.0)
        spline = np.abs(y - x) / h
        spline = np.where(
            spline < 0.5, 0.75 - spline**2, np.where(spline < 1.5, (1.5 - spline) ** 2 / 2, 0)
        )
        assert spline.sum() == pytest.approx(1, abs=1e-14)
        above.append(math.log(np.exp(y - x) @ spline) - 3 * math.log(math.sinh(h / 2) / (h / 2)))
    assert max(map(abs, above)) <= 2.45 * (h / 2 / math.pi) ** 3 <= 2 * max(map(abs, above))
    t, theta = chains.SPREAD * h * h, []
    for x in np.linspace(0, h, 7):
        y = h * np.arange(-60, 61.0)
        theta.append(np.exp(-np.square(y - x) / (2 * t)).sum() * h / math.sqrt(2 * math.pi * t))
    assert np.abs(np.array(theta) - 1).max() == pytest.approx(chains.THETA, rel=1e-2)


def test_a_shift_counts_every_normal_of_a_mean():
    chain = Chain(4, 1.0, 0.5, 1.0, 4)
    h = chain._width(1.0)
    assert h == pytest.approx(chains.WIDTH * math.sqrt(2))
    cubes, fourths = sum(0.125**j for j in range(30)) + 1, sum(0.0625**j for j in range(30)) + 1
    expected = 2.45 * (h / 2 / math.pi) ** 3 * cubes + h**4 / 960 * fourths + chains.RELATIVE
    assert chain._shift(1.0, above=True) == pytest.approx(expected, rel=1e-9)
    assert chain._shift(1.0, above=False) == pytest.approx(
        2 * h * chains.THETA * 3 + chains.RELATIVE, rel=1e-9
    )
    # A slow chain needs a lattice of its short steps.
    assert Chain(4, 1.0, 0.999, 1.0, 4)._width(1.0) ** 2 * chains.LEAST < 1 - 0.999**2


def paths(lattice: _Lattice, length: int, top: float) -> list[tuple[float, float]]:
    """Return (sum, chance) of all paths whose values are all below the top."""
    m, wide = len(lattice.start), len(lattice.alone)
    found = []
    for states in itertools.product(range(m), repeat=length):
        chance = lattice.start[states[0]]
        for one, other in itertools.pairwise(states):
            chance = chance * lattice.steps[one, other]
        for shifts in itertools.product(range(wide), repeat=length):
            values = [lattice.values[i + j] for i, j in zip(states, shifts, strict=True)]
            if max(values) < top:
                weight = chance * math.prod(lattice.alone[j] for j in shifts)
                found.append((sum(values), weight))
    return found


def test_transforms_are_sums_over_paths():
    lattice = _Lattice.of(Chain(3, 1.0, 0.5, 0.6, 3), 4.0, 1.5, 12.0, above=True)
    w = np.array([0.0, 0.4, 1.3])
    errors, found = lattice.transform(w.astype(complex), 4.0, [3, 1])
    for row, length in enumerate((3, 1)):
        sums, weights = np.array(paths(lattice, length, 4.0)).T
        expected = np.exp(1j * np.outer(w, sums)) @ weights
        np.testing.assert_allclose(found[row], expected, atol=1e-13)
    assert errors[0] == 3 * errors[1] > 3 * 128 * 2.0**-53
    grown = lattice.transform(-1j * w, 4.0, [3])[1][0].real
    sums, weights = np.array(paths(lattice, 3, 4.0)).T
    np.testing.assert_allclose(grown, np.exp(np.outer(w, sums)) @ weights, rtol=1e-12)


def test_a_long_chain_becomes_steady_and_what_is_left_is_paid_for(monkeypatch):
    lattice = _Lattice.of(Chain(400, 1.0, 0.6, 0.4, 400), 600.0, 8.0, 3.0, above=True)
    w = np.linspace(0, 0.05, 12).astype(complex)
    errors, quick = lattice.transform(w, 600.0, [400, 250])
    monkeypatch.setattr(chains, "STEADY", -1.0)
    plain, slow = lattice.transform(w, 600.0, [400, 250])
    assert np.abs(quick - slow).max() <= errors.min() < 1e-10
    assert np.all(errors > plain)
    monkeypatch.setattr(chains, "STEADY", 1e-3)
    errors, early = lattice.transform(w, 600.0, [400, 250])
    assert np.all(np.abs(early - slow).max(axis=1) <= errors)
    assert errors[0] > 1e-3


@pytest.mark.parametrize("strike", [0.6, 1.5, 3.0])
def test_one_series_gives_the_puts_of_a_log_normal(strike):
    """One mean, alone: the formula of Black and Scholes."""
    chain = Chain(1, 0.9, 0.5, 0.0, 1)
    root = math.sqrt(0.9)
    d = (math.log(strike) + 0.45) / root
    exact = strike * norm.cdf(d) - norm.cdf(d - root)
    above = _Law.of(chain, strike, 1e-6, 1.0, above=True).put(strike)
    below = _Law.of(chain, strike, 1e-6, 1.0, above=False).put(strike)
    assert exact < above < exact * 1.01
    assert 0.99 * exact < below
    for law_above in (True, False):
        law = _Law.of(chain, strike, 1e-6, 1.0, above=law_above)
        assert law.put(0.0) == 0


def test_each_error_of_a_law_is_paid_for():
    chain, more, strike = Chain(3, 0.5, 0.8, 0.5, 3), 1e-4, 1.5
    above = _Law.of(chain, strike, 1e-5, 1.0, above=True)
    below = _Law.of(chain, strike, 1e-5, 1.0, above=False)
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
    """By samples: three means seldom add up to more than six times the largest strike."""
    chain = Chain(3, 0.5, 0.8, 0.5, 3)
    for room in (1.2, 2.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(chains.ROOM, False, room)
            law = _Law.of(chain, 1.5, 1e-5, 1.0, above=False)
        rng = np.random.default_rng(0)
        logs = rng.standard_normal((10**6, 3)) @ np.linalg.cholesky(gram_of(chain)).T - 0.5
        values = np.exp(logs)
        beyond = (values.max(axis=1) < 4.5) & (values.sum(axis=1) >= room * 4.5)
        assert beyond.mean() <= law.beyond < 1
        assert law.beyond > 1e-6


# ------------------------------------------------------------------------------- any Gram matrix


@given(st.integers(8, 30), st.integers(1, 4), st.integers(2, 12), st.floats(0.2, 6))
@settings(max_examples=30)
def test_chains_lie_entrywise_on_their_side(b, epochs, bands, epsilon):
    who = BallsInBins(b, epochs)
    n = b * epochs
    gram = bin_gram(factorize(prefix_sum(n), who, "bsr", bands=min(bands, n)).strategy, b)
    chain = linked_above(gram, epsilon)
    if chain is not None:
        assert chain.run == chain.bins
        assert chain.still == 0
        larger = gram_of(chain) * (1 + 1e-9) + 1e-12
        for start in range(b):  # every row of so many neighbours in the circle
            i = (start + np.arange(chain.bins)) % b
            assert np.all(gram[np.ix_(i, i)] <= larger)
    chain = linked_below(gram, epsilon)
    if chain is not None:
        assert chain.bins == b
        assert np.all(gram_of(chain) <= gram * (1 + 1e-9) + 1e-12)


def test_bins_without_neighbours_or_gaps_are_left_to_other_bounds():
    assert linked_above(np.eye(5), 1.0) is None
    assert linked_above(np.eye(3) + 1, 1.0).bins == 2
    assert linked_above(np.eye(2) + 1, 1.0) is None
    assert linked_above(np.ones((5, 5)), 1.0) is None
    assert linked_below(np.eye(1), 1.0) is None
    assert linked_below(np.eye(3) - 0.1, 1.0) is None


@pytest.mark.parametrize("bands", [2, 4])
def test_correlated_noise_is_bounded_within_ten_per_cent(bands):
    who = BallsInBins(200, 4)
    gram = bin_gram(factorize(prefix_sum(800), who, "bsr", bands=bands).strategy, 200)
    gram /= np.diag(gram).max() * 0.45**2
    found = bounds(gram, 1e-5)
    assert found.lower <= found.upper <= 1.1 * found.lower
    rough = bounds(gram, 1e-5, sizes=bin_bounds.QUICK)
    assert rough.lower <= found.upper <= rough.upper <= 1.05 * found.upper


def test_a_certain_bound_near_the_forecast_is_claimed_and_calibrated_to():
    who = BallsInBins(60, 2)
    strategy = factorize(prefix_sum(120), who, "bsr", bands=2).strategy
    few = MonteCarlo(samples=20_000)
    sigma = accounting.noise_multiplier(who, 120, 3.0, 1e-5, strategy=strategy, monte_carlo=few)
    cost = accounting.privacy_cost(who, 120, sigma, 1e-5, strategy=strategy, monte_carlo=few)
    assert cost.monte_carlo is None
    assert "certain" in cost.method
    assert 0.98 * 3 <= cost.epsilon <= 3


@pytest.mark.parametrize("off", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("close", [0.0, 0.99])
def test_a_search_returns_no_noise_that_misses_the_target(off, close):
    """However far the quick figure is from the exact one, whose first trial may miss."""
    tried = []
    found = _search(
        lambda s: 1 / s, lambda s: off / s, 2.0, 5.0, lambda s, _: tried.append(s), close
    )
    assert off / found <= 2.0
    assert not close or found <= 1.01 * off / 2.0
    assert off <= 1 or any(s < found for s in tried)


# ---------------------------------------------------------------------- where it must not be wrong


def oracle(gram: np.ndarray, epsilon: float, size: int) -> list[tuple[float, float]]:
    """Return both deltas and their standard errors from tilted mixtures, by bounded weights.

    remove: y from a mixture of N(theta m_i, 1), theta = 1 and what lifts one mean to b e^eps.
    add: y from N(-tau m, 1), tau = 0 and what lowers the mean of the logarithms to -eps.
    """
    b, squares, rng = len(gram), np.diag(gram), np.random.default_rng(0)
    values, vectors = np.linalg.eigh(gram)
    noise = rng.standard_normal((size, b)) @ (vectors * np.sqrt(np.maximum(values, 0))).T
    theta = max(1.0, 0.5 + (math.log(b) + epsilon) / squares.max())
    tau = max(0.0, (epsilon - squares.mean() / 2) / gram.mean())
    tau = min(tau, 20 / math.sqrt(gram.mean()))  # beyond, its exponentials overflow
    found = []
    for tilts, sign in (((1.0, theta), 1), ((0.0, tau), -1)):
        t = rng.choice(tilts, size)[:, None]
        moved = gram[rng.integers(b, size=size)] if sign > 0 else -gram.mean(axis=1)
        u = noise + t * moved
        ratio = np.exp(u - squares / 2).mean(axis=1)
        if sign > 0:
            drawn = [np.exp(s * u - s * s * squares / 2).mean(axis=1) for s in tilts]
        else:
            drawn = [np.exp(-s * u.mean(axis=1) - s * s * gram.mean() / 2) for s in tilts]
        gain = ratio - math.exp(epsilon) if sign > 0 else 1 - math.exp(epsilon) * ratio
        gain = np.maximum(gain, 0) / np.mean(drawn, axis=0)
        found.append((float(gain.mean()), float(gain.std()) / math.sqrt(size)))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_random_means_hold_against_samples(seed):
    """Means with negative entries too: six standard errors, a false alarm in 1e8."""
    rng = np.random.default_rng(seed)
    b, delta = int(rng.integers(2, 7)), float(rng.choice([1e-12, 1e-5, 1e-3, 0.1]))
    means = rng.standard_normal((4, b)) * rng.uniform(0.3, 1, b) * (rng.random((4, b)) < 0.7)
    means[0, 0] = 1.0
    signed, gram = means.T @ means, np.abs(means).T @ np.abs(means)
    scale = gram.max() * rng.uniform(0.4, 2) ** 2
    found = bounds(gram / scale, delta, signed / scale, sizes=bin_bounds.QUICK)
    for products in (gram, signed):
        for value, error in oracle(products / scale, found.upper, 50_000):
            assert value - 6 * error <= delta
    if found.lower > 0:
        assert max(v + 6 * e for v, e in oracle(signed / scale, found.lower, 50_000)) >= delta


def test_no_mean_of_a_chain_is_shorter_than_one_of_those_that_it_bounds():
    """Not by 1e-9 either, where what is left to be alone is dropped."""
    gram = np.eye(6)
    for i in range(6):
        gram[i, (i + 1) % 6] = gram[(i + 1) % 6, i] = 0.02 * (1 - 5e-10)
    chain = linked_above(gram, 1.0)
    assert chain.alone == 0
    assert chain.linked + chain.alone >= 1
    assert chain.linked * chain.decay >= gram[0, 1]


def test_what_is_no_number_bounds_nothing(monkeypatch):
    assert chains._least(lambda epsilon: math.nan, 1e-5, 0.0, 3.0) == math.inf
    monkeypatch.setattr(_Law, "put", lambda self, strike: math.nan)
    assert SMALL[0].upper(1e-3, 6.0) == math.inf
    assert SMALL[0].lower(1e-3, 6.0) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.037, 0.1])
def test_with_hardly_any_noise_epsilon_is_that_without_amplification(sigma):
    who = BallsInBins(10, 2)
    strategy = factorize(prefix_sum(20), who, "bsr", bands=3).strategy
    few = MonteCarlo(samples=1000)
    cost = accounting.privacy_cost(who, 20, sigma, 1e-5, strategy=strategy, monte_carlo=few)
    alone = accounting.gaussian.gaussian_epsilon(sigma, 1e-5)
    assert alone / 2 < cost.epsilon <= alone


def test_strategies_of_equal_magnitudes_share_no_bounds():
    """Their upper bounds are the same, but what is claimed depends on the lower ones as well."""
    who = BallsInBins(4, 2)
    runs = [
        accounting.run._Run.of(who, 8, Toeplitz(np.array([1.0, c]), 8), None) for c in (0.5, -0.5)
    ]
    assert runs[0] != runs[1]


def test_rounding_is_paid_for_where_the_parts_of_a_term_cancel():
    """A wave that is long compared with the strike, to 40 digits."""
    law = _Law.of(SMALL[0], 1.5, 1e-5, 1.0, above=True)
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
            u = k + chains.FAR * mpmath.mpf(law.smooth)
            e = mpmath.expj(w * u)
            part = u * e / (1j * mpmath.mpf(w)) + (e - 1) / mpmath.mpf(w) ** 2
            term = mpmath.expj(-w * k) * part * mpmath.mpc(0.7, 0.2)
            exact = float((u * u / 2 + 2 * term.real) / (law.period * 2))
        assert exact <= one.put(1.5) <= exact + 1e-6 * max(1, 1e-9 / w)

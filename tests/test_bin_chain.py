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
from rootnoise.accounting import MonteCarlo, bin_bounds, bin_fit
from rootnoise.accounting import bin_chain as chains
from rootnoise.accounting import bin_series as series
from rootnoise.accounting.balls_in_bins import bin_gram
from rootnoise.accounting.bin_bounds import bounds
from rootnoise.accounting.bin_chain import Chain, Lattice
from rootnoise.accounting.bin_fit import chains_above, chains_below
from rootnoise.accounting.bin_series import Law
from rootnoise.accounting.random_allocation import inequality_of_means
from rootnoise.accounting.run import _search
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize
from rootnoise.participation import BallsInBins
from rootnoise.workload import prefix_sum


def gram_of(chain: Chain) -> np.ndarray:
    """Return the products, from what each mean takes of each Z."""
    moving, q = chain.bins - chain.still, len(chain.heads)
    i = np.arange(moving)
    takes = np.zeros((moving, moving // q + 2))
    takes[i, i // q] = np.array(chain.heads)[i % q]
    takes[i, i // q + 1] = np.array(chain.tails)[i % q]
    j = np.arange(takes.shape[1])
    whole = np.zeros((chain.bins, chain.bins))
    whole[:moving, :moving] = takes @ chain.decay ** np.abs(j - j[:, None]).astype(float) @ takes.T
    whole[i, i] += np.array(chain.alone)[i % q]
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
    Chain.plain(2, 0.8, 0.6, 0.4),
    Chain.plain(2, 1.0, 0.3),
    Chain.plain(3, 0.5, 0.8, 0.5),
    Chain(2, (0.8,), (0.8,), (0.3,), 0.0),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.4, 0.3), 0.0),
    Chain(3, (0.5,), (0.6,), (0.2,), 0.5),
]
STILL = [
    Chain.plain(3, 0.8, 0.6, 0.4, still=1),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.4, 0.3), 0.0, still=1),
    Chain(3, (0.9, 0.6), (0.3, 0.7), (0.0, 0.3), 0.0, still=2),
]


@pytest.mark.parametrize("chain", SMALL, ids=str)
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_both_directions_are_just_above_quadrature(chain, epsilon):
    """What rounding adds is in the bound; quadrature is right to 3e-3."""
    remove, add = quadrature(chain, epsilon)
    law = chain.law(math.exp(epsilon), 1e-5, above=True)
    assert remove * (1 - 3e-3) <= law.remove(epsilon) <= remove * 1.02 + 1e-6
    law = chain.law(math.exp(-epsilon), 1e-5, above=True)
    assert add * (1 - 3e-3) <= law.add(epsilon) <= add * 1.03 + 1e-6


@pytest.mark.parametrize("chain", SMALL + STILL, ids=str)
def test_lower_bounds_are_just_below_quadrature(chain):
    for epsilon in (0.3, 1.0):
        law = chain.law(1.01 * math.exp(epsilon), 1e-5, above=False)
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
    linked, alone = part * own, (1 - part) * own
    for chain, larger in (
        (Chain.plain(b, linked, decay, alone), Chain.plain(b, 1.3 * linked, decay, alone)),
        (
            Chain(b, (linked**0.5 * decay, 0.1), (0.2, decay), (alone, own), 0.0),
            Chain(b, (linked**0.5 * decay, 0.1), (0.2, 1.3 * decay), (alone, own), 0.0),
        ),
    ):
        longest = float(np.diag(gram_of(chain)).max())
        known = accounting.gaussian.gaussian_epsilon(longest**-0.5, delta)
        upper = chain.upper(delta, known, chains.COARSE)
        lower = chain.lower(delta, min(upper, known), chains.COARSE)
        assert lower <= upper
        assert lower <= larger.upper(delta, 2 * known, chains.COARSE)
        assert lower <= known * (1 + 1e-9)


def test_the_add_direction_is_not_forgotten(monkeypatch):
    """It is seldom the larger one: here the other is said to be 0."""
    chain, delta = SMALL[0], 1e-2
    monkeypatch.setattr(Law, "remove", lambda self, epsilon: 0.0)
    upper = chain.upper(delta, 6.0)
    assert 0.9 * delta < quadrature(chain, upper)[1] <= delta * (1 + 5e-3)
    assert chain._geometric(upper) >= delta


@pytest.mark.parametrize("chain", SMALL + STILL, ids=str)
def test_the_mean_of_the_logarithms_bounds_the_add_direction(chain):
    """From its variance by the dense products."""
    gram = gram_of(chain)
    for epsilon in (0.1, 1.0):
        found = chain._geometric(epsilon)
        assert found == pytest.approx(
            inequality_of_means(epsilon, np.diag(gram).mean(), gram.mean()), rel=1e-9
        )
        assert found > quadrature(chain, epsilon)[1] * (1 - 3e-3)


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


@pytest.mark.parametrize("chain", [Chain.plain(5, 1.0, 0.5, 0.7), SMALL[4], SMALL[5]], ids=str)
def test_the_mean_on_the_lattice_is_that_of_its_masses(chain):
    lattice = Lattice(chain, 9.0, 4.0, above=True)
    # E S is the derivative of E e^{i w S} at 0, but for w^2 E S^3 / 6.
    w = 1e-6
    total = lattice.transform(np.array([w + 0j]), 1e9)[1][0].imag / w / chain.bins
    assert -1e-7 < total - chain._mean(4.0) <= 1e-7
    assert chain._mean(4.0) < 1 - 1e-7


@pytest.mark.parametrize(
    "chain",
    [Chain.plain(20, 1.5, 0.7, 0.8), Chain(20, (1.2, 0.5), (0.5, 1.2), (0.6, 0.6), 0.0)],
    ids=str,
)
def test_importance_samples_lie_between(chain):
    """(1 - K / L)_+ under the mixture: 5 standard errors each way, a false alarm in 1e6."""
    epsilon = 2.2
    gram, rng, size = gram_of(chain), np.random.default_rng(1), 200_000
    noise = rng.standard_normal((size, 20)) @ np.linalg.cholesky(gram).T
    logs = noise + gram[rng.integers(20, size=size)] - np.diag(gram) / 2
    gain = np.maximum(1 - math.exp(epsilon) / np.exp(logs).mean(axis=1), 0)
    error = 5 * gain.std() / math.sqrt(size)
    above = chain.law(math.exp(epsilon), 1e-4, above=True).remove(epsilon)
    below = chain.law(1.01 * math.exp(epsilon), 1e-4, above=False).remove(epsilon)
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
    chain = Chain.plain(4, 1.0, 0.5, 1.0)
    h, fine = chain._width(1.0), chain._fine(0, 1.0)
    assert h == pytest.approx(chains.WIDTH * math.sqrt(2))
    assert fine == pytest.approx(chains.FINE * math.sqrt(2))
    cubes = h**3 * sum(0.125**j for j in range(30)) + fine**3
    fourths = h**4 * sum(0.0625**j for j in range(30)) + fine**4
    expected = 2.45 * cubes / (2 * math.pi) ** 3 + fourths / 960 + chains.RELATIVE
    assert chain._shift(1.0, above=True) == pytest.approx(expected, rel=1e-9)
    assert chain._shift(1.0, above=False) == pytest.approx(
        2 * chains.THETA * (2 * h + fine) + chains.RELATIVE, rel=1e-9
    )
    # A slow chain needs a lattice of its short steps, and a short normal one of its own.
    assert Chain.plain(4, 1.0, 0.999, 1.0)._width(1.0) ** 2 * chains.LEAST < 1 - 0.999**2
    assert Chain.plain(4, 1.0, 0.5, 1e-4)._fine(0, 1.0) ** 2 * chains.LEAST < 1e-4
    # A mean of two Z: of the newest takes its tail, of those before what is left of both.
    pair = Chain(4, (0.3, 0.7), (0.4, 0.2), (1.0, 0.5), 0.5)
    h = pair._width(1.0)
    sums = [
        h * (new + sum(old * 0.5**k for k in range(60))) + pair._fine(u, 1.0)
        for u, (new, old) in enumerate([(0.4, 0.3 + 0.5 * 0.4), (0.2, 0.7 + 0.5 * 0.2)])
    ]
    assert pair._shift(1.0, above=False) == pytest.approx(
        2 * chains.THETA * max(sums) + chains.RELATIVE, rel=1e-9
    )


def paths(lattice: Lattice, length: int, top: float) -> list[tuple[complex, float]]:
    """Return (sum, chance) of all paths of so many means whose values are all below the top."""
    chain, m, found = lattice.chain, len(lattice.start), []
    q = len(chain.heads)
    blocks = -(-length // q)
    for states in itertools.product(range(m), repeat=blocks + 1):
        chance = lattice.start[states[0]]
        for one, other in itertools.pairwise(states):
            chance = chance * lattice.steps[one, other]
        laws = []
        for i in range(length):
            load, (a, b) = chain._load(i % q), states[i // q : i // q + 2]
            if load not in lattice.terms:  # a mirrored one
                load, a, b = (load[1], load[0], load[2]), b, a
            term = lattice.terms[load]
            row = a * m + b if len(term.shape) == 2 else a
            width = term.masses.shape[1]
            if term.mix is None:
                laws.append(
                    [(term.values[term.first[row] + j], term.masses[row, j]) for j in range(width)]
                )
            else:
                weights = np.zeros(len(term.values))
                near = term.mix[[row], :].toarray()[0]
                for point in np.flatnonzero(near):
                    place = term.first[point]
                    weights[place : place + width] += near[point] * term.masses[point]
                laws.append(list(zip(term.values, weights, strict=True)))
        for drawn in itertools.product(*laws):
            if max(value for value, _ in drawn) < top:
                weight = chance * math.prod(mass for _, mass in drawn)
                found.append((sum(value for value, _ in drawn), weight))
    return found


@pytest.mark.parametrize(
    ("chain", "length", "coarse"),
    [
        (Chain.plain(2, 1.0, 0.5, 0.6), 2, 12.0),
        (Chain(2, (0.8,), (0.5,), (0.0,), 0.3), 2, 12.0),
        (Chain(3, (0.8, 0.5), (0.5, 0.8), (0.0, 0.0), 0.0), 3, 12.0),
        (Chain(1, (0.8, 0.5), (0.5, 0.8), (0.7, 0.7), 0.0), 1, 12.0),
    ],
    ids=str,
)
def test_transforms_are_sums_over_paths(chain, length, coarse):
    lattice = Lattice(chain, 1.5, coarse, above=True)
    w = np.array([0.0, 0.4, 1.3])
    error, found = lattice.transform(w.astype(complex), 4.0)
    sums, weights = np.array(paths(lattice, length, 4.0)).T
    np.testing.assert_allclose(found, np.exp(1j * np.outer(w, sums)) @ weights, atol=1e-13)
    assert 1e-9 > error > length * 128 * 2.0**-53
    grown = lattice.transform(-1j * w, 4.0)[1].real
    np.testing.assert_allclose(grown, np.exp(np.outer(w, sums)) @ weights, rtol=1e-12)


def test_means_between_points_are_polynomials_through_them():
    """What `_between` says that it errs by, for the worst g that there is at each x."""
    x = np.random.default_rng(0).uniform(-3, 5, 400)
    for root in (0.3, 1.0):
        points, mix = chains._between(x, chains.STEP * root)
        for shift in (0.0, 0.7 * root):  # g = 1 above: the mean is a distribution function
            found = mix @ norm.cdf((points - shift) / root)
            assert np.abs(found - norm.cdf((x - shift) / root)).max() < 64 * 2.0**-53
    assert 0.22 * chains.STEP**8 < 64 * 2.0**-53
    wide = chains._between(x, 0.3)
    error = np.abs(wide[1] @ norm.cdf(wide[0]) - norm.cdf(x)).max()
    assert 1e-9 < error < 0.22 * 0.3**8


@pytest.mark.parametrize(
    "chain",
    [
        Chain.plain(400, 1.0, 0.6, 0.4),
        Chain(401, (0.8, 0.5), (0.5, 0.8), (0.7, 0.7), 0.0),
    ],
    ids=str,
)
def test_a_long_chain_becomes_steady_and_what_is_left_is_paid_for(monkeypatch, chain):
    lattice = Lattice(chain, 8.0, 5.0, above=True)
    w = np.linspace(0, 0.05, 12).astype(complex)
    error, quick = lattice.transform(w, 600.0)
    monkeypatch.setattr(chains, "STEADY", -1.0)
    plain, slow = lattice.transform(w, 600.0)
    assert np.abs(quick - slow).max() <= error < 1e-9
    assert error > plain
    monkeypatch.setattr(chains, "STEADY", 1e-3)
    error, early = lattice.transform(w, 600.0)
    assert np.abs(early - slow).max() <= error
    assert error > 1e-5


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


# ------------------------------------------------------------------------------- any Gram matrix


@given(st.integers(8, 30), st.integers(1, 4), st.integers(2, 12), st.floats(0.2, 6))
@settings(max_examples=30)
def test_chains_lie_entrywise_on_their_side(b, epochs, bands, epsilon):
    who = BallsInBins(b, epochs)
    n = b * epochs
    gram = bin_gram(factorize(prefix_sum(n), who, "bsr", bands=min(bands, n)).strategy, b)
    for chain in chains_above(gram, epsilon):
        assert chain.still == 0
        larger = gram_of(chain) * (1 + 1e-9) + 1e-12
        for start in range(b):  # every row of so many neighbours in the circle
            i = (start + np.arange(chain.bins)) % b
            assert np.all(gram[np.ix_(i, i)] <= larger)
    for found in chains_below(gram, epsilon):
        assert found.bins == b
        assert np.all(gram_of(found) <= gram * (1 + 1e-9) + 1e-12)


def test_two_bands_are_a_chain_of_their_own():
    """Each mean takes of two Z, and has the product of two bands with the next, no more."""
    gram = np.eye(12) + 0.4 * (np.eye(12, k=1) + np.eye(12, k=-1))
    ring = gram.copy()
    ring[0, -1] = ring[-1, 0] = 0.4
    np.testing.assert_allclose(gram_of(chains_below(ring, 1.0)[0]), gram, atol=1e-6)
    blocks = chains_above(ring, 1.0)[1]
    np.testing.assert_allclose(gram_of(blocks), gram[:11, :11], atol=2e-3)


def test_bins_without_neighbours_or_gaps_are_left_to_other_bounds():
    assert chains_above(np.eye(5), 1.0) == []
    assert [chain.bins for chain in chains_above(np.eye(3) + 1, 1.0)] == [2, 2]
    assert chains_above(np.eye(2) + 1, 1.0) == []
    assert chains_above(np.ones((5, 5)), 1.0) == []
    assert chains_below(np.eye(1), 1.0) == []
    assert chains_below(np.eye(3) - 0.1, 1.0) == []
    assert chains_below(np.eye(3), 1.0) == []


def test_products_of_blocks_are_those_at_their_distance():
    """And what is seen around a mean is the mean over those of a block, without itself."""
    one, across = bin_fit._wanted(np.arange(6.0), 3)
    u = np.arange(3)
    assert np.array_equal(one, np.abs(u - u[:, None]))
    assert np.array_equal(across, [[3, 4, 5], [2, 3, 4], [1, 2, 3]])
    loads = np.array([0.3, 0.7, 0.9, 0.6])  # tails, then heads
    gram = gram_of(Chain(6, (0.9, 0.6), (0.3, 0.7), (0.0, 0.0), 0.0))
    seen = np.expm1(gram / 1.5 * 4.0 - gram**2 / 3.0)
    np.fill_diagonal(seen, 0.0)
    assert bin_fit._around(loads, 1.5, 4.0) == pytest.approx(seen[2:4].sum(axis=1).mean())


def test_two_means_are_a_chain_from_below():
    gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    (chain,) = chains_below(gram, 1.0)
    np.testing.assert_allclose(gram_of(chain), gram, atol=1e-6)
    inside, across = bin_fit.shared(bin_fit._loads_below(np.array([1.0, 0.5]), 1.0, 5.0)[1])
    assert inside <= 1.0  # not by a billionth more
    assert across <= 0.5


def test_a_law_knows_its_mean_and_a_lower_bound_may_be_small(monkeypatch):
    chain = SMALL[0]
    assert chain.law(1.5, 1e-5, above=True).mean == chain._mean(1.0) < 1
    assert chain.law(1.5, 1e-5, above=False).mean == 1
    monkeypatch.setattr(Law, "remove", lambda self, epsilon: 1e-5 * (1.5 - 50 * epsilon))
    assert chain.lower(1e-5, 0.05) == pytest.approx(0.01, rel=0.02)


@pytest.mark.filterwarnings("error")
def test_bands_of_zeros_are_no_numbers_of_a_chain():
    """A decay to the power of a distance may be below the least number there is."""
    gram = np.eye(500)
    i = np.arange(500)
    gram[i, (i + 200) % 500] = gram[(i + 200) % 500, i] = 1e-3
    (plain,) = chains_above(gram, 1.0)
    assert plain.heads[0] ** 2 * plain.decay**200 >= 1e-3
    assert chains_above(gram * (gram < 1e-3) + 2.0 * np.eye(500) + (gram == 1e-3) * 0.9, 1.0) == []
    found = bounds(gram / 0.7**2, 1e-5, sizes=bin_bounds.QUICK)
    assert 0 <= found.lower <= found.upper < 2


def test_blocks_below_are_no_longer_than_they_may_be_and_shorter_ones_are_tried():
    """Of means that all overlap, blocks would else be half as long as the run."""
    i = np.arange(150)
    gram = 0.95 ** np.abs(i - i[:, None])
    chains = chains_below(gram, 1.0)
    assert max(len(chain.heads) for chain in chains) == 32
    # Products that fall quickly are seen more by blocks that lack more of the pairs.
    gram = np.eye(200)
    for d in range(1, 16):
        gram += (0.5 / d**0.7) * (np.eye(200, k=d) + np.eye(200, k=-d))
    chains = chains_below(gram, 1.5)
    assert len(chains[0].heads) == 8
    assert len(chains[1].heads) < 8
    for chain in chains:
        assert np.all(gram_of(chain) <= gram * (1 + 1e-9) + 1e-12)


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
    plain, blocks = chains_above(gram, 1.0)
    assert plain.alone == (0.0,)
    assert plain.heads[0] ** 2 >= 1 - 1e-15
    assert plain.heads[0] ** 2 * plain.decay >= gram[0, 1]
    for chain in (plain, blocks):
        assert np.diag(gram_of(chain)).min() >= 1 - 1e-15
    # Whose means take all of their length from the Z are longer rather than shorter.
    full = np.eye(9) + 0.5 * (np.eye(9, k=1) + np.eye(9, k=-1))
    full[0, -1] = full[-1, 0] = 0.5
    blocks = chains_above(full, 1.0)[1]
    assert 1 <= np.diag(gram_of(blocks)).max() < 1.01
    assert blocks.alone[0] >= 1e-3
    assert chains_above(4 * full, 1.0)[1].alone[0] >= 4e-3


def test_what_is_no_number_bounds_nothing(monkeypatch):
    assert chains._least(lambda epsilon: math.nan, 1e-5, 0.0, 3.0) == math.inf
    monkeypatch.setattr(Law, "put", lambda self, strike: math.nan)
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

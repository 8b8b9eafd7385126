"""Chains of log-normals against quadrature, paths, samples and the normals that they stand for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from chain_cases import SMALL, STILL, gram_of, quadrature
from rootnoise import accounting
from rootnoise.accounting import bin_chain as chains
from rootnoise.accounting.bin_chain import Chain, Lattice
from rootnoise.accounting.bin_series import Law
from rootnoise.accounting.random_allocation import inequality_of_means


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


def test_what_is_no_number_bounds_nothing(monkeypatch):
    assert chains._least(lambda epsilon: math.nan, 1e-5, 0.0, 3.0) == math.inf
    monkeypatch.setattr(Law, "put", lambda self, strike: math.nan)
    assert SMALL[0].upper(1e-3, 6.0) == math.inf
    assert SMALL[0].lower(1e-3, 6.0) == 0

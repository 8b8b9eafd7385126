"""The dual: patterns that people may follow, points that are bounds, a gradient that is right."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from rootnoise.bounds import dual
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD
from strategies import participations


@given(st.data())
def test_patterns_are_admissible_and_cover_every_step(data):
    n = data.draw(st.integers(1, 12))
    who = data.draw(participations(n))
    fixed = isinstance(who, FixedCycle)
    allowed = set(oracle.patterns(n, who.min_sep, who.max_participations, fixed))
    for choose in (dual.cycles, dual.patterns):
        found = [tuple(int(t) for t in p) for part in choose(n, who) for p in part]
        assert len(set(found)) == len(found)
        assert set(found) <= allowed | {tuple(range(i, n, who.min_sep)) for i in range(n) if fixed}
        assert {t for p in found for t in p} == set(range(n))


@pytest.mark.parametrize("who", [SingleParticipation(), CyclicPoisson(2, 0.5)])
def test_one_participation_has_one_pattern_a_step(who):
    (patterns,) = dual.patterns(5, who)
    assert patterns.tolist() == [[0], [1], [2], [3], [4]]


def problem(n, who, momentum=0.5):
    a = SGD(n, momentum).matrix.dense()
    return a, dual.Problem(a[:, :, None], dual.patterns(n, who))


@pytest.mark.parametrize(
    "who", [SingleParticipation(), FixedCycle(3, 4), FixedCycle(4, 3), MinSeparation(3, 3)]
)
def test_points_are_feasible_and_their_value_is_the_nuclear_norm(who):
    a, task = problem(11, who)
    for point in islice(dual.ascend(task), 6):
        r = dual.scatter(point.factors, task.patterns, 11).toarray()
        weights = [np.square(f).sum(2) for f in point.factors]
        assert sum(w.max(1).sum() for w in weights) == pytest.approx(1)
        assert all(np.allclose(w, w[:, :1]) for w in weights)
        norm = np.linalg.svd(a @ r, compute_uv=False).sum()
        assert point.value == pytest.approx(norm, rel=1e-9)
        assert point.value <= norm


@pytest.mark.parametrize("gain", [None, np.linspace(1, 2, 6)])
def test_x_is_twice_the_gradient_in_y(gain):
    # With two columns a step; along a direction inside the support of Y.
    rng = np.random.default_rng(0)
    a, patterns = rng.normal(size=(15, 6, 2)), (np.array([[0, 2, 4], [1, 3, 5]]),)
    task = dual.Problem(a, patterns, gain)
    base = tuple(np.tril(rng.normal(size=(2, 3, 3))) + 2 * np.eye(3) for _ in range(1))

    def value(scale):
        point = dual._evaluate(task, (base[0] * scale,), np.zeros(0))
        return point.value, point.x

    r = dual.scatter(base, patterns, 6)
    y, step = (r @ r.T).toarray(), 1e-5
    # Y grows by 2 step Y: the value by <X, step Y>.
    slope = (value(1 + step)[0] - value(1 - step)[0]) / (2 * step)
    assert np.vdot(value(1)[1], y) == pytest.approx(slope, rel=1e-6)


def test_a_drop_is_retracted(monkeypatch):
    # A step that overshoots wildly: the ascent still ends at the optimum.
    monkeypatch.setattr(dual, "LEAP", 1e3)
    _, task = problem(24, FixedCycle(3, 8), momentum=0.9)
    values = [point.value for point in islice(dual.ascend(task), 60)]
    assert np.diff(values).min() < 0
    monkeypatch.undo()
    calm = max(point.value for point in islice(dual.ascend(task), 60))
    assert max(values) == pytest.approx(calm, rel=1e-5)

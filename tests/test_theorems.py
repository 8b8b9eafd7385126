"""The theorems on a grid, against measured errors and singular values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.bounds import nuclear_norm, theorems
from rootnoise.bounds.certificate import lower_bound
from rootnoise.factorization import factorize
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, prefix_sum

ONCE = SingleParticipation()
GRID = [
    SGD(n, momentum, decay)
    for n, momentum, decay in itertools.product(
        (2, 10, 100, 1000, 20_000), (0, 0.3, 0.5, 0.9, 0.99), (1, 0.9999, 0.999, 0.99, 0.9, 0.5)
    )
    if momentum < decay
]


@pytest.mark.parametrize("workload", GRID, ids=str)
def test_square_root_lies_between_its_bounds(workload):
    rmse = factorize(workload, ONCE, "square-root").rmse(ONCE)
    assert theorems.square_root_lower(workload) <= rmse * (1 + 1e-12)
    assert rmse <= theorems.square_root_upper(workload) * (1 + 1e-12)
    if workload.decay < 1:
        assert rmse <= theorems.square_root_limit(workload) * (1 + 1e-12)


@pytest.mark.parametrize("workload", GRID, ids=str)
def test_no_factorization_is_below_the_paper_s_bound(workload):
    sharper = nuclear_norm.nuclear_norm(workload)[0] / workload.n_steps
    assert theorems.any_lower(workload) <= sharper * (1 + 1e-9)


def test_the_square_root_tends_to_its_limit():
    workload = SGD(10**5, 0.5, 0.99)
    rmse = factorize(workload, ONCE, "square-root").rmse(ONCE)
    assert rmse == pytest.approx(theorems.square_root_limit(workload), rel=1e-3)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize(("bands", "digits"), [(10, 1e-4), (100, 2e-3), (400, 1e-2)])
def test_bsr_grows_as_proved(momentum, bands, digits):
    workload, who = SGD(2 * 10**5, momentum), MinSeparation(400, 500)
    rmse = factorize(workload, who, "bsr", bands=bands).rmse(who)
    assert theorems.bsr_growth(workload, bands, 500) == pytest.approx(rmse, rel=digits)


@pytest.mark.parametrize(
    ("workload", "who"),
    [
        (prefix_sum(60), FixedCycle(10, 6)),
        (prefix_sum(57), FixedCycle(10, 6)),
        (prefix_sum(60), MinSeparation(10, 3)),
        (SGD(60, 0.9, 0.999), FixedCycle(2, 30)),
        (SGD(60, 0.9), ONCE),
    ],
    ids=str,
)
def test_repeated_participation(workload, who):
    simple = theorems.repeated_lower(workload, who)
    assert simple <= lower_bound(workload, who, "tight").value
    assert simple <= factorize(workload, who, "bsr").rmse(who)


def test_constant_contributions_cost_k_over_root_3():
    bound = theorems.repeated_lower(prefix_sum(10_000), FixedCycle(10, 1000))
    assert bound == pytest.approx(1000 / np.sqrt(3), rel=2e-3)


def test_refusals():
    with pytest.raises(RootnoiseError, match=r"momentum must be < decay=0.5 .*, got 0.5"):
        theorems.square_root_upper(SGD(5, 0.5, 0.5))
    with pytest.raises(RootnoiseError, match=r"decay must be < 1 .*, got 1.0"):
        theorems.square_root_limit(SGD(5))
    with pytest.raises(RootnoiseError, match=r"decay must be 1 .*, got 0.5"):
        theorems.bsr_growth(SGD(5, 0, 0.5), 1, 1)
    with pytest.raises(RootnoiseError, match=r"bands must be in \[1, n_steps=5\], got 6"):
        theorems.bsr_growth(SGD(5), 6, 1)
    with pytest.raises(RootnoiseError, match="participations must be >= 1, got 0"):
        theorems.bsr_growth(SGD(5), 1, 0)
    with pytest.raises(RootnoiseError, match="n_steps must be in"):
        theorems.repeated_lower(SGD(5), FixedCycle(2, 2))

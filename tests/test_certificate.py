"""Certificates: what they prove, that tampering shows, and that no factorization is better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from rootnoise._check import RootnoiseError
from rootnoise.bounds.certificate import Certificate, Effort, Witness, check, lower_bound
from rootnoise.factorization import factorize, mechanisms
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, ToeplitzWorkload, prefix_sum
from strategies import participations

ONCE = SingleParticipation()
VALUES = json.loads((Path(__file__).parent / "reference" / "values.json").read_text())
CASES = [
    (prefix_sum(24), ONCE),
    (SGD(23, 0.9), FixedCycle(6, 4)),
    (SGD(24, 0.5, 0.9), MinSeparation(6, 4)),
    (prefix_sum(24), MinSeparation(4, 2)),
    (prefix_sum(24), CyclicPoisson(4, 0.5)),
    (MatrixWorkload(np.tri(9) + np.diag(np.arange(9.0))), FixedCycle(3, 3)),
    (ScheduledSGD(np.append(np.linspace(1, 0.1, 11), 0.0), momentum=0.9), FixedCycle(4, 3)),
]


def participation(inputs, kind):
    k = inputs.get("k", 1)
    return ONCE if k == 1 else kind(inputs["b"], k)


@pytest.mark.parametrize(
    ("name", "kind", "loss"),
    [
        ("AOF_optimum_single", FixedCycle, 1e-4),
        ("AOF_optimum_fixed_epoch", FixedCycle, 2e-3),
        ("AOF_optimum_min_sep_bruteforce", MinSeparation, 1e-3),
    ],
)
def test_reference(name, kind, loss):
    checked = 0
    for item in VALUES:
        i = item["inputs"]
        if item["name"] == name and i["n"] <= 128:
            who = participation(i, kind)
            bound = lower_bound(SGD(i["n"], i["beta"], i["alpha"]), who).value
            # Reference values are printed to six digits, or right to 1e-6.
            assert item["value"] * (1 - loss) < bound < item["value"] * (1 + 1e-6)
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("n", "momentum", "who", "optimum"),
    [
        (128, 0.0, ONCE, 2.3110012453570525),
        (128, 0.0, FixedCycle(32, 4), 4.80450742633934),
        (64, 0.9, FixedCycle(16, 4), 25.568130799227223),
        (9, 0.9, MinSeparation(3, 3), 8.097094),
    ],
)
def test_tight(n, momentum, who, optimum):
    bound = lower_bound(SGD(n, momentum), who, "tight").value
    assert bound == pytest.approx(optimum, rel=5e-5)
    assert bound < optimum * (1 + 1e-6)


@pytest.mark.parametrize(("workload", "who"), CASES, ids=str)
def test_check_proves_the_value(workload, who):
    certificate = lower_bound(workload, who)
    assert certificate.method == "optimised dual"
    assert check(certificate, workload, who) == certificate.value
    # <Q, A R> by hand, from the matrix that the oracle would make.
    witness, a = certificate.witness, workload.matrix.dense()
    assert np.vdot(witness.q, a @ witness.r) / np.sqrt(len(a)) == pytest.approx(
        certificate.value, rel=1e-5
    )


@pytest.mark.parametrize("who", [MinSeparation(3, 3), FixedCycle(3, 3), MinSeparation(2, 2)])
def test_sensitivity_is_at_least_what_y_sees(who):
    # The heart of weak duality: sens(C)^2 >= <C^T C, Y> for any C; here against brute force.
    r = lower_bound(SGD(8, 0.5), who).witness.r
    rng = np.random.default_rng(0)
    fixed = isinstance(who, FixedCycle)
    for _ in range(5):
        c = np.tril(rng.normal(size=(8, 8)))
        seen = np.linalg.norm(c @ r)
        assert seen <= oracle.sensitivity_at_most(c, who.min_sep, who.max_participations, fixed)
        grown = np.abs(c)
        assert np.linalg.norm(grown @ r) <= oracle.sensitivity(
            grown, who.min_sep, who.max_participations, fixed
        ) * (1 + 1e-9)


@pytest.mark.parametrize(("n", "optimum"), [(16, 1.70448), (64, 2.11137)])
def test_the_worst_step(n, optimum):
    # gamma_2 of prefix sums, by another solver, to six digits.
    certificate = lower_bound(prefix_sum(n), ONCE, "tight", "max")
    assert certificate.value == pytest.approx(optimum, rel=5e-6)
    assert check(certificate, prefix_sum(n), ONCE) == certificate.value
    # At most the factorization norm: that of the square root is known.
    assert certificate.gap(factorize(prefix_sum(n), ONCE, "square-root").max_error(ONCE)) > 0.13
    assert lower_bound(prefix_sum(n), ONCE, "tight").value < certificate.value


@pytest.mark.parametrize(("workload", "who"), CASES, ids=str)
def test_no_mechanism_has_a_better_worst_step(workload, who):
    certificate = lower_bound(workload, who, objective="max")
    assert certificate.value > lower_bound(workload, who).value
    for mechanism in ("bsr", "dense", "identity", "workload"):
        try:
            reached = factorize(workload, who, mechanism).max_error(who)
        except RootnoiseError:  # singular workloads, and bands that cyclic sampling does not allow
            continue
        assert certificate.value <= reached * (1 + 1e-9)


def test_tampering_with_the_weights():
    workload, who = prefix_sum(24), ONCE
    honest = lower_bound(workload, who, objective="max")
    w = np.asarray(honest.witness.weights)
    assert check(tampered(honest, weights=3 * w), workload, who) == pytest.approx(honest.value)
    assert check(tampered(honest, weights=np.eye(24)[-1]), workload, who) < honest.value
    for bad in (None, w[1:], -w, 0 * w):
        with pytest.raises(RootnoiseError, match="must have a weight >= 0 of every one of 24"):
            check(tampered(honest, weights=bad), workload, who)


def test_long_runs_bound_the_worst_step_by_the_mean():
    rmse, worst = (lower_bound(SGD(3000), ONCE, objective=name) for name in ("rmse", "max"))
    assert worst.value == rmse.value
    assert (rmse.objective, worst.objective) == ("rmse", "max")


def tampered(certificate, **changes):
    return replace(certificate, witness=replace(certificate.witness, **changes))


def test_tampering_never_raises_the_bound():
    workload, who = CASES[1]
    honest = lower_bound(workload, who)
    r, q = honest.witness.r, honest.witness.q
    rng = np.random.default_rng(1)
    assert check(tampered(honest, r=3 * r), workload, who) == pytest.approx(honest.value)
    for better in (2 * q, q + 1e-2 * rng.normal(size=q.shape), -q):
        assert check(tampered(honest, q=better), workload, who) < honest.value
    # More weight on one pattern is divided out again.
    heavy = r * np.where(honest.witness.owner == 0, 5, 1)
    assert check(tampered(honest, r=heavy), workload, who) < honest.value
    # A worse workload has a certificate of its own.
    assert check(honest, prefix_sum(23), who) < lower_bound(prefix_sum(23), who).value * (1 + 1e-9)


def test_a_witness_with_few_columns():
    # One person who always takes part: R = 1_pi, Q = A R / |A R|.
    workload, who = prefix_sum(6), FixedCycle(2, 3)
    r = np.array([1.0, 0, 1, 0, 1, 0])[:, None]
    ar = workload.matrix.dense() @ r
    witness = Witness(r, ar / np.linalg.norm(ar), np.zeros(1, int))
    proved = check(Certificate(0, "by hand", witness), workload, who)
    assert proved == pytest.approx(np.linalg.norm(ar) / np.sqrt(6), rel=1e-9)
    assert proved <= np.linalg.norm(ar) / np.sqrt(6)


def test_refusals():
    workload, who = prefix_sum(6), FixedCycle(2, 3)
    honest = lower_bound(workload, who)
    everyone = np.zeros_like(honest.witness.owner)
    for other in (ONCE, FixedCycle(3, 2), MinSeparation(2, 2), MinSeparation(3, 2)):
        with pytest.raises(RootnoiseError, match=r"witness must link only steps of one person"):
            check(honest, workload, other)
    close = lower_bound(prefix_sum(8), MinSeparation(3, 2))
    with pytest.raises(RootnoiseError, match=r"witness must link only steps .* at least 4 apart"):
        check(close, prefix_sum(8), MinSeparation(4, 2))
    with pytest.raises(RootnoiseError, match=r"link only steps of one person .*, got \[0 1 2 3 4"):
        check(tampered(honest, owner=everyone), workload, who)
    with pytest.raises(RootnoiseError, match=r"R and Q of 6 rows .*, got \(6, 6\), \(5, 6\)"):
        check(tampered(honest, q=honest.witness.q[:5]), workload, who)
    with pytest.raises(RootnoiseError, match="must hold a witness, got method 'nuclear"):
        check(Certificate(1.0, "nuclear norm"), workload, who)
    with pytest.raises(RootnoiseError, match="effort must be fast or tight, got 'lazy'"):
        lower_bound(workload, who, "lazy")
    with pytest.raises(RootnoiseError, match="objective must be rmse or max, got 'mean'"):
        lower_bound(workload, who, objective="mean")
    with pytest.raises(RootnoiseError, match="n_steps must be in"):
        lower_bound(workload, FixedCycle(2, 2))


def test_the_gap():
    certificate = lower_bound(prefix_sum(16), ONCE, Effort.TIGHT)
    assert certificate.gap(1.1 * certificate.value) == pytest.approx(0.1)


@settings(max_examples=80)
@given(
    st.data(),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([1.0, 0.99, 0.7]),
    st.sampled_from(mechanisms()),
)
def test_no_factorization_is_better(data, n, momentum, decay, mechanism):
    poisson = st.builds(CyclicPoisson, st.integers(1, n), st.just(0.5))
    who = data.draw(st.one_of(st.just(ONCE), participations(n), poisson))
    workload = SGD(n, momentum, decay)
    try:
        rmse = factorize(workload, who, mechanism).rmse(who)
    except RootnoiseError:  # a mechanism may refuse a participation; it may not beat the bound
        return
    assert lower_bound(workload, who).value <= rmse * (1 + 1e-9)


@pytest.mark.parametrize(
    ("workload", "who", "gap"),
    [
        (prefix_sum(10**6), ONCE, 0.04),
        (SGD(10**6, 0.9), FixedCycle(10**4, 100), 0.5),
        (prefix_sum(10**5), MinSeparation(10**4, 10), 0.2),
        (SGD(2000, 0.9), FixedCycle(100, 20), 0.2),
    ],
    ids=str,
)
def test_long_runs(workload, who, gap):
    certificate = lower_bound(workload, who)
    assert "compressed" in certificate.method
    assert certificate.witness is None
    assert 0 < certificate.gap(factorize(workload, who, "bsr").rmse(who)) < gap


@pytest.mark.parametrize(
    ("workload", "who", "method"),
    [
        (SGD(2000, 0.0, 0.9), ONCE, "nuclear norm (log-determinant integral)"),
        (ToeplitzWorkload(np.arange(1, 2001.0) ** -0.3), ONCE, "nuclear norm (circulant)"),
        (prefix_sum(2**18), MinSeparation(1, 2**18), "one constant pattern"),
    ],
    ids=str,
)
def test_other_routes(workload, who, method):
    certificate = lower_bound(workload, who)
    assert certificate.method == method
    assert certificate.value <= factorize(workload, who, "bsr").rmse(who)


@pytest.mark.parametrize(
    ("workload", "who", "optimum"),
    [
        (prefix_sum(1000), ONCE, 2.948048),
        (prefix_sum(1000), FixedCycle(100, 10), 10.536642),
        (SGD(1000, 0.9), FixedCycle(100, 10), 80.313),
    ],
    ids=str,
)
def test_up_to_1024_steps_are_solved_whole_at_once(workload, who, optimum):
    certificate = lower_bound(workload, who)
    assert certificate.method == "optimised dual"
    assert optimum * (1 - 1e-3) < certificate.value < optimum * (1 + 1e-6)
    assert lower_bound(prefix_sum(1025), ONCE).witness is None

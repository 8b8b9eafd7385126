"""Every number of tests/reference/values.json that this release can compute, to 1e-9 relative.

The values come from code independent of this project; their README says how each was checked.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rootnoise import accounting
from rootnoise.bounds import nuclear_norm
from rootnoise.bounds.certificate import lower_bound
from rootnoise.causal import series
from rootnoise.factorization import factorize
from rootnoise.participation import (
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    Participation,
    SingleParticipation,
)
from rootnoise.workload import SGD

VALUES = json.loads((Path(__file__).parent / "reference" / "values.json").read_text())


def participation(inputs):
    k = inputs.get("k", 1)
    return SingleParticipation() if k == 1 else MinSeparation(inputs["b"], k)


def split(inputs, mechanism, **options):
    workload = SGD(inputs["n"], inputs["beta"], inputs["alpha"])
    return factorize(workload, participation(inputs), mechanism, **options)


def rmse(inputs, mechanism, **options):
    return split(inputs, mechanism, **options).rmse(participation(inputs))


def first8(exponent):
    return lambda i: series.sgd_power(i["alpha"], i["beta"], exponent, 8)


def tree(inputs, estimator):
    who = SingleParticipation()
    made = factorize(SGD(inputs["n"]), who, "tree", estimator=estimator)
    # The reference counts every node; what is released up to step n needs fewer of them.
    sens = (np.log2(inputs["n"]) + 1) ** 0.5
    return sens * float(np.sqrt(np.mean(made.decoder.row_norms() ** 2)))


COMPUTE = {
    "workload_coefficients_first8": first8(1.0),
    "sqrt_coefficients_first8": first8(0.5),
    "inverse_sqrt_coefficients_first8": first8(-0.5),
    "sqrt_coefficient_at_index": lambda i: series.sgd_power(i["alpha"], i["beta"], 0.5, i["j"] + 1)[
        -1
    ],
    "sens_bsr": lambda i: split(i, "bsr", bands=i["p"]).sensitivity(participation(i)).value,
    "E_bsr": lambda i: rmse(i, "bsr", bands=i["p"]),
    "E_bsr_best_p": lambda i: rmse(i, "bsr", bands=i["best_p"]),
    "E_A_times_Id": lambda i: rmse(i, "identity"),
    "E_Id_times_A": lambda i: rmse(i, "workload"),
    "E_bisr": lambda i: rmse(i, "bisr", bands=i["p"]),
    "E_lambda_cgd_unnormalised": lambda i: rmse(i, "lambda-cgd", lam=i["lam"]),
    "E_banded_toeplitz_optimised_p_eq_b": lambda i: rmse(i, "banded", bands=i["p"]),
    "E_column_normalised_sqrt_prefix_single": lambda i: rmse(i, "column-normalised"),
    "E_epoch_scaled_bsr": lambda i: rmse(i, "epoch-scaled", bands=i["p"]),
    "E_tree_full_pinv_prefix_single": lambda i: tree(i, "full"),
    "E_tree_naive_prefix_single": lambda i: tree(i, "naive"),
    "uniform_dual_lower_bound_single": lambda i: (
        nuclear_norm.nuclear_norm(SGD(i["n"], i["beta"], i["alpha"]))[0] / i["n"]
    ),
    "uniform_dual_prefix_closed_form": lambda i: nuclear_norm.prefix_sum(i["n"]) / i["n"],
    "gaussian_sigma": lambda i: accounting.noise_multiplier(
        SingleParticipation(), 1, i["eps"], i["delta"]
    ),
}


@pytest.mark.parametrize("name", COMPUTE)
def test_agrees(name):
    cases = [value for value in VALUES if value["name"] == name]
    assert cases
    for case in cases:
        computed = COMPUTE[name](case["inputs"])
        np.testing.assert_allclose(
            computed, case["value"], rtol=1e-9, atol=1e-300, err_msg=str(case["inputs"])
        )


def test_square_root_sensitivity_approaches_its_limit():
    cases = [value for value in VALUES if value["name"] == "sens2_sqrt_infinite_n_single"]
    assert cases
    for case in cases:
        i = case["inputs"] | {"n": 200_000}
        sens = split(i, "square-root").sensitivity(SingleParticipation())
        assert sens.value**2 == pytest.approx(case["value"], rel=1e-9)


def test_cyclic_poisson_is_an_upper_bound_within_a_thousandth():
    cases = [value for value in VALUES if value["name"] == "cyclic_poisson_epsilon_pld"]
    assert cases
    for case in cases:
        i = case["inputs"]
        who = CyclicPoisson(i["bands"], i["q"])
        cost = accounting.privacy_cost(who, i["n"], i["noise_multiplier"], i["delta"])
        # The reference is itself a pessimistic PLD, on a finer grid.
        assert case["value"] * (1 - 1e-6) <= cost.epsilon <= case["value"] * 1.001


@pytest.mark.parametrize(
    "case",
    [v for v in VALUES if v["name"].startswith("AOF_optimum") and v["inputs"]["n"] <= 250],
    ids=lambda v: str(v["inputs"]),
)
def test_certificates_and_the_dense_mechanism_enclose_the_optimum(case):
    """The bound is rigorous for this workload; dense comes within a thousandth of the optimum."""
    i = case["inputs"]
    work = SGD(i["n"], i["beta"], i["alpha"])
    who: Participation
    if "k" not in i:
        who = SingleParticipation()
    elif case["name"] == "AOF_optimum_fixed_epoch":
        who = FixedCycle(i["b"], i["k"])
    else:
        who = MinSeparation(i["b"], i["k"])
    bound = lower_bound(work, who, "tight").value
    optimum = case["value"] * (1 + 1e-5)  # given to 6 digits at worst, or from a primal
    assert bound <= optimum
    assert bound >= case["value"] * (0.995 if isinstance(who, MinSeparation) else 0.9999)
    if not isinstance(who, MinSeparation):
        found = factorize(work, who, "dense").rmse(who)
        assert bound <= found <= optimum * 1.001


def test_nothing_that_this_release_computes_is_left_out():
    later = {"E_group_algebra_prefix_single"}  # a baseline that no mechanism here implements
    elsewhere = {"E_tree_online_honaker_prefix_single"}  # tests/test_tree.py
    optima = {name for name in (v["name"] for v in VALUES) if name.startswith("AOF_optimum")}
    tested = set(COMPUTE) | {"sens2_sqrt_infinite_n_single", "cyclic_poisson_epsilon_pld"}
    names = {value["name"] for value in VALUES}
    assert names == tested | later | elsewhere | optima

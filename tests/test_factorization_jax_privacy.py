"""No family of factorizations has a larger error here than in JAX-Privacy 2.0, size by size.

Its values are in tests/reference/jax_privacy.json, from its optimisers as they come.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rootnoise.factorization import factorize
from rootnoise.participation import FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD

PUBLISHED = json.loads((Path(__file__).parent / "reference/jax_privacy.json").read_text())
CASES = PUBLISHED["factorizations"]


def made(case, cycle=FixedCycle):
    who = SingleParticipation() if case["k"] == 1 else cycle(case["b"], case["k"])
    work = SGD(case["n"], case["momentum"])
    return factorize(work, who, case["mechanism"], **case["options"]), who


def name(case):
    options = "-".join(str(value) for value in case["options"].values())
    return f"{case['mechanism']}-{options}-{case['n']}-{case['k']}-{case['momentum']}-{case['how']}"


@pytest.mark.parametrize("case", [case for case in CASES if "rmse" in case], ids=name)
def test_the_error_is_at_most_theirs(case):
    found, who = made(case)
    assert found.rmse(who) <= case["rmse"] * (1 + 1e-6)


# What has no option to be optimised is the same matrix.
@pytest.mark.parametrize(
    "case", [case for case in CASES if case["mechanism"] in ("square-root", "bsr")], ids=name
)
def test_closed_forms_and_sensitivities_agree(case):
    for cycle in (FixedCycle, MinSeparation):
        found, who = made(case, cycle)
        if "rmse" in case:
            assert found.rmse(who) == pytest.approx(case["rmse"], rel=1e-12)
        else:
            assert found.sensitivity(who).value == pytest.approx(case["sensitivity"], rel=1e-12)
            assert found.sensitivity(who).exact


def test_every_family_is_compared_once_and_several_times():
    families = {case["mechanism"] for case in CASES}
    assert families == {
        *("square-root", "bsr", "banded", "column-normalised", "bandmf"),
        *("banded-inverse", "blt", "dense"),
    }
    for family in families:
        sizes = {(c["n"], c["k"]) for c in CASES if c["mechanism"] == family}
        assert sizes >= {(100, 1), (100, 4), (256, 1), (256, 4)}

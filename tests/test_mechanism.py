"""The mechanism: what it holds, its file, and every edit that is found."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from rootnoise import RootnoiseError, accounting, mechanism
from rootnoise._check import refuse_edits
from rootnoise.accounting import Trials, tuned_noise_multiplier, tuned_privacy_cost
from rootnoise.bounds.certificate import lower_bound
from rootnoise.bounds.optimality import Optimality
from rootnoise.causal import Toeplitz
from rootnoise.factorization import factorize, mechanisms
from rootnoise.mechanism import Mechanism
from rootnoise.participation import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    SingleParticipation,
)
from rootnoise.workload import SGD, ToeplitzWorkload, prefix_sum

CYCLE = FixedCycle(10, 4)
BSR = factorize(SGD(40, 0.9), CYCLE, "bsr")


def make(**changes):
    options = {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 2.0} | changes
    return Mechanism.calibrate(BSR, CYCLE, **options)


def test_what_it_holds():
    made = make()
    assert made.epsilon == pytest.approx(8, rel=1e-8)
    assert made.epsilon <= 8
    assert made.n_steps == 40
    assert made.noise_multiplier == pytest.approx(0.6002290722)
    assert made.noise_std == made.noise_multiplier * 2.0 * made.sensitivity.value
    assert made.sensitivity == BSR.sensitivity(CYCLE)
    assert made.rmse == BSR.rmse(CYCLE)
    assert made.noising.bands == 40


def test_noise_multiplier_can_be_given():
    made = make(epsilon=None, noise_multiplier=1.0)
    assert made.noise_multiplier == 1.0
    assert made.epsilon == pytest.approx(4.377178096, rel=1e-8)


def test_it_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field"):
        make().clip_norm = 7.0


@pytest.mark.parametrize(
    ("who", "work"),
    [
        (SingleParticipation(), prefix_sum(12)),
        (MinSeparation(3, 4), SGD(12, 0.5, 0.9)),
        (FixedCycle(4, 3), ToeplitzWorkload([1.0, 0.7, 0.4, 0.1] * 3)),
        (CyclicPoisson(2, 0.5), prefix_sum(12)),
    ],
)
def test_file_round_trip(tmp_path, who, work):
    split = factorize(work, who, "bsr", bands=2)
    made = Mechanism.calibrate(split, who, epsilon=3, delta=1e-6)
    made.save(tmp_path / "mechanism.json")
    again = Mechanism.load(tmp_path / "mechanism.json")
    assert again.to_dict() == made.to_dict()
    assert again.fingerprint == made.fingerprint


@pytest.mark.parametrize("name", mechanisms())
def test_every_factorization_survives_its_file(tmp_path, name):
    made = Mechanism.calibrate(factorize(SGD(40, 0.9), CYCLE, name), CYCLE, epsilon=3, delta=1e-6)
    made.save(tmp_path / "mechanism.json")
    again = Mechanism.load(tmp_path / "mechanism.json")
    assert again.to_dict() == made.to_dict()


def edits(tree, path=()):
    """Yield (path, edited copy) with each leaf of the tree changed, one at a time."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from edits(value, (*path, key))
            continue
        other: object
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value + 1
        elif isinstance(value, float):
            other = value * 1.001
        else:
            other = value + "x"
        yield (*path, key), other


FILE = json.loads(json.dumps(make().certify().to_dict()))
EDITS = list(edits(FILE))


@pytest.mark.parametrize(("path", "other"), EDITS, ids=lambda value: str(value)[:60])
def test_every_edit_of_the_file_is_refused(tmp_path, path, other):
    fields = json.loads(json.dumps(FILE))
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = other
    (tmp_path / "m.json").write_text(json.dumps(fields))
    with pytest.raises(RootnoiseError, match="got"):
        Mechanism.load(tmp_path / "m.json")


@pytest.mark.parametrize("field", ["fingerprint", "claim", "derived", "definition", "schema"])
def test_a_missing_field_is_refused(field):
    fields = {name: value for name, value in FILE.items() if name != field}
    with pytest.raises(RootnoiseError, match=r"must|definition"):
        Mechanism.from_dict(fields)


def test_an_extra_field_is_refused():
    with pytest.raises(RootnoiseError, match=r"^file must match what its definition gives"):
        Mechanism.from_dict({**FILE, "epsilon": 1.0})
    definition = {**FILE["definition"], "sensitivity": 1.0}
    with pytest.raises(RootnoiseError, match="definition must hold exactly a mechanism's fields"):
        Mechanism.from_dict({**FILE, "definition": definition})


def test_fingerprint_tells_mechanisms_apart():
    prints = {
        made.fingerprint
        for made in (
            make(),
            make(epsilon=4.0),
            make(delta=1e-6),
            make(clip_norm=1.0),
            Mechanism.calibrate(
                factorize(SGD(40, 0.9), CYCLE, bands=3), CYCLE, epsilon=8, delta=1e-5
            ),
            Mechanism.calibrate(BSR, MinSeparation(10, 4), epsilon=8, delta=1e-5),
        )
    }
    assert len(prints) == 6
    assert make().fingerprint == make().fingerprint


def test_claims_say_what_an_auditor_needs():
    claim = make().claim()
    for words in (
        "(8, 1e-05)-differential privacy for one record zeroed out",
        "one step in each of 4 epochs, exactly 10 apart, in 40 steps",
        "clipped to l2 norm 2",
        "bsr with 10 band(s) and sensitivity",
        "(exact: orthogonal columns)",
        "noise multiplier 0.600229072",
        "Epsilon is exact (analytic Gaussian)",
        "Not covered: floating-point effects",
    ):
        assert words in claim
    split = factorize(prefix_sum(40), CyclicPoisson(1, 0.1), "identity")
    claim = Mechanism.calibrate(split, CyclicPoisson(1, 0.1), epsilon=2, delta=1e-5).claim()
    assert "added to or removed from the data set" in claim
    assert "with probability 0.1 at every step" in claim
    assert "Epsilon is an upper bound (PLD of 40 Poisson-subsampled Gaussians)" in claim


def test_a_bounded_sensitivity_is_claimed_as_a_bound():
    rough = Toeplitz([1, -0.8, 0.9, -0.4, 0.7, 0.1], 6)
    made = Mechanism("custom", prefix_sum(6), MinSeparation(1, 3), rough, 1.0, 1e-5)
    assert not made.sensitivity.exact
    assert "(an upper bound: dynamic programming over the Gram matrix)" in made.claim()
    assert "Epsilon is an upper bound" in made.claim()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.000000000799999, "8.00001"),
        (8.0, "8"),
        (8.00001, "8.00001"),
        (8.000001, "8.00001"),
        (0.0, "0"),
    ],
)
def test_claimed_epsilon_is_rounded_up(value, text):
    assert accounting.round_up(value) == text


def test_saving_overwrites_only_when_asked(tmp_path):
    path = tmp_path / "mechanism.json"
    make().save(path)
    before = path.read_bytes()
    with pytest.raises(RootnoiseError, match=r"path must not exist yet, got .*mechanism.json"):
        make(epsilon=1.0).save(path)
    assert path.read_bytes() == before
    make(epsilon=1.0).save(path, overwrite=True)
    assert Mechanism.load(path).epsilon == pytest.approx(1)
    assert [file.name for file in tmp_path.iterdir()] == ["mechanism.json"]


def test_calibration_to_rho_or_mu_is_to_the_same_noise():
    for goal in ({"rho": 0.125}, {"mu": 0.5}, {"noise_multiplier": 2.0}):
        mechanism = make(epsilon=None, **goal)
        assert mechanism.noise_multiplier == 2.0
        assert (mechanism.privacy.rho, mechanism.privacy.mu) == (0.125, 0.5)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: make(noise_multiplier=1.0),
            "give exactly one of epsilon, noise_multiplier, rho, mu, got .*noise_multiplier",
        ),
        (lambda: make(epsilon=None), "give exactly one of epsilon, .*, mu, got none"),
        (lambda: make(clip_norm=0), "clip_norm must be a finite number > 0, got 0.0"),
        (lambda: make(clip_norm=float("inf")), "clip_norm must be a finite number > 0, got inf"),
        (lambda: make(delta=1), "delta must be a finite number > 0 and < 1, got 1.0"),
        (lambda: make(epsilon=-1), "epsilon must be a finite number > 0, got -1.0"),
        (
            lambda: Mechanism("x", prefix_sum(5), CYCLE, Toeplitz([1.0], 4), 1.0, 1e-5),
            "strategy must cover the workload's n_steps=5, got 4",
        ),
        (
            lambda: Mechanism("x", prefix_sum(5), CYCLE, Toeplitz([1.0], 5), 1.0, 1e-5),
            "n_steps must be in .*, got 5",
        ),
    ],
)
def test_refusals(call, line):
    with pytest.raises(RootnoiseError, match=line):
        call()


def test_file_refusals(tmp_path):
    with pytest.raises(RootnoiseError, match=r"path must be readable, got .*nowhere.json: No such"):
        Mechanism.load(tmp_path / "nowhere.json")
    with pytest.raises(RootnoiseError, match=r"path must be writable, got .*: No such file"):
        make().save(tmp_path / "no" / "folder.json")
    for text, line in (("{", "path must hold JSON"), ("[]", "path must hold a JSON object")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RootnoiseError, match=line):
            Mechanism.load(tmp_path / "bad.json")


def test_gap_is_that_of_the_certificate():
    made, bound = make(), lower_bound(SGD(40, 0.9), CYCLE)
    assert made.certificate().value == pytest.approx(bound.value, rel=1e-12)
    assert made.gap() == pytest.approx(made.rmse / bound.value - 1, rel=1e-9)
    assert made.gap() >= made.gap("tight") * (1 - 1e-9) > 0
    with pytest.raises(RootnoiseError, match="effort must be fast or tight, got 'none'"):
        made.gap("none")


def test_the_file_holds_the_gap_and_loading_believes_it(tmp_path, monkeypatch):
    made = make()
    made.certify().save(tmp_path / "m.json")
    held = json.loads((tmp_path / "m.json").read_text())["optimality"]
    bound = lower_bound(SGD(40, 0.9), CYCLE).value
    assert held["rmse"] == made.rmse
    assert held["lower_bound"] == pytest.approx(bound, rel=1e-9)
    assert held["gap"] == held["rmse"] / held["lower_bound"] - 1

    def refuse(*_):
        raise AssertionError("the bound takes seconds")

    with monkeypatch.context() as patch:
        patch.setattr(mechanism, "lower_bound", refuse)
        loaded = Mechanism.load(tmp_path / "m.json")
        assert loaded.optimality.gap == held["gap"]
        assert loaded.to_dict() == made.to_dict()
    loaded.verify()


def test_saving_and_loading_solve_no_bound(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the bound takes seconds")

    monkeypatch.setattr(mechanism, "lower_bound", refuse)
    make().save(tmp_path / "m.json")
    loaded = Mechanism.load(tmp_path / "m.json")
    loaded.verify()  # it holds nothing that loading did not recompute
    assert loaded.to_dict() == make().to_dict()
    assert "optimality" not in loaded.to_dict()


def test_the_bound_is_solved_once(monkeypatch):
    solved = []

    def count(workload, participation, effort):
        solved.append(effort)
        return lower_bound(workload, participation, effort)

    monkeypatch.setattr(mechanism, "lower_bound", count)
    made = make().certify()
    assert made.gap() == made.optimality.gap
    made.certificate("fast")
    made.verify()
    assert solved == ["fast"]
    made.gap("tight")
    assert solved == ["fast", "tight"]


def test_the_bound_does_not_enter_the_noise():
    made, other = make(), make()
    other.__dict__["optimality"] = Optimality(2.0, 1.0)
    assert made.fingerprint == other.fingerprint
    assert other.to_dict()["optimality"] == {"rmse": 2.0, "lower_bound": 1.0, "gap": 1.0}


@pytest.mark.parametrize(("field", "factor"), [("rmse", 1.001), ("lower_bound", 1.01)])
def test_a_consistent_edit_of_the_gap_is_found_on_demand(field, factor):
    fields = json.loads(json.dumps(FILE))
    held = fields["optimality"]
    held[field] *= factor
    held["gap"] = held["rmse"] / held["lower_bound"] - 1
    edited = Mechanism.from_dict(fields)
    assert edited.gap() == pytest.approx(FILE["optimality"]["gap"], rel=1e-9)  # always recomputed
    with pytest.raises(RootnoiseError, match=f"optimality.{field} must match what its definition"):
        edited.verify()


@pytest.mark.parametrize(
    ("held", "line"),
    [
        (None, "optimality must be an object, got None"),
        ({}, "optimality must hold rmse and lower_bound > 0, got None and None"),
        (
            {"rmse": 1.0, "lower_bound": 0.0, "gap": 0.0},
            "optimality must hold rmse and lower_bound > 0, got 1.0 and 0.0",
        ),
        ({"rmse": "1", "lower_bound": 1.0, "gap": 0.0}, "optimality must hold rmse and"),
        ({**FILE["optimality"], "more": 1.0}, "optimality must match what its definition gives"),
    ],
)
def test_a_malformed_optimality_is_refused(held, line):
    with pytest.raises(RootnoiseError, match=line):
        Mechanism.from_dict({**FILE, "optimality": held})


@pytest.mark.parametrize("norm", [1e-11, 1e11])
def test_clip_norms_that_float32_cannot_clip_to_are_refused_when_it_is_made(norm):
    with pytest.raises(RootnoiseError, match=r"^clip_norm must be a finite number >= 1e-10 and"):
        make(clip_norm=norm)


def test_a_claim_shows_a_sensitivity_of_one_as_one():
    split = factorize(prefix_sum(12), SingleParticipation(), "identity")
    made = Mechanism.calibrate(split, SingleParticipation(), epsilon=3, delta=1e-6)
    assert "and sensitivity 1 (exact" in made.claim()


def test_what_machines_round_differently_is_no_edit():
    for off, same in ((1e-10, True), (-1e-10, True), (2e-9, False), (-2e-9, False)):
        expected, found = {"a": {"b": 0.3}}, {"a": {"b": 0.3 * (1 + off)}}
        if same:
            refuse_edits(expected, found)
        else:
            with pytest.raises(RootnoiseError, match=r"^a.b must match what its definition gives"):
                refuse_edits(expected, found)
    refuse_edits({"optimality": {"gap": 0.3}}, {"optimality": {"gap": 0.3}})
    with pytest.raises(RootnoiseError, match=r"^optimality.gap must match"):
        refuse_edits({"optimality": {"gap": 0.3}}, {"optimality": {"gap": 0.3 * (1 + 1e-12)}})


def test_errors_below_one_may_be_held():
    assert Optimality.from_dict({"rmse": 0.5, "lower_bound": 0.4}).gap == pytest.approx(0.25)
    for rmse, bound in ((0.5, 0.0), (-0.5, 0.4)):
        with pytest.raises(RootnoiseError, match=r"^optimality must hold rmse and lower_bound > 0"):
            Optimality.from_dict({"rmse": rmse, "lower_bound": bound})


def test_calibration_tells_the_accountant_its_strategy(monkeypatch):
    told, ask = [], accounting.noise_multiplier

    def asked(*arguments, strategy=None):
        told.append(strategy)
        return ask(*arguments, strategy=strategy)

    monkeypatch.setattr(accounting, "noise_multiplier", asked)
    make()
    assert told == [BSR.strategy]


def test_epsilon_spent_grows_from_nothing_to_the_claim():
    cycle = FixedCycle(4, 3)
    made = Mechanism.calibrate(
        factorize(SGD(12, 0.9), cycle, "bsr"), cycle, epsilon=4.0, delta=1e-5
    )
    spent = [made.epsilon_spent(t) for t in range(13)]
    assert spent == sorted(spent)
    assert spent[0] == 0.0 < spent[4] < spent[5] < spent[8] < spent[9]
    assert spent[12] == made.epsilon
    for t in (-1, 13):
        with pytest.raises(RootnoiseError, match=rf"t must be in \[0, 12\], got {t}"):
            made.epsilon_spent(t)


# ------------------------------------------------------------------------------------------- trials

TRIALS = [Trials(10), Trials(3, 0.0), Trials(10, math.inf)]


@pytest.mark.parametrize("trials", TRIALS, ids=str)
def test_the_best_of_many_trials_costs_what_private_selection_costs(trials):
    made = make(trials=trials)
    assert made.noise_multiplier == tuned_noise_multiplier(CYCLE, 40, 8.0, 1e-5, trials)
    assert made.privacy == tuned_privacy_cost(CYCLE, 40, made.noise_multiplier, 1e-5, trials)
    assert make().epsilon < 8 < make(trials=trials, noise_multiplier=0.6, epsilon=None).epsilon
    assert made.noise_multiplier > make().noise_multiplier
    claim = made.claim()
    assert claim.startswith(f"({accounting.round_up(made.epsilon)}, 1e-05)-differential privacy")
    assert "Epsilon is an upper bound (private selection" in claim
    assert f"the best of a random number of trials ({trials}), each with a key of its own" in claim
    assert "Not covered: floating-point effects, the data that trials were scored on" in claim
    assert made.settings()["trials"] == str(trials)
    alone = dataclasses.replace(made, trials=None)
    assert "trial" not in alone.claim()
    assert alone.epsilon < made.epsilon
    assert alone.fingerprint != made.fingerprint


@pytest.mark.parametrize("trials", TRIALS, ids=str)
def test_trials_are_written_and_read_back(trials, tmp_path):
    made = make(trials=trials)
    made.save(tmp_path / "m.json")
    again = Mechanism.load(tmp_path / "m.json")
    assert (again.trials, again.epsilon) == (trials, made.epsilon)
    assert again.fingerprint == made.fingerprint


def test_without_trials_the_file_is_what_it_was():
    assert "trials" not in FILE["definition"]
    fields = json.loads(json.dumps(FILE))
    fields["definition"]["trials"] = None
    with pytest.raises(RootnoiseError, match=r"^trials must have a mean and a shape, got None"):
        Mechanism.from_dict(fields)


@pytest.mark.parametrize("change", [{"mean": 9.0}, {"shape": 0.5}, {"shape": "poisson"}, None])
def test_an_edit_of_the_trials_is_found(change):
    fields = json.loads(json.dumps(make(trials=Trials(10)).to_dict()))
    if change is None:
        del fields["definition"]["trials"]
    else:
        fields["definition"]["trials"] |= change
    with pytest.raises(RootnoiseError, match="must match what its definition gives"):
        Mechanism.from_dict(fields)


def test_the_first_steps_of_a_trial_cost_what_the_tuning_costs():
    """A number of steps is chosen by whoever sees it: what was tried is chosen from all trials."""
    made = make(trials=Trials(10))
    assert made.epsilon_spent(0) == 0
    assert {made.epsilon_spent(t) for t in (1, 20, 40)} == {made.epsilon}
    other = tuned_privacy_cost(CYCLE, 40, made.noise_multiplier, 1e-7, Trials(10)).epsilon
    assert made.epsilon_spent(1, delta=1e-7) == other > made.epsilon


@pytest.mark.parametrize(
    ("who", "given", "line"),
    [
        (CYCLE, {"rho": 0.5}, r"^rho and mu must be left out with trials, got \{'rho': 0.5\}"),
        (CYCLE, {"mu": 0.5}, r"^rho and mu must be left out with trials, got \{'mu': 0.5\}"),
        (CyclicPoisson(1, 0.1), {"epsilon": 1.0}, r"^participation must have steps that are not"),
        (BallsInBins(10, 4), {"epsilon": 1.0}, r"^participation must have steps .* balls-in-bins"),
    ],
)
def test_trials_of_random_steps_and_other_currencies_are_refused(who, given, line):
    split = factorize(SGD(40, 0.9), who, "identity")
    with pytest.raises(RootnoiseError, match=line):
        Mechanism.calibrate(split, who, delta=1e-5, trials=Trials(10), **given)

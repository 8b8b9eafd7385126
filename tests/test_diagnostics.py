"""Diagnostics: each finding where it should be, absent elsewhere, and its numbers by other ways."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import numpy as np
import pytest

from rootnoise import RootnoiseError, accounting, diagnostics
from rootnoise.bounds.certificate import lower_bound
from rootnoise.causal import Diagonal, Product, Toeplitz
from rootnoise.cli import main
from rootnoise.diagnostics import diagnose
from rootnoise.factorization import factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.workload import SGD, MatrixWorkload, ScheduledSGD, prefix_sum

CYCLE = FixedCycle(16, 4)
ALTERNATING = np.array([1.0, 0.3, -0.5, -0.9, -1.0, 0.6, 0.8, 0.2])


def make(workload, who, name="bsr", *, epsilon=8.0, clip_norm=1.0, **options):
    split = factorize(workload, who, name, **options)
    return Mechanism.calibrate(split, who, epsilon=epsilon, delta=1e-5, clip_norm=clip_norm)


def with_strategy(strategy, who):
    return Mechanism("custom", prefix_sum(strategy.n_steps), who, strategy, 1.0, 1e-5)


def only(found, name):
    assert [finding.name for finding in found] == [name]
    assert all("\n" not in text for text in (found[0].message, found[0].remedy))
    return found[0]


# ---------------------------------------------------------------------------------- bands-too-few


@pytest.mark.parametrize("name", ["bsr", "bsr-gamma", "banded"])
def test_bands_that_close_the_gap_are_the_fewest(name):
    work = prefix_sum(64)
    mechanism = make(work, CYCLE, name, bands=2)
    numbers = only(diagnose(mechanism), "bands-too-few").numbers
    bound = lower_bound(work, CYCLE).value
    gaps = {p: factorize(work, CYCLE, name, bands=p).rmse(CYCLE) / bound - 1 for p in range(1, 17)}
    p = min(p for p, gap in gaps.items() if gap <= 0.25)
    assert (numbers["bands"], numbers["remedy_bands"]) == (2, p)
    assert numbers["gap"] == pytest.approx(gaps[2], rel=1e-9)
    assert numbers["remedy_gap"] == pytest.approx(gaps[p], rel=1e-9)
    assert diagnose(make(work, CYCLE, name, bands=p)) == []


def test_bands_that_cannot_close_the_gap_go_to_the_separation():
    work = prefix_sum(64)
    found = only(diagnose(make(work, CYCLE, bands=2), allowed_gap=0.05), "bands-too-few")
    assert found.numbers["remedy_bands"] == 16
    gap = make(work, CYCLE, bands=16).gap()
    assert gap > 0.05
    assert found.numbers["remedy_gap"] == pytest.approx(gap, rel=1e-9)
    assert found.remedy.endswith("the best that bands up to the separation do")


def test_a_slight_gain_is_no_reason_for_more_bands():
    work = prefix_sum(64)
    assert diagnose(make(work, CYCLE, bands=15), allowed_gap=0.05) == []


def test_enough_bands_other_strategies_and_schedules_are_left_alone():
    work = prefix_sum(64)
    assert make(work, CYCLE).gap() < 0.25
    assert diagnose(make(work, CYCLE)) == []
    assert diagnose(make(work, CYCLE, "identity")) == []
    flat = ScheduledSGD(np.full(64, 0.1), momentum=0.9)
    assert diagnose(make(flat, CYCLE, bands=2)) == []


# ------------------------------------------------------------------------- sensitivity-is-a-bound


def test_how_much_too_large_a_sensitivity_may_be():
    who = FixedCycle(2, 4)
    mechanism = with_strategy(Toeplitz(ALTERNATING, 8), who)
    found = only(diagnose(mechanism), "sensitivity-is-a-bound")
    columns = np.array([np.pad(ALTERNATING, (j, 0))[:8] for j in range(0, 8, 2)])
    lengths = [np.linalg.norm(s @ columns) for s in product([1.0, -1.0], repeat=4)]
    reached = max(lengths[0], np.linalg.norm(columns))
    assert found.numbers["reached"] == pytest.approx(reached, rel=1e-12)
    assert reached <= max(lengths) <= mechanism.sensitivity.value
    assert found.numbers["ratio"] == pytest.approx(mechanism.sensitivity.value / reached)
    assert found.numbers["ratio"] > 1.4
    assert "coefficients fall below 0 (to -1)" in found.message
    assert "--bands 2" in found.remedy


def test_overlapping_columns_without_toeplitz_are_named():
    scaled = Product(Toeplitz(ALTERNATING, 8), Diagonal(np.linspace(1, 2, 8)))
    found = only(diagnose(with_strategy(scaled, FixedCycle(2, 4))), "sensitivity-is-a-bound")
    assert found.message.startswith("the strategy is not Toeplitz and its columns overlap")


def test_increasing_coefficients_are_named(monkeypatch):
    monkeypatch.setattr(
        "rootnoise.participation.sensitivity._worst", lambda strategy, participation: None
    )
    rising = Toeplitz(np.array([1.0, 0.1, 0.1, 1.5, 0.1, 0.1, 1.5]), 9)
    found = only(diagnose(with_strategy(rising, MinSeparation(2, 4))), "sensitivity-is-a-bound")
    assert "coefficients increase (by up to 1.4 a step)" in found.message
    person = rising.dense()[:, ::2][:, :4].sum(axis=1)
    assert found.numbers["reached"] == pytest.approx(np.linalg.norm(person), rel=1e-12)


def test_exact_sensitivities_and_tight_bounds_are_left_alone(monkeypatch):
    strategy = Toeplitz(np.array([1.0, -0.5]), 8)
    assert diagnose(with_strategy(strategy, FixedCycle(2, 4))) == []  # orthogonal columns
    assert diagnose(with_strategy(Toeplitz(ALTERNATING, 8), SingleParticipation())) == []
    monkeypatch.setattr(
        "rootnoise.participation.sensitivity._worst", lambda strategy, participation: None
    )
    flat = with_strategy(Toeplitz(np.array([1.0, 0.0, -1e-3]), 8), FixedCycle(2, 4))
    assert not flat.sensitivity.exact
    assert diagnose(flat) == []


# ----------------------------------------------------------------------------- workload-structure


@pytest.mark.parametrize("entries", [2048, 10])
def test_a_falling_learning_rate_is_far_from_toeplitz(monkeypatch, entries):
    monkeypatch.setattr(diagnostics, "ENTRIES", entries)
    work = ScheduledSGD(np.linspace(1, 0, 64, endpoint=False), momentum=0.5)
    found = only(diagnose(make(work, CYCLE)), "workload-structure")
    a, t = work.matrix.dense(), work.neighbour.matrix.dense()
    scale = np.linalg.lstsq(t.reshape(-1, 1), a.ravel(), rcond=None)[0][0]
    distance = np.linalg.norm(a - scale * t) / np.linalg.norm(a)
    if entries == 2048:
        assert found.numbers["distance"] == pytest.approx(distance, rel=1e-9)
        assert "is at least" not in found.message
    else:
        assert 0.9 * distance < found.numbers["distance"] <= distance * (1 + 1e-9)
        assert "is at least" in found.message


def test_a_matrix_is_compared_with_the_nearest_toeplitz_matrix():
    a = np.tril(np.random.default_rng(0).random((16, 16))) + np.eye(16)
    who = FixedCycle(4, 4)
    found = only(diagnose(make(MatrixWorkload(a), who)), "workload-structure")
    basis = np.stack([np.eye(16, k=-j).ravel() for j in range(16)], axis=1)
    left = np.linalg.lstsq(basis, a.ravel(), rcond=None)[1][0] ** 0.5
    assert found.numbers["distance"] == pytest.approx(left / np.linalg.norm(a), rel=1e-9)
    for remedy in ("epoch-scaled", "dense"):
        assert diagnose(make(MatrixWorkload(a), who, remedy)) == []


def test_constant_schedules_and_toeplitz_matrices_are_left_alone():
    assert diagnose(make(ScheduledSGD(np.full(64, 0.1), momentum=0.9), CYCLE)) == []
    assert diagnose(make(MatrixWorkload(np.tril(np.ones((64, 64)))), CYCLE)) == []


# -------------------------------------------------------------------------- noise-swamps-gradient


def test_noise_against_gradients_in_numbers():
    work, d, batch = SGD(64, 0.9), 10**6, 20
    mechanism = make(work, CYCLE, clip_norm=2.0, epsilon=0.5)
    found = diagnose(mechanism, batch_size=batch, n_parameters=d, gradient_norm=0.5)
    numbers = only(found, "noise-swamps-gradient").numbers
    a, c = work.matrix.dense(), mechanism.strategy.dense()
    noise = np.linalg.inv(c) * mechanism.noise_std / batch
    way = np.sqrt(np.mean((a @ np.full(64, 0.5)) ** 2))
    run = way / np.sqrt(d * np.sum((a @ noise) ** 2) / 64)
    step = 0.5 / np.sqrt(d * np.sum(noise**2) / 64)
    assert numbers["run_ratio"] == pytest.approx(run, rel=1e-9)
    assert numbers["step_ratio"] == pytest.approx(step, rel=1e-9)
    assert numbers["run_ratio"] < 1


def test_the_stated_factor_is_what_it_takes():
    mechanism = make(prefix_sum(64), CYCLE, clip_norm=2.0)
    found = only(diagnose(mechanism, batch_size=10, n_parameters=10**6), "noise-swamps-gradient")
    batch = 10 / found.numbers["run_ratio"]
    assert diagnose(mechanism, batch_size=int(batch) + 1, n_parameters=10**6) == []
    [_] = diagnose(mechanism, batch_size=int(batch), n_parameters=10**6)
    half = diagnose(mechanism, batch_size=10, n_parameters=10**6, gradient_norm=1.0)
    assert half[0].numbers["run_ratio"] == pytest.approx(found.numbers["run_ratio"] / 2)


# ------------------------------------------------------------------------ amplification-would-win


def test_amplification_wins_at_small_epsilon_only():
    work = prefix_sum(64)
    found = diagnose(make(work, CYCLE, epsilon=0.5), batch_size=16, n_examples=256)
    numbers = only(found, "amplification-would-win").numbers
    poisson = CyclicPoisson(1, 1 / 16)
    assert accounting.privacy_cost(poisson, 64, numbers["noise_multiplier"], 1e-5).epsilon <= 0.5
    dpsgd = make(work, poisson, "identity", epsilon=0.5)
    ours = make(work, CYCLE, epsilon=0.5)
    ratio = ours.rmse * ours.noise_multiplier / (dpsgd.rmse * dpsgd.noise_multiplier)
    assert numbers["ratio"] == pytest.approx(ratio, rel=1e-3)
    assert ratio > 1.01
    assert diagnose(make(work, CYCLE, epsilon=8), batch_size=16, n_examples=256) == []
    assert diagnose(dpsgd, batch_size=16, n_examples=256) == []
    tuned = dataclasses.replace(ours, trials=accounting.Trials(10))  # no trials of random steps
    names = {finding.name for finding in diagnose(tuned, batch_size=16, n_examples=256)}
    assert "amplification-would-win" not in names


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0"),
        (
            {"batch_size": 9, "n_examples": 8},
            r"batch_size must be in \[1, n_examples=8\], got 9",
        ),
        ({"n_examples": 0}, r"n_examples must be >= 1, got 0"),
        ({"n_parameters": 0, "batch_size": 1}, r"n_parameters must be >= 1, got 0"),
        ({"n_examples": 8}, r"batch_size must be given with n_examples or n_parameters, got None"),
        ({"n_parameters": 8}, r"batch_size must be given with n_examples or n_parameters"),
        ({"gradient_norm": 0.5}, r"n_parameters must be given with gradient_norm, got None"),
        ({"gradient_norm": 1.5}, r"gradient_norm must be a finite number > 0 and <= 1, got 1.5"),
        ({"allowed_gap": 0}, r"allowed_gap must be a finite number > 0, got 0"),
        ({"effort": "none"}, r"effort must be fast or tight, got 'none'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(RootnoiseError, match=message):
        diagnose(make(prefix_sum(64), CYCLE, bands=2), **options)


# --------------------------------------------------------------------------------------- command


def test_command(tmp_path, capsys):
    path = tmp_path / "mechanism.json"
    mechanism = make(prefix_sum(64), CYCLE, bands=2, epsilon=0.5)
    mechanism.save(path)
    settings = "--batch-size 16 --dataset-size 256 --parameters 1000000 --gradient-norm 0.5"
    arguments = ["diagnose", str(path), *settings.split()]
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)["findings"]
    assert out.count("\n") == 1
    names = ["bands-too-few", "noise-swamps-gradient", "amplification-would-win"]
    assert [finding["name"] for finding in found] == names
    expected = diagnose(
        Mechanism.load(path),
        batch_size=16,
        n_examples=256,
        n_parameters=10**6,
        gradient_norm=0.5,
    )
    assert [finding["numbers"] for finding in found] == [f.numbers for f in expected]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    assert "--bands" in table


def test_command_says_that_there_is_nothing(tmp_path, capsys):
    path = tmp_path / "mechanism.json"
    make(prefix_sum(64), CYCLE).save(path)
    assert main(["diagnose", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"findings": []}
    assert main(["diagnose", str(path)]) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameters", "5"], "batch-size must be given with --dataset-size or --parameters"),
        (["--gradient-norm", "1"], "parameters must be given with --gradient-norm, got none"),
        (["--batch-size", "0"], "batch_size must be >= 1, got 0"),
    ],
)
def test_command_refusals(tmp_path, capsys, arguments, message):
    path = tmp_path / "mechanism.json"
    make(prefix_sum(64), CYCLE).save(path)
    assert main(["diagnose", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_needs_a_mechanism(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path / "none.json")]) == 2
    assert "path must be readable" in capsys.readouterr().err

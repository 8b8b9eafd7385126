"""Rounds: who is counted, faults that change nothing, and what is claimed."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

import federated_runs as runs
from federated_runs import closed
from rootnoise._check import RootnoiseError
from rootnoise.accounting import Trials
from rootnoise.factorization import factorize
from rootnoise.federated import PrivateAggregator, Reply
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation import CyclicPoisson, MinSeparation
from rootnoise.workload import SGD, ScheduledSGD
from test_federated_updates import BAD, GARBAGE


def test_the_order_of_replies_does_not_matter_to_the_last_bit(tmp_path):
    ends = []
    for order in (1, -1):
        server = runs.server(tmp_path / str(order))
        for t in range(3):
            for client in server.open(runs.there(t)).cohort[::order]:
                server.receive(t, client, runs.update(t, client))
            ends.append(closed(server))
    for ours, theirs in zip(ends[:3], ends[3:], strict=True):
        assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_a_dropout_keeps_its_turn_and_the_divisor_stays(tmp_path):
    server = runs.server(tmp_path)
    opened = server.open(runs.there(0))
    gone, *stayed = opened.cohort
    for client in stayed:
        server.receive(0, client, runs.update(0, client))
    server.close()
    may = server.clients.may_join(server.clients.join(opened.cohort))
    assert may.tolist() == [client == gone for client in opened.cohort]
    assert server.receive(0, gone, runs.update(0, gone)) is Reply.LATE


def test_a_skipped_round_uses_up_nothing(tmp_path):
    server = runs.server(tmp_path, least=2)
    assert server.open(["only one"]) is None
    before, opened = server.weights, server.open(runs.there(0))
    server.receive(0, opened.cohort[0], runs.update(0, "x"))
    assert server.close() is None
    assert server.t == server.clients.t == server._stream.t == 0
    assert all(torch.equal(w, before[name]) for name, w in server.weights.items())
    assert server.clients.may_join(server.clients.join(opened.cohort)).all()
    again = server.open(runs.there(0))
    assert again.t == 0
    assert again.cohort != opened.cohort  # another draw, not the same dead clients for ever
    server.leave()
    resumed = runs.server(tmp_path, least=2)
    assert resumed.open(runs.there(0)).cohort == again.cohort


def test_more_are_invited_than_counted(tmp_path):
    server = runs.server(tmp_path, over_invite=0.5)
    cohort = server.open(runs.there(0)).cohort
    kinds = [server.receive(0, c, runs.update(0, c)) for c in cohort]
    assert kinds == [Reply.COUNTED] * 3 + [Reply.LATE] * 2
    server.close()
    assert server.clients.rounds(server.clients.join(cohort))[0].tolist() == [1, 1, 1, 0, 0]


def test_a_hundred_random_faults_change_nothing(tmp_path):
    """Late, twice, uninvited, garbage, gone: the run is the one of the clients who were sound.

    Beside it runs a server that gets only the sound replies and a zero for each bad one. The bits
    are the same, no client exceeds its rounds, and epsilon is the mechanism's.
    """
    rng, faults = np.random.default_rng(12), 0
    n, everyone = 60, range(60)
    mechanism = runs.mechanism(n, b=5, k=6)
    wild, calm = (
        PrivateAggregator(
            tmp_path / name, mechanism, runs.WEIGHTS, cohort_size=5, key=Key.from_seed(3)
        )
        for name in ("wild", "calm")
    )
    zero = {name: torch.zeros_like(runs.WEIGHTS[name]) for name in ("a", "b")}
    bad = [*GARBAGE.values(), *BAD.values()]
    strangers: list[Any] = ["nobody", True, None, [], -1, 0.5]
    for t in range(n):
        opened, other = wild.open(everyone), calm.open(everyone)
        assert opened.cohort == other.cohort
        for client in opened.cohort:
            fault = rng.choice(["none", "gone", "garbage", "twice", "late", "uninvited"])
            faults += fault != "none"
            sound = runs.update(t, client)
            if fault == "gone":
                continue
            if fault == "garbage":
                reply = wild.receive(t, client, bad[rng.integers(len(bad))])
                assert reply in (Reply.MALFORMED, Reply.NON_FINITE)
                calm.receive(t, client, zero)
                continue
            if fault == "late":
                assert wild.receive(t - 1, client, sound) is Reply.LATE
                continue
            if fault == "uninvited":
                for stranger in strangers:
                    assert wild.receive(t, stranger, sound) is Reply.UNINVITED
            assert wild.receive(t, client, sound) is Reply.COUNTED
            if fault == "twice":
                assert wild.receive(t, client, bad[0]) is Reply.DUPLICATE
            calm.receive(t, client, sound)
        ours, theirs = wild.close(), calm.close()
        assert ours is not None
        assert theirs is not None
        assert all(torch.equal(w, theirs[name]) for name, w in ours.items())
    assert faults >= 100
    assert wild.t == n
    count, _ = wild.clients.rounds(np.arange(60))
    assert count.max() <= 6
    assert sum(wild.replies.values()) > 200
    assert f"({mechanism.epsilon:.6g}, 1e-05)-differential privacy for one user" in wild.claim()
    with pytest.raises(RootnoiseError, match=r"round must be in \[0, n_steps - 1=59\], got 60"):
        wild.open(everyone)


def test_the_claim_is_rounded_to_the_private_side(tmp_path):
    base = runs.mechanism()
    for i, clip in enumerate([1.23456789, 0.70000001, 3.3333333, 5.00000049]):
        mechanism = dataclasses.replace(base, clip_norm=clip)
        server = PrivateAggregator(tmp_path / str(i), mechanism, runs.WEIGHTS, cohort_size=2)
        claim = server.claim()
        server.leave()
        (std,) = re.findall(r"standard deviation ([^ :]+)", claim)
        (norm,) = re.findall(r"sensitivity ([0-9.]+)", claim)
        assert float(std) <= mechanism.noise_std * (1 + 2e-12)
        assert float(norm) >= mechanism.sensitivity.value * (1 - 2e-12)
        assert f"clipped to l2 norm {clip!r} " in claim
        assert f"noise multiplier {mechanism.noise_multiplier!r} x" in claim


def test_the_claim_is_for_users(tmp_path):
    claim = runs.server(tmp_path).claim()
    assert claim.startswith("(4, 1e-05)-differential privacy for one user zeroed out")
    assert "takes part in at most 2 rounds each, at least 3 apart, of 8 rounds" in claim
    assert "whole update is clipped to l2 norm 0.5" in claim
    assert "record" not in claim
    assert (tmp_path / "claim.txt").read_text().strip() == claim


def test_rounds_are_opened_and_closed_in_turn(tmp_path):
    server = runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="round 0 must be open to be closed"):
        server.close()
    server.open(runs.there(0))
    with pytest.raises(RootnoiseError, match="round 0 must be closed before another is opened"):
        server.open(runs.there(0))
    with pytest.raises(RootnoiseError, match="round 0 must be closed before the run is finished"):
        server.finish()


def test_the_server_refuses_parts_of_another_kind(tmp_path):
    for mechanism, weights, message in (
        (None, runs.WEIGHTS, r"^mechanism must be a Mechanism, got NoneType$"),
        (runs.mechanism(), None, r"^weights must be a model's state_dict, got NoneType$"),
    ):
        with pytest.raises(RootnoiseError, match=message):
            PrivateAggregator(tmp_path, mechanism, weights, cohort_size=2)
    assert not [*tmp_path.iterdir()]


def test_the_best_of_trials_is_refused_since_clients_see_every_trial(tmp_path):
    several = dataclasses.replace(runs.mechanism(), trials=Trials(2.0))
    with pytest.raises(RootnoiseError, match=r"^mechanism must be of one run, whose .* mean 2$"):
        PrivateAggregator(tmp_path, several, runs.WEIGHTS, cohort_size=2)
    assert not [*tmp_path.iterdir()]


def test_parts_that_do_not_fit_are_refused(tmp_path):
    cyclic = CyclicPoisson(groups=2, probability=0.1)
    poisson = Mechanism.calibrate(
        factorize(SGD(8), cyclic, "bsr", bands=2), cyclic, noise_multiplier=1.0, delta=1e-5
    )
    with pytest.raises(RootnoiseError, match=r"min-sep or single \(amplification needs"):
        PrivateAggregator(tmp_path, poisson, runs.WEIGHTS, cohort_size=2)
    who, falling = MinSeparation(3, 2), ScheduledSGD(learning_rates=[1.0, 0.5, 0.5, 0.5])
    scheduled = Mechanism.calibrate(
        factorize(falling, who, "identity"), who, noise_multiplier=1.0, delta=1e-5
    )
    with pytest.raises(RootnoiseError, match=r"optimizer must be given unless .* ScheduledSGD"):
        PrivateAggregator(tmp_path, scheduled, runs.WEIGHTS, cohort_size=2)
    for settings, reason in [
        ({"cohort_size": 0}, r"cohort_size must be in \[1, 4194304\], got 0"),
        ({"cohort_size": 2, "least": 3}, r"least must be in \[1, cohort_size=2\], got 3"),
        ({"cohort_size": 2, "over_invite": -1}, "over_invite must be a finite number >= 0"),
        ({"cohort_size": 2, "decay": 0}, "decay must be a finite number > 0"),
        ({"cohort_size": 2, "learning_rate": 0}, "learning_rate must be a finite number > 0"),
    ]:
        with pytest.raises(RootnoiseError, match=reason):
            PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, **settings)
    assert not list(tmp_path.iterdir())

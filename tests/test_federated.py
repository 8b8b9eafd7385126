"""The server: exact clipping, white noise at the right scale, and faults that change nothing."""

import dataclasses
import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import federated_runs as runs
from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.federated import PrivateAggregator, Reply
from rootnoise.federated.updates import POINTS, Layout, from_grid, on_grid
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation import CyclicPoisson, MinSeparation
from rootnoise.workload import SGD, ScheduledSGD

EXAMPLE = Path(__file__).parents[1] / "examples" / "federated_loop.py"
INF, NAN = math.inf, math.nan


def vector(size=2000, seed=0):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-308, 1e-8, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0])
def test_no_update_exceeds_the_clip_norm(scale, clip):
    """Exactly, in integers; and below it nothing changes but by a grid point."""
    update = vector() * scale
    grid = on_grid(update, clip)
    squares = sum(x * x for x in grid.tolist())
    assert squares <= POINTS**2
    norm = scale * math.sqrt(sum(x**2 for x in vector().tolist()))
    expected = update * min(1.0, clip / norm)
    assert torch.allclose(from_grid(grid, clip), expected, rtol=2e-7, atol=clip / POINTS)
    assert norm <= clip or squares > POINTS**2 * (1 - 1e-6)


def test_the_grid_is_cut_towards_zero():
    """Rounded to nearest, many small numbers would add to the norm."""
    small = torch.full((1000,), 0.9 / POINTS, dtype=torch.float64)
    assert not on_grid(small, 1.0).any()
    assert not on_grid(-small, 1.0).any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_number_makes_an_update_count_as_zero(bad):
    update = vector()
    update[77] = bad
    assert on_grid(update, 1.0) is None
    assert not on_grid(torch.zeros(5, dtype=torch.float64), 1.0).any()


def closed(server):
    """Close the open round, which is not skipped."""
    weights = server.close()
    assert weights is not None
    return weights


def big_server(folder, n=40, **settings):
    """2 x 2500 float64 weights, no momentum, so that the released means can be read off."""
    mechanism = runs.mechanism(n, b=4, k=5, beta=0.0)
    weights = {name: torch.zeros(50, 50, dtype=torch.float64) for name in "ab"}
    return PrivateAggregator(
        folder, mechanism, weights, cohort_size=6, key=Key.from_seed(9), **settings
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Released sums less the clipped ones of recorded updates, shape (40, 5000); mechanism."""
    n, server = 40, big_server(tmp_path_factory.mktemp("recorded"))
    rng, before, rows = np.random.default_rng(4), torch.zeros(5000, dtype=torch.float64), []
    for t in range(n):
        opened = server.open(range(40))
        clipped = torch.zeros(5000, dtype=torch.float64)
        for client in opened.cohort:
            if rng.random() < 0.2:
                continue  # dropped out
            u = vector(5000, seed=1000 * t + client) * 10.0 ** rng.integers(-4, 2)
            clipped += u * min(1.0, server.mechanism.clip_norm / float(u.norm()))
            update = {"a": u[:2500].view(50, 50), "b": u[2500:].view(50, 50)}
            assert server.receive(t, client, update) is Reply.COUNTED
        after = torch.cat([w.reshape(-1) for w in closed(server).values()])
        rows.append((after - before) * server.cohort_size - clipped)
        before = after
    server.leave()
    return torch.stack(rows).numpy(), server.mechanism


def z_scores(noise, mechanism, scale=1.0):
    """Standard scores of C noise: its variance, its mean, and its products at other steps."""
    z = mechanism.strategy.apply(noise) / (mechanism.noise_std * scale)
    n, d = z.shape
    scores = [(np.mean(z**2) - 1) * math.sqrt(z.size / 2), z.mean() * math.sqrt(z.size)]
    scores += [np.sum(z[lag:] * z[:-lag]) / math.sqrt((n - lag) * d) for lag in range(1, 6)]
    scores += [np.sum(z[:, 1:] * z[:, :-1]) / math.sqrt(n * (d - 1))]
    return np.abs(scores)


def test_c_times_the_noise_is_white_at_the_right_scale(recorded):
    """Eight scores below 5.5 (false alarm 3e-7 over seeds); 2 % off is 12 standard deviations."""
    noise, mechanism = recorded
    assert z_scores(noise, mechanism).max() < 5.5
    for wrong in (0.98, 1.02):
        assert z_scores(noise, mechanism, wrong)[0] > 5.5
    independent = np.abs(np.mean((noise / mechanism.noise_std) ** 2) - 1)
    assert independent > 0.01  # the noise itself is not white


def test_what_is_released_is_the_clipped_sum_and_the_noise_of_the_key(recorded):
    """To the clipping's slack: sign, divisor and sum are right, and no noise is used twice."""
    noise, mechanism = recorded
    stream = NoiseStream(mechanism, 5000, Key.from_seed(9))
    expected = np.stack([stream.next().numpy() for _ in range(40)])
    assert np.allclose(noise, expected, rtol=0, atol=1e-6)


def test_momentum_and_decay_are_those_of_the_workload(tmp_path):
    """From zero, the weights are A times the released means, and another optimizer may be given."""
    mechanism = runs.mechanism(8, beta=0.9, alpha=0.95)
    weights = {"w": torch.zeros(30, dtype=torch.float64)}
    settings = {"cohort_size": 4, "key": Key.from_seed(1)}
    first = PrivateAggregator(tmp_path / "1", mechanism, weights, learning_rate=0.5, **settings)
    plain = PrivateAggregator(
        tmp_path / "2",
        mechanism,
        weights,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        decay=1.0,
        **settings,
    )
    found: list[np.ndarray] = []
    sums: list[np.ndarray] = []
    for t in range(8):
        for server, rows in ((first, found), (plain, sums)):
            for client in server.open(range(20)).cohort:
                server.receive(t, client, {"w": vector(30, seed=client)})
            rows.append(closed(server)["w"].numpy())
    means = np.diff(np.array(sums), axis=0, prepend=0)
    expected = 0.5 * mechanism.workload.matrix.apply(means)
    assert np.allclose(found, expected, rtol=1e-10)


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


def test_weights_instead_of_updates_are_the_same_to_the_last_bit(tmp_path):
    """Changes that are exact in float32; the weights that a round begins with are not zero."""
    change = {name: torch.full_like(runs.WEIGHTS[name], 2**-9) for name in ("a", "b")}
    ends = []
    for how in ("receive", "receive_weights"):
        begin = {n: w + 1 if w.is_floating_point() else w for n, w in runs.WEIGHTS.items()}
        server = PrivateAggregator(
            tmp_path / how, runs.mechanism(), begin, cohort_size=3, key=Key.from_seed(5)
        )
        opened = server.open(runs.there(0))
        for client in opened.cohort[:2]:
            after = {name: opened.weights[name] + c for name, c in change.items()}
            sent = change if how == "receive" else after | {"steps": torch.tensor(8)}
            assert getattr(server, how)(0, client, sent) is Reply.COUNTED
        for bad in (GARBAGE["broadcast"], None):
            assert getattr(server, how)(0, opened.cohort[2], bad) is not Reply.COUNTED
        assert float(server._total.abs().max()) == pytest.approx(2 * 2**-9 / 0.5 * POINTS, rel=1e-6)
        ends.append(closed(server))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


def test_integer_buffers_are_left_alone(tmp_path):
    server = runs.server(tmp_path)
    for client in server.open(runs.there(0)).cohort:
        update = runs.update(0, client) | {"steps": torch.tensor(99)}
        assert server.receive(0, client, update) is Reply.COUNTED
    weights = closed(server)
    assert weights["steps"] == 7
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weights"]["steps"] == 7


class Raises(dict[str, Any]):
    """A stranger's mapping."""

    def __getitem__(self, name):
        raise ZeroDivisionError


class Liar(torch.Tensor):
    """Says that its norm is 0."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 0 if func is torch.Tensor.abs else found


GARBAGE = {
    "raises": Raises(a=torch.ones(4, 3), b=torch.ones(5)),
    "subclass": {"a": torch.ones(4, 3).as_subclass(Liar), "b": torch.ones(5)},
    "nothing": None,
    "text": "update",
    "empty": {},
    "missing": {"a": torch.ones(4, 3)},
    "unknown": {"a": torch.ones(4, 3), "b": torch.ones(5), "c": torch.ones(1)},
    "shape": {"a": torch.ones(3, 4), "b": torch.ones(5)},
    "broadcast": {"a": torch.ones(4, 3), "b": torch.ones(1)},
    "integers": {"a": torch.ones(4, 3, dtype=torch.int64), "b": torch.ones(5)},
    "complex": {"a": torch.ones(4, 3, dtype=torch.complex64), "b": torch.ones(5)},
    "objects": {"a": np.full((4, 3), None), "b": np.ones(5)},
    "lists": {"a": [[1.0] * 3] * 4, "b": [1.0] * 5},
    "sparse": {"a": torch.ones(4, 3).to_sparse(), "b": torch.ones(5)},
    "meta": {"a": torch.ones(4, 3, device="meta"), "b": torch.ones(5)},
}
BAD = {
    "nan": {"a": torch.full((4, 3), NAN), "b": torch.ones(5)},
    "inf": {"a": torch.full((4, 3), INF), "b": torch.ones(5)},
    "half overflow": {"a": (torch.ones(4, 3) * 1e6).half(), "b": torch.ones(5).half()},
}
GOOD = {
    "half": {"a": torch.full((4, 3), 6e4).half(), "b": torch.full((5,), 6e4).half()},
    "bfloat16": {"a": torch.full((4, 3), 1e38).bfloat16(), "b": torch.ones(5).bfloat16()},
    "huge": {"a": np.full((4, 3), 1e300), "b": np.full(5, -1e300)},
    "zero": {"a": np.zeros((4, 3)), "b": np.zeros(5)},
    "parameters": {"a": torch.nn.Parameter(torch.ones(4, 3)), "b": torch.ones(5)},
}


def noiseless(server, t, replies):
    """Return the open round's sum after these replies, over the clip norm."""
    opened = server.open(range(50))
    kinds = [server.receive(t, c, u) for c, u in zip(opened.cohort, replies, strict=False)]
    return from_grid(server._total, 1.0), kinds, opened


@pytest.mark.parametrize(
    ("updates", "kind", "norm"),
    [(GARBAGE, Reply.MALFORMED, 0.0), (BAD, Reply.NON_FINITE, 0.0), (GOOD, Reply.COUNTED, None)],
)
def test_what_an_update_can_do(tmp_path, updates, kind, norm):
    """Garbage adds zero and takes its client's turn; overflow in half precision is clipped."""
    mechanism = runs.mechanism(n=len(updates), b=2, k=1)
    server = PrivateAggregator(tmp_path, mechanism, runs.WEIGHTS, cohort_size=1)
    for name, update in updates.items():
        check_one(server, name, update, kind, norm)


def check_one(server, name, update, kind, norm):
    total, kinds, opened = noiseless(server, server.t, [update])
    assert kinds == [kind], name
    wanted = norm if norm is not None else float(name != "zero")
    assert float(total.norm()) == pytest.approx(wanted, abs=1e-6)
    server.close()
    (who,) = server.clients.join(opened.cohort)
    assert not server.clients.may_join(np.array([who]))[0]


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


def test_a_folder_says_what_the_run_says(tmp_path):
    """Its claim is compared; released weights that somebody changed are written anew."""
    server = runs.server(tmp_path)
    server.leave()
    released = (tmp_path / "model.pt").read_bytes()
    weights = {name: w + 1 for name, w in runs.WEIGHTS.items()}
    torch.save({"t": 0, "weights": weights}, tmp_path / "model.pt")
    runs.server(tmp_path).leave()
    assert (tmp_path / "model.pt").read_bytes() == released
    claim = tmp_path / "claim.txt"
    for wrong in (claim.read_bytes().replace(b"(4,", b"(1,"), None):
        claim.unlink() if wrong is None else claim.write_bytes(wrong)
        with pytest.raises(RootnoiseError, match=r"claim\.txt must be as a run wrote it"):
            runs.server(tmp_path)


def test_the_flower_app_holds_the_same_loop():
    """Flower copies no links, and nothing from outside the app's folder."""
    assert (EXAMPLE.parent / "flower_app" / EXAMPLE.name).read_bytes() == EXAMPLE.read_bytes()


def test_the_example_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Eight people, six rounds; and the same again, left after each of the first three."""
    example = runpy.run_path(str(EXAMPLE))
    options = ["--data", "digits", "--people", "8", "--cohort", "2", "--rounds", "6"]
    args = example["parser"]().parse_args(options)
    assert len(example["loop"](args, tmp_path / "whole")) == 6
    close = PrivateAggregator.close

    def close_and_leave(server):
        weights = close(server)
        server.leave()
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(PrivateAggregator, "close", close_and_leave)
        for _ in range(3):
            with pytest.raises(RootnoiseError, match="run must go on from its folder"):
                example["loop"](args, tmp_path / "parts")
    assert len(example["loop"](args, tmp_path / "parts")) == 3
    whole, parts = ((tmp_path / name / "model.pt").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_the_claim_is_for_users(tmp_path):
    claim = runs.server(tmp_path).claim()
    assert claim.startswith("(4, 1e-05)-differential privacy for one user zeroed out")
    assert "takes part in at most 2 rounds each, at least 3 apart, of 8 rounds" in claim
    assert "whole update is clipped to l2 norm 0.5" in claim
    assert "record" not in claim
    assert (tmp_path / "claim.txt").read_text().strip() == claim


def one_round(server):
    t = server.t
    for client in server.open(runs.there(t)).cohort:
        server.receive(t, client, runs.update(t, client))
    return closed(server)


def test_rounds_are_opened_and_closed_in_turn(tmp_path):
    server = runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="round 0 must be open to be closed"):
        server.close()
    server.open(runs.there(0))
    with pytest.raises(RootnoiseError, match="round 0 must be closed before another is opened"):
        server.open(runs.there(0))
    with pytest.raises(RootnoiseError, match="round 0 must be closed before the run is finished"):
        server.finish()


def test_nothing_leaves_a_round_that_is_not_on_disk(tmp_path, monkeypatch):
    """The disk fails at the commit: the weights are neither shown nor built on; the folder is."""
    server = runs.server(tmp_path)
    first = one_round(server)
    server.open(runs.there(1))

    def full(state):
        raise RootnoiseError("state.pt must be writable, got a full disk")

    monkeypatch.setattr(server._store, "commit", full)
    with pytest.raises(RootnoiseError, match="full disk"):
        server.close()  # empty, thus skipped: the same
    for act in (lambda: server.weights, lambda: server.open([]), server.close, server.finish):
        with pytest.raises(RootnoiseError, match="run must go on from its folder"):
            act()
    with pytest.raises(RootnoiseError, match="run must go on from its folder"):
        server.receive(1, "phone 1", None)
    server.leave()
    again = runs.server(tmp_path)
    assert again.t == 1
    assert all(torch.equal(w, first[name]) for name, w in again.weights.items())


def test_one_process_at_a_time(tmp_path):
    server = runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="must not be in use by another process"):
        runs.server(tmp_path)
    server.leave()
    runs.server(tmp_path).leave()


def test_an_older_state_is_refused(tmp_path):
    server = runs.server(tmp_path)
    one_round(server)
    older = (tmp_path / "state.pt").read_bytes()
    one_round(server)
    server.leave()
    (tmp_path / "state.pt").write_bytes(older)
    with pytest.raises(RootnoiseError, match=r"must be the newest, got one at round 1 though 2 we"):
        runs.server(tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "model.pt"])
def test_damaged_files_are_refused(tmp_path, name):
    server = runs.server(tmp_path)
    one_round(server)
    server.leave()
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RootnoiseError, match=f"{name} must be as a run wrote it"):
        runs.server(tmp_path)


def test_a_finished_run_is_refused_and_has_no_secrets(tmp_path):
    server = runs.server(tmp_path)
    weights = one_round(server)
    server.finish()
    assert not (tmp_path / "noise.key").exists()
    assert not (tmp_path / "state.pt").exists()
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    assert held["t"] == 1
    assert all(torch.equal(w, weights[name]) for name, w in held["weights"].items())
    with pytest.raises(RootnoiseError, match="folder must be of a run that has not ended"):
        runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="run must go on from its folder"):
        server.open(["a"])


def test_other_runs_are_refused(tmp_path):
    server = runs.server(tmp_path)
    one_round(server)
    server.leave()
    key, settings = Key.from_seed(5), {"cohort_size": 3}
    with pytest.raises(RootnoiseError, match="key must be the run's"):
        PrivateAggregator(
            tmp_path, runs.mechanism(), runs.WEIGHTS, key=Key.from_seed(6), **settings
        )
    with pytest.raises(RootnoiseError, match=r"mechanism must be that of the folder's mechanism"):
        PrivateAggregator(tmp_path, runs.mechanism(k=1), runs.WEIGHTS, key=key, **settings)
    with pytest.raises(RootnoiseError, match="saved run's cohort_size must be 4, got 3"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, cohort_size=4)
    with pytest.raises(RootnoiseError, match=r"saved run's decay must be 0\.5, got 1\.0"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, decay=0.5, **settings)
    transposed = runs.WEIGHTS | {"a": torch.zeros(3, 4)}
    with pytest.raises(RootnoiseError, match="saved run's layout must be"):
        PrivateAggregator(tmp_path, runs.mechanism(), transposed, **settings)
    (tmp_path / "noise.key").unlink()
    with pytest.raises(RootnoiseError, match=r"noise\.key must be readable to go on"):
        PrivateAggregator(tmp_path, runs.mechanism(), runs.WEIGHTS, **settings)


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RootnoiseError, match=r"new or of a federated run, got thesis\.tex"):
        runs.server(tmp_path)
    with pytest.raises(RootnoiseError, match="folder must be writable, got"):
        runs.server(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": torch.zeros(3).half()}, r"weight a must be float32 or float64 on the server"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "got torch.complex64"),
        ({"a": [0.0]}, "weight a must be a tensor, got list"),
        ({"n": torch.tensor(3)}, r"weights must hold floating ones, got \['n'\]"),
        ({}, r"weights must hold floating ones, got \[\]"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, reason):
    with pytest.raises(RootnoiseError, match=reason):
        Layout(weights)


def test_tied_weights_are_refused():
    """Each copy would get a noise of its own, and the norm would count it twice."""
    layer = torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.ModuleDict({"in": layer, "out": layer})
    with pytest.raises(RootnoiseError, match=r"must not share memory .*\['in.weight', 'out.weigh"):
        Layout(model.state_dict())


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

"""What a server releases: clipped sums and white noise at the right scale, by the optimizer."""

import math

import numpy as np
import pytest
import torch

import federated_runs as runs
from federated_runs import closed, vector
from rootnoise.federated import PrivateAggregator, Reply
from rootnoise.keys import Key
from rootnoise.noise import NoiseStream


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

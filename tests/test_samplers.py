import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rootnoise._check import RootnoiseError
from rootnoise.participation import BallsInBins, CyclicPoisson, FixedCycle, MinSeparation
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.samplers import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedCycleSampler,
    MinSeparationSampler,
    MinSepPoissonSampler,
)

SAMPLERS = {
    "fixed cycle": lambda **k: FixedCycleSampler(n_examples=103, batch_size=10, epochs=3, **k),
    "poisson": lambda **k: CyclicPoissonSampler(n_examples=103, batch_size=10, n_steps=40, **k),
    "cyclic": lambda **k: CyclicPoissonSampler(103, batch_size=5, n_steps=40, groups=7, **k),
    "separated": lambda **k: MinSeparationSampler(103, batch_size=10, epochs=3, min_sep=7, **k),
    "min-sep poisson": lambda **k: MinSepPoissonSampler(103, 5, n_steps=40, min_sep=6, **k),
    "bins": lambda **k: BallsInBinsSampler(n_examples=103, batch_size=10, epochs=3, **k),
    "single": lambda **k: FixedCycleSampler(n_examples=103, batch_size=99, epochs=1, **k),
}


def through_disk(state):
    """What a checkpoint gives back: no code runs on loading."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(params=SAMPLERS)
def make(request):
    return SAMPLERS[request.param]


# ------------------------------------------------------------------------------- every sampler


def test_batches_are_sorted_distinct_indices(make):
    sampler = make(seed=1)
    for batch in sampler:
        assert batch.dtype == np.int64
        assert (np.diff(batch) > 0).all()
        assert batch.size == 0 or (batch[0] >= 0 and batch[-1] < sampler.n_examples)


def test_iterating_is_batch_of_t_in_any_order(make):
    sampler = make(seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == sampler.n_steps
    for t in reversed(range(sampler.n_steps)):
        np.testing.assert_array_equal(sampler.batch(t), batches[t])
        np.testing.assert_array_equal(make(seed=1).batch(t), batches[t])


def test_seeds_give_different_batches_and_none_is_fresh(make):
    seeds = (1, 2, None, None)
    contents = [str([b.tolist() for b in make(seed=seed)]) for seed in seeds]
    assert len(set(contents)) == 4


def test_a_batch_may_be_changed_by_its_owner(make):
    sampler = make(seed=1)
    before = sampler.batch(0).copy()
    sampler.batch(0)[:] = 0
    np.testing.assert_array_equal(sampler.batch(0), before)


def test_the_ledger_admits_what_the_sampler_draws(make):
    sampler = make(seed=3)
    ledger = Ledger(sampler.participation, sampler.n_examples)
    for t, batch in enumerate(sampler):
        ledger.admit(t, batch)
    sampler.participation.validate(sampler.n_steps)


@pytest.mark.parametrize("t", [-1, 10**6])
def test_steps_out_of_range_are_refused(make, t):
    sampler = make(seed=1)
    last = sampler.n_steps - 1
    message = rf"^t must be in \[0, n_steps - 1={last}\], got {t}$"
    with pytest.raises(RootnoiseError, match=message):
        sampler.batch(t)


def test_a_resumed_sampler_draws_the_same_batches(make):
    sampler, resumed = make(), make()
    resumed.load_state_dict(through_disk(sampler.state_dict()))
    for t in range(sampler.n_steps):
        np.testing.assert_array_equal(resumed.batch(t), sampler.batch(t))


def test_another_configuration_is_not_resumed(make):
    state = make(seed=1).state_dict()
    for field in ("version", "n_examples", "batch_size", "n_steps", "participation"):
        with pytest.raises(RootnoiseError, match=f"^saved sampler's {field} must be .*, got None$"):
            make(seed=1).load_state_dict(state | {field: None})
    with pytest.raises(RootnoiseError, match=r"^saved sampler's seed must be >= 0, got -1$"):
        make(seed=1).load_state_dict({k: v for k, v in state.items() if k != "seed"})


def test_sizes_and_seeds_are_checked():
    with pytest.raises(RootnoiseError, match=r"^batch_size must be in \[1, n_examples=5\], got 6$"):
        FixedCycleSampler(5, 6, 1)
    with pytest.raises(RootnoiseError, match=r"^batch_size must be in \[1, n_examples=5\], got 0$"):
        CyclicPoissonSampler(5, 0, 1)
    with pytest.raises(RootnoiseError, match=r"^n_examples must be >= 1, got 0$"):
        FixedCycleSampler(0, 1, 1)
    with pytest.raises(RootnoiseError, match=r"^epochs must be >= 1, got 0$"):
        FixedCycleSampler(5, 1, 0)
    with pytest.raises(RootnoiseError, match=r"^n_steps must be >= 1, got 0$"):
        CyclicPoissonSampler(5, 1, 0)
    with pytest.raises(RootnoiseError, match=r"^seed must be >= 0, got -1$"):
        FixedCycleSampler(5, 1, 1, seed=-1)


def test_no_global_generator_is_moved(make):
    before = str(np.random.get_state(legacy=False)), torch.get_rng_state()
    list(make())
    assert str(np.random.get_state(legacy=False)) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# --------------------------------------------------------------------------------- fixed cycle


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_every_epoch_has_everybody_once_in_the_same_order(n_examples, batch_size, epochs):
    batch_size = min(batch_size, n_examples)
    sampler = FixedCycleSampler(n_examples, batch_size, epochs, seed=0)
    period = -(-n_examples // batch_size)
    assert sampler.participation == FixedCycle(period, epochs)
    assert sampler.n_steps == period * epochs
    epoch = [sampler.batch(t) for t in range(period)]
    assert sorted(np.concatenate(epoch)) == list(range(n_examples))
    assert all(batch.size == batch_size for batch in epoch[:-1])
    for t, batch in enumerate(sampler):
        np.testing.assert_array_equal(batch, epoch[t % period])


def test_the_cycle_may_end_inside_its_last_epoch():
    assert len(list(FixedCycleSampler(10, 3, 2, seed=0, n_steps=5))) == 5
    for n_steps in (4, 9):
        with pytest.raises(RootnoiseError, match=rf"^n_steps must be in \[5, .*got {n_steps}$"):
            FixedCycleSampler(10, 3, 2, seed=0, n_steps=n_steps)


# -------------------------------------------------------------------------------------- poisson


def test_the_accountant_reads_the_probability_that_is_drawn_with():
    sampler = CyclicPoissonSampler(n_examples=1000, batch_size=30, n_steps=99, groups=4)
    assert sampler.participation == CyclicPoisson(groups=4, probability=0.12)


@pytest.mark.parametrize("groups", [1, 7])
def test_groups_are_a_near_equal_partition(groups):
    # With probability 1 every member is drawn, so the batches are the groups.
    n = 7 * 11
    sampler = CyclicPoissonSampler(n, n // groups, n_steps=groups, groups=groups, seed=0)
    assert sampler.participation.probability == 1
    batches = list(sampler)
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert {batch.size for batch in batches} == {n // groups}
    uneven = CyclicPoissonSampler(n + 3, n // 7, n_steps=700, groups=7, seed=0)
    seen = [set(np.concatenate([uneven.batch(t) for t in range(g, 700, 7)])) for g in range(7)]
    # Somebody never drawn in 100 steps at q = 0.9625 has probability 1e-141.
    assert sorted(len(members) for members in seen) == [11] * 4 + [12] * 3
    assert len(set.union(*seen)) == n + 3


def includes_independently_with(q, drawn):
    """Draws (steps, members) are independent with probability q; false-alarm rate below 1e-7."""
    total = stats.binomtest(int(drawn.sum()), drawn.size, q).pvalue
    # Index of dispersion of rows and columns: sums of independent draws are binomial.
    steps, members = drawn.shape
    tests = [total]
    for sums, size in ((drawn.sum(1), members), (drawn.sum(0), steps)):
        dispersion = np.square(sums - size * q).sum() / (size * q * (1 - q))
        tail = stats.chi2(sums.size)
        tests.append(2 * min(tail.sf(dispersion), tail.cdf(dispersion)))
    return min(tests) > 2e-8  # three tests: 6e-8 in all


def test_members_are_drawn_independently_with_probability_q():
    n, steps = 400, 4000
    sampler = CyclicPoissonSampler(n, batch_size=60, n_steps=steps, groups=2, seed=0)
    drawn = np.zeros((steps, n))
    for t, batch in enumerate(sampler):
        drawn[t, batch] = 1
    group = drawn[1::2, drawn[1::2].any(0)]
    assert group.shape == (2000, 200)
    q = sampler.participation.probability
    assert includes_independently_with(q, group)
    # 2 % more is 0.006 at q = 0.3: 8.3 of the deviations sqrt(q (1 - q) / 400,000); and batches of
    # exactly the same size, or the same batches four times, are no Poisson sampling.
    assert not includes_independently_with(q / 1.02, group)
    assert not includes_independently_with(q, np.tile(group[:500], (4, 1)))
    fixed_size = np.array([np.roll(np.arange(200) < 60, 7 * t) for t in range(2000)], dtype=float)
    assert not includes_independently_with(q, fixed_size)


def test_empty_batches_are_legal():
    sampler = CyclicPoissonSampler(n_examples=50, batch_size=1, n_steps=200, seed=0)
    ledger = Ledger(sampler.participation, 50)
    sizes = [batch.size for batch in sampler]
    assert 0 in sizes
    for t, batch in enumerate(sampler):
        ledger.admit(t, batch)


def test_a_probability_above_one_is_refused():
    message = (
        "batch_size * groups must be <= n_examples=100 for a sampling probability of at most 1, "
        "got 30 * 4"
    )
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        CyclicPoissonSampler(100, 30, n_steps=10, groups=4)


def test_more_groups_than_steps_are_refused():
    with pytest.raises(RootnoiseError, match=r"^groups must be in \[1, n_steps=3\], got 4$"):
        CyclicPoissonSampler(100, 5, n_steps=3, groups=4)


# --------------------------------------------------------------------------------- min separation


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.integers(0, 100))
def test_every_epoch_has_everybody_once_and_never_too_soon(n_examples, batch_size, epochs, where):
    batch_size = min(batch_size, n_examples)
    period = -(-n_examples // batch_size)
    b = 1 + where % period
    sampler = MinSeparationSampler(n_examples, batch_size, epochs, b, seed=0)
    assert sampler.participation == MinSeparation(b, epochs)
    last = np.full(n_examples, -period)
    for epoch in range(epochs):
        batches = [sampler.batch(t) for t in range(epoch * period, (epoch + 1) * period)]
        assert sorted(np.concatenate(batches)) == list(range(n_examples))
        assert all(batch.size <= batch_size for batch in batches)
        for i, batch in enumerate(batches):
            assert (epoch * period + i - last[batch] >= b).all()
            last[batch] = epoch * period + i


def test_the_whole_period_apart_is_a_fixed_cycle_and_less_is_not():
    for b, fixed in ((6, True), (5, False), (1, False)):
        sampler = MinSeparationSampler(60, 10, 2, b, seed=0)
        repeats = [np.array_equal(sampler.batch(t), sampler.batch(t + 6)) for t in range(6)]
        assert all(repeats) == fixed


def test_gaps_reach_from_the_least_to_the_greatest():
    """Stretches of 3 steps: gaps are 4, ..., 8 with weights 1, 2, 3, 2, 1; 1e-9 for six of 9."""
    sampler = MinSeparationSampler(6000, 1000, 40, min_sep=4, seed=0)
    steps = np.array([np.zeros(6000)] * 40)
    for t, batch in enumerate(sampler):
        steps[t // 6, batch] = t
    gaps = np.diff(steps, axis=0).ravel()
    expected = np.array([1, 2, 3, 2, 1]) / 9
    # Gaps of one record are dependent in pairs, hence half as many count.
    counts = np.bincount(gaps.astype(int), minlength=9)[4:]
    assert counts.sum() == gaps.size
    deviation = np.sqrt(expected * (1 - expected) / (gaps.size / 2))
    assert (np.abs(counts / gaps.size - expected) < 6 * deviation).all()


@pytest.mark.parametrize("b", [0, 7])
def test_separations_beyond_the_period_are_refused(b):
    message = re.escape(f"min_sep must be in [1, ceil(n_examples/batch_size)=6], got {b}")
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        MinSeparationSampler(60, 10, 2, b)
    with pytest.raises(RootnoiseError, match=r"^n_steps must be in \[7, .*got 13$"):
        MinSeparationSampler(60, 10, 2, 3, n_steps=13)


# --------------------------------------------------------------------------- balls in bins, renewal


def test_bins_are_uniform_independent_and_fixed():
    """Chi-square of bin sizes, of pairs of neighbours, and of two seeds: 3e-8 in all."""
    n, b = 60_000, 6
    sampler = BallsInBinsSampler(n, n // b, epochs=2, seed=1)
    assert sampler.participation == BallsInBins(b, 2)
    bins = np.empty((2, n), dtype=int)
    for t in range(2 * b):
        bins[t // b, sampler.batch(t)] = t % b
    np.testing.assert_array_equal(bins[0], bins[1])
    other = BallsInBinsSampler(n, n // b, epochs=1, seed=2)
    theirs = np.empty(n, dtype=int)
    for t in range(b):
        theirs[other.batch(t)] = t

    def uniform(values, cells):
        counts = np.bincount(values, minlength=cells)
        statistic = float(((counts - values.size / cells) ** 2).sum() / (values.size / cells))
        return stats.chi2(cells - 1).sf(statistic) > 1e-8

    one = bins[0]
    assert uniform(one, b)
    assert uniform(one[:-1:2] * b + one[1::2], b * b)
    assert uniform(one * b + theirs, b * b)
    assert not uniform(np.arange(n) % b * b + one * 0, b * b)  # and the test can fail
    sizes = np.bincount(one)
    assert len(set(sizes)) > 1  # equal parts would not be independent of each other


def test_everybody_joins_every_step_at_the_stated_rate_after_the_stated_waits():
    """The first steps like the later ones; gaps geometric beyond b. False-alarm rate below 1e-7."""
    n, b, steps = 20_000, 5, 60
    sampler = MinSepPoissonSampler(n, batch_size=2000, n_steps=steps, min_sep=b, seed=3)
    p, rate = sampler.participation.probability, sampler.participation.rate
    assert p == pytest.approx(0.1 / 0.6)
    assert rate == pytest.approx(0.1)
    joined = np.zeros((steps, n), dtype=bool)
    for t, batch in enumerate(sampler):
        joined[t, batch] = True
    sizes = joined.sum(axis=1)
    deviation = np.sqrt(n * rate * (1 - rate))
    assert (np.abs(sizes - n * rate) < 6 * deviation).all()
    assert not (np.abs(sizes - 1.1 * n * rate) < 6 * deviation).all()
    gaps = np.concatenate([np.diff(np.flatnonzero(column)) for column in joined.T])
    assert gaps.min() == b
    for extra in range(4):
        # Only from steps that leave room are all gaps seen.
        early = joined[: steps - 30]
        who = early.sum()
        seen = sum(
            int((joined[t] & joined[t + b + extra] & ~joined[t + b : t + b + extra].any(0)).sum())
            for t in range(steps - 30)
        )
        q = p * (1 - p) ** extra
        assert abs(seen - who * q) < 6 * np.sqrt(who * q * (1 - q))


def test_certain_renewal_is_balls_in_bins():
    sampler = MinSepPoissonSampler(1000, batch_size=100, n_steps=25, min_sep=10, seed=0)
    assert sampler.participation.probability == 1
    for t in range(15):
        np.testing.assert_array_equal(sampler.batch(t), sampler.batch(t + 10))
    sizes = {sampler.batch(t).size for t in range(10)}
    assert sum(sampler.batch(t).size for t in range(10)) == 1000
    assert len(sizes) > 1


def test_a_rate_beyond_the_separation_is_refused():
    message = (
        "batch_size * min_sep must be <= n_examples=100 for a sampling probability of at most 1, "
        "got 30 * 4"
    )
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        MinSepPoissonSampler(100, 30, n_steps=10, min_sep=4)


def test_the_last_step_may_draw_nobody():
    empty = 0
    for seed in range(20):
        sampler = MinSepPoissonSampler(10, batch_size=1, n_steps=4, min_sep=2, seed=seed)
        empty += [sampler.batch(t).size for t in range(4)][-1] == 0
    assert 0 < empty < 20

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rootnoise._check import RootnoiseError
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation, SingleParticipation
from rootnoise.sampling import CyclicPoissonSampler, FixedCycleSampler, Ledger

SAMPLERS = {
    "fixed cycle": lambda **k: FixedCycleSampler(n_examples=103, batch_size=10, epochs=3, **k),
    "poisson": lambda **k: CyclicPoissonSampler(n_examples=103, batch_size=10, n_steps=40, **k),
    "cyclic": lambda **k: CyclicPoissonSampler(103, batch_size=5, n_steps=40, groups=7, **k),
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


# --------------------------------------------------------------------------------------- ledger


def ledger_after(participation, *batches, n_examples=6):
    ledger = Ledger(participation, n_examples)
    for t, batch in enumerate(batches):
        ledger.admit(t, batch)
    return ledger


# Participation; batches, the last one refused; the example named, its count and its last step.
REFUSED = {
    "twice though single": (SingleParticipation(), [[0, 1], [2], [4, 1]], (1, 1, 0)),
    "too close": (MinSeparation(3, 2), [[], [5], [], [5]], (5, 1, 1)),
    "too often": (MinSeparation(1, 2), [[3], [3], [3]], (3, 2, 1)),
    "off the cycle": (FixedCycle(2, 3), [[0], [1], [2], [0]], (0, 1, 0)),
    "past the epochs": (FixedCycle(1, 2), [[0], [0], [0]], (0, 2, 1)),
    "in another group": (CyclicPoisson(2, 0.5), [[0], [1], [0], [1, 2], [1, 0]], (1, 2, 3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_breaks_the_participation_is_refused_and_not_recorded(case):
    participation, batches, (example, count, last) = REFUSED[case]
    step = len(batches) - 1
    ledger = ledger_after(participation, *batches[:-1])
    before = ledger.state_dict()
    message = (
        f"example {example} at step {step} breaks the participation ({participation}): "
        f"steps so far {count}, the last one {last}"
    )
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        ledger.admit(step, batches[-1])
    after = ledger.state_dict()
    assert after["t"] == before["t"]
    assert torch.equal(after["last_step"], before["last_step"])
    assert torch.equal(after["count"], before["count"])
    ledger.admit(step, [])  # the step itself is still to be had


ADMITTED = {
    "everybody once": (SingleParticipation(), [[0, 1], [2, 3], [4, 5]]),
    "exactly b apart": (MinSeparation(3, 2), [[0], [1], [2], [0, 3], [1]]),
    "a skipped epoch": (FixedCycle(2, 3), [[0], [1], [], [1], [0], [1]]),
    "first seen late": (FixedCycle(2, 3), [[0], [], [0, 2], [1]]),
    "any number of times": (CyclicPoisson(1, 0.5), [[0, 1]] * 50),
}


@pytest.mark.parametrize("case", ADMITTED)
def test_what_the_participation_allows_is_admitted(case):
    participation, batches = ADMITTED[case]
    assert ledger_after(participation, *batches).t == len(batches)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_ledger_agrees_with_the_definition_of_min_separation(min_sep, most, data):
    ledger = Ledger(MinSeparation(min_sep, most), 3)
    steps: dict[int, list[int]] = {i: [] for i in range(3)}
    for t in range(12):
        batch = data.draw(st.sets(st.integers(0, 2)))
        legal = all(len(steps[i]) < most and all(t - u >= min_sep for u in steps[i]) for i in batch)
        try:
            ledger.admit(t, np.array(sorted(batch), dtype=np.int32))
        except RootnoiseError:
            assert not legal
            ledger.admit(t, [])
        else:
            assert legal
            for i in batch:
                steps[i].append(t)


@pytest.mark.parametrize("t", [0, 1, 3])
def test_steps_run_once_and_in_order(t):
    ledger = ledger_after(CyclicPoisson(1, 0.5), [0], [1])
    message = re.escape(f"step must be the next one, 2 (once, in order), got {t}")
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        ledger.admit(t, [2])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1, 2], "indices must be in [0, n_examples=6), got -1"),
        ([0, 6], "indices must be in [0, n_examples=6), got 6"),
        (np.array([2**63], dtype=np.uint64), f"indices must be in [0, n_examples=6), got {2**63}"),
        ([4, 1, 4], "indices must be distinct within a batch, got 4 twice"),
        ([0.5], "indices must be 1-D integers, got float64 of shape (1,)"),
        ([True], "indices must be 1-D integers, got bool of shape (1,)"),
        ([[1], [2]], "indices must be 1-D integers, got int64 of shape (2, 1)"),
    ],
)
def test_bad_indices_are_refused(indices, message):
    ledger = Ledger(CyclicPoisson(1, 0.5), 6)
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        ledger.admit(0, indices)
    assert ledger.t == 0


def test_tensors_lists_and_arrays_are_indices():
    ledger = Ledger(CyclicPoisson(1, 0.5), 6)
    for t, batch in enumerate((torch.tensor([3, 1]), [1, 3], np.array([1, 3], dtype=np.uint8), [])):
        ledger.admit(t, batch)


def test_an_unknown_participation_has_no_ledger():
    with pytest.raises(RootnoiseError, match=r"^participation must be a known kind, got 'all'$"):
        Ledger("all", 6)


def test_a_resumed_ledger_still_knows_who_was_where():
    ledger = ledger_after(MinSeparation(3, 2), [0], [1])
    resumed = Ledger(MinSeparation(3, 2), 6)
    resumed.load_state_dict(through_disk(ledger.state_dict()))
    assert resumed.t == 2
    with pytest.raises(RootnoiseError, match=r"^example 1 at step 2 breaks"):
        resumed.admit(2, [1])
    resumed.admit(2, [2])
    resumed.admit(3, [0])
    assert ledger.t == 2  # the saved state is a copy


def test_a_ledger_is_never_rolled_back():
    ledger = ledger_after(MinSeparation(3, 2), [0], [1])
    with pytest.raises(
        RootnoiseError, match=r"^ledger must be at step 0 to load a state, got step"
    ):
        ledger.load_state_dict(ledger.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "saved ledger's version must be 1, got 2"),
        ({"n_examples": 7}, "saved ledger's n_examples must be 6, got 7"),
        ({"participation": None}, "saved ledger's participation must be {'type': 'min-sep', "),
        ({"t": None}, "saved ledger's t must be an integer, got None"),
        ({"t": 1}, "saved ledger's last_step must be 6 int32 values in [0, 0], got int32 of "),
        ({"count": None}, "saved ledger's count must be 6 int32 values in [0, 2], got float64 of "),
        ({"count": torch.zeros(6)}, "saved ledger's count must be 6 int32 values in [0, 2], got f"),
        (
            {"count": torch.full((6,), -1, dtype=torch.int32)},
            "saved ledger's count must be 6 int32 values in [0, 2], got int32 of shape (6,), or ",
        ),
    ],
)
def test_another_ledger_is_not_resumed(change, message):
    state = ledger_after(MinSeparation(3, 2), [0], [1]).state_dict()
    fresh = Ledger(MinSeparation(3, 2), 6)
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}"):
        fresh.load_state_dict(state | change)
    assert fresh.t == 0

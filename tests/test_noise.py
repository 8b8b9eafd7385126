import io
import json
import os
import random  # noqa: TID251 - read, to see that nothing moved it
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import solve_triangular
from threadpoolctl import threadpool_limits

from rootnoise._check import RootnoiseError
from rootnoise.causal import Dense, Diagonal, Product, Toeplitz, series
from rootnoise.causal.banded import Banded
from rootnoise.factorization import factorize, mechanisms
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.noise.engine import full_precision
from rootnoise.noise.sources import AesSource, CudaSource
from rootnoise.noise.stream import MOST_STEPS, SMALL
from rootnoise.participation import FixedCycle, SingleParticipation
from rootnoise.workload import SGD

KEY = Key.from_seed(0)
CHUNK = AesSource.chunk
SINGLE = SingleParticipation()


def mechanism(bands=5, n_steps=40, noise_multiplier=2.0):
    split = factorize(SGD(n_steps, momentum=0.9), SINGLE, "bsr", bands=bands)
    return Mechanism.calibrate(split, SINGLE, noise_multiplier=noise_multiplier, delta=1e-5)


def with_strategy(strategy):
    return Mechanism("test", SGD(strategy.n_steps), SINGLE, strategy, 2.0, 1e-5)


def lower(n):
    """A well-conditioned dense strategy that no structure describes."""
    entries = np.tril(np.random.default_rng(0).normal(size=(n, n)))
    return Dense(entries / n + np.eye(n))


def speeds(n):
    return Diagonal(np.linspace(1, 2, n))


BAND = np.array([1.0, 0.7, 0.4, 0.2])
CASES = {
    "independent": lambda: mechanism(bands=1),
    "two bands": lambda: mechanism(bands=2),
    "banded strategy": lambda: mechanism(bands=7),
    "all bands": lambda: mechanism(bands=40),
    "banded noising": lambda: with_strategy(Toeplitz(BAND, 40).inverse()),
    "scaled columns": lambda: with_strategy(Product(Toeplitz(BAND, 40), speeds(40))),
    "scaled rows": lambda: with_strategy(Product(speeds(40), Toeplitz(BAND, 40).inverse())),
    "two filters": lambda: with_strategy(
        Product(Toeplitz(BAND, 40), Toeplitz(BAND[:2], 40).inverse())
    ),
    "diagonal": lambda: with_strategy(speeds(40)),
    "dense": lambda: with_strategy(lower(40)),
}


@cache  # optimised ones take seconds, and a mechanism is a frozen value
def registered(name):
    split = factorize(SGD(40, 0.5), FixedCycle(10, 4), name)
    return Mechanism.calibrate(split, FixedCycle(10, 4), noise_multiplier=2.0, delta=1e-5)


CASES |= {f"mechanism {name}": partial(registered, name) for name in mechanisms()}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def normals(mechanism, n_parameters, key=KEY):
    """Z in float64, position by position as the documents define it: shape (n_steps, d)."""
    source = AesSource(key.derive(f"noise {mechanism.fingerprint}"))
    chunks = range(-(-n_parameters // CHUNK))
    z = np.empty((mechanism.n_steps, len(chunks), 1, CHUNK), dtype=np.float32)
    for t, row in enumerate(z):
        for chunk in chunks:
            source.fill(t, [chunk], row[chunk : chunk + 1])
    return z.reshape(mechanism.n_steps, -1)[:, :n_parameters].astype(np.float64)


def oracle(mechanism, n_parameters):
    """noise_std * C^-1 Z by a dense float64 triangular solve."""
    z = normals(mechanism, n_parameters)
    return mechanism.noise_std * solve_triangular(mechanism.strategy.dense(), z, lower=True)


def run(stream, n_steps=None):
    steps = range(stream.t, stream.n_steps if n_steps is None else n_steps)
    return np.array([stream.next().numpy() for _ in steps])


def assert_close(actual, expected):
    """Agree to a float32 rounding of the row's own size."""
    size = np.sqrt(np.mean(np.square(expected), axis=1, keepdims=True))
    np.testing.assert_allclose(actual / size, expected / size, rtol=0, atol=1e-5)


def through_disk(state):
    """What a checkpoint gives back: no code runs on loading."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -------------------------------------------------------------------------------- the right noise


# What is optimised number by number takes minutes at 2,000 steps; its kind of map is tested below.
LONG: dict[str, dict[str, int]] = {
    name: {} for name in mechanisms() if name not in ("bandmf", "dense")
}
LONG["banded-inverse"] = {"bands": 8}


@pytest.mark.parametrize("name", LONG)
def test_2000_steps_of_every_mechanism_agree_with_a_dense_float64_solve(name):
    who = FixedCycle(500, 4)
    split = factorize(SGD(2000, 0.5), who, name, **LONG[name])
    long = Mechanism("test", split.workload, who, split.strategy, 2.0, 1e-5)
    assert_close(run(NoiseStream(long, 8, KEY)), oracle(long, 8))


@pytest.mark.parametrize("kind", [Banded, Dense])
def test_2000_steps_of_an_unstructured_strategy_agree_with_a_dense_float64_solve(kind):
    bands = SGD(2000, 0.5).square_root(100)
    scales = np.linspace(1, 2, 2000)
    strategies = {
        Banded: Banded(np.outer(bands, scales)),
        Dense: Dense(Toeplitz(bands, 2000).dense() * scales),
    }
    long = with_strategy(strategies[kind])
    assert_close(run(NoiseStream(long, 8, KEY)), oracle(long, 8))


@pytest.mark.parametrize("block_steps", [1, 2, 3, 7, 40, None])
def test_every_map_in_blocks_of_every_size_agrees_with_the_dense_solve(case, block_steps):
    stream = NoiseStream(case, 50, KEY, block_steps=block_steps)
    assert_close(run(stream), oracle(case, 50))


@pytest.mark.parametrize("n_parameters", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunks_agree_with_the_dense_solve(n_parameters):
    short = mechanism(bands=3, n_steps=5)
    assert_close(run(NoiseStream(short, n_parameters, KEY)), oracle(short, n_parameters))


def test_a_position_has_the_same_bits_in_a_longer_vector():
    short = mechanism(bands=3, n_steps=5)
    few, many = (run(NoiseStream(short, d, KEY)) for d in (CHUNK + 7, 2 * CHUNK + 1))
    np.testing.assert_array_equal(few, many[:, : CHUNK + 7])


@pytest.mark.parametrize("bands", [2, 16, 64])
def test_bits_do_not_depend_on_the_number_of_blas_threads(bands):
    m = mechanism(bands, n_steps=70)
    noise = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads, user_api="blas"):
            noise.append(run(NoiseStream(m, CHUNK + 5, KEY)))
    np.testing.assert_array_equal(noise[1], noise[0])
    np.testing.assert_array_equal(noise[2], noise[0])


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("memory", ["look-ahead", "ring"])
def test_bits_do_not_depend_on_the_number_of_threads(threads, memory):
    m, d = mechanism(bands=6, n_steps=12), 40 * CHUNK + 5
    one = NoiseStream(m, d, KEY, memory=memory, threads=1)
    many = NoiseStream(m, d, KEY, memory=memory, threads=threads)
    for _ in range(m.n_steps):
        assert torch.equal(many.next(), one.next())


def test_streams_of_several_threads_do_not_disturb_each_other():
    m, d = mechanism(bands=6, n_steps=12), 4 * CHUNK
    expected = run(NoiseStream(m, d, KEY))
    with ThreadPoolExecutor(3) as pool:
        for noise in pool.map(run, [NoiseStream(m, d, KEY, threads=2) for _ in range(3)]):
            np.testing.assert_array_equal(noise, expected)


def is_white(noise, mechanism, strategy=None):
    """C times the noise is white with std noise_std; false-alarm rate below 1e-7.

    Under the null W = C noise / noise_std has independent standard normal entries, N of them. Its
    mean square has deviation sqrt(2 / N) about 1, and the mean product of its N_j pairs of rows j
    apart has N_j^-1/2 about 0. Each of 21 scores is held to 6 deviations, which a normal exceeds
    with probability 2e-9 and a chi-square of N = 400,000 degrees of freedom with at most 3e-9.
    """
    w = (mechanism.strategy if strategy is None else strategy).apply(noise.astype(np.float64))
    w /= mechanism.noise_std
    scores = [(np.mean(np.square(w)) - 1) * np.sqrt(w.size / 2)]
    for lag in range(1, 21):
        products = w[lag:] * w[:-lag]
        scores.append(products.mean() * np.sqrt(products.size))
    return np.abs(scores).max() < 6


def banded_inverse(bands, n_steps):
    d = series.invert(SGD(n_steps).square_root(bands), bands)
    return with_strategy(Toeplitz(d, n_steps).inverse())


@pytest.mark.parametrize(("make", "bands"), [(mechanism, 8), (banded_inverse, 4)])
def test_strategy_times_noise_is_white_and_a_wrong_one_is_seen(make, bands):
    right = make(bands, n_steps=200)
    noise = run(NoiseStream(right, 2000, KEY))
    assert is_white(noise, right)
    # A scale 2 % off moves the mean square by 4 %: 18 deviations at N = 400,000.
    assert not is_white(1.02 * noise, right)
    assert not is_white(0.98 * noise, right)
    # One band more or less: its coefficient, 0.69 and more of C and 0.039 and more of C^-1, leaves
    # about as large a correlation at that lag, and 6 deviations are 0.0095.
    for wrong in (bands - 1, bands + 1):
        assert not is_white(noise, right, make(wrong, n_steps=200).strategy)
    coefficients = right.strategy.coefficients.copy()
    coefficients[3] *= 1.1
    assert not is_white(noise, right, Toeplitz(coefficients, 200))
    # Nor does independent noise of the same size pass.
    assert not is_white(np.random.default_rng(0).normal(0, noise.std(), noise.shape), right)


def test_entries_are_normal():
    right = mechanism(bands=8, n_steps=200)
    noise = run(NoiseStream(right, 2000, KEY))
    w = right.strategy.apply(noise.astype(np.float64)) / right.noise_std
    assert stats.kstest(w.ravel(), "norm").pvalue > 1e-7  # the false-alarm rate
    assert stats.kstest(1.02 * w.ravel(), "norm").pvalue < 1e-7


# ------------------------------------------------------------------------------------------ spans

D = 3 * CHUNK + 100
SPANS = {
    "nothing": [],
    "empty ones": [(0, 0), (7, 7), (D, D)],
    "one position": [(CHUNK, CHUNK + 1)],
    "the last position": [(D - 1, D)],
    "a whole chunk": [(CHUNK, 2 * CHUNK)],
    "across a border": [(CHUNK - 3, CHUNK + 5)],
    "two in a chunk, one far": [(2, 5), (9, 20), (20, 21), (2 * CHUNK + 9, D)],
    "everything, cut": [(0, 10), (10, 2 * CHUNK), (2 * CHUNK, D)],
}


def columns(spans):
    return np.concatenate([np.arange(0), *(np.arange(*span) for span in spans)])


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("block_steps", [1, 3])
def test_spans_hold_the_same_bits_as_the_whole_vector(spans, block_steps):
    m = mechanism(bands=4, n_steps=8)
    whole = run(NoiseStream(m, D, KEY, block_steps=block_steps))
    stream = NoiseStream(m, D, KEY, spans=spans, block_steps=block_steps)
    noise = run(stream)
    np.testing.assert_array_equal(noise, whole[:, columns(spans)])


def test_the_default_block_does_not_depend_on_spans():
    m = mechanism(bands=16)
    sizes = {NoiseStream(m, D, KEY, spans=spans).block_steps for spans in SPANS.values()}
    assert sizes == {NoiseStream(m, D, KEY).block_steps}


def test_memory_covers_the_spans_alone():
    m, d = mechanism(bands=16), 2**40
    stream = NoiseStream(m, d, KEY, spans=[(2**39, 2**39 + 5)])
    expected = NoiseStream(m, d, KEY, spans=[(2**39 - 9, 2**39 + 9)]).next()[9:14]
    assert torch.equal(stream.next(), expected)
    state = stream.state_dict()
    assert state["state"].shape == (15, 5)
    assert state["ready"].shape == (14, 5)


@pytest.mark.parametrize("stop", [0, 2, 3, 8])
def test_saved_columns_can_be_cut_and_joined(stop):
    m, d = mechanism(bands=4, n_steps=8), 2 * CHUNK + 9
    whole = run(NoiseStream(m, d, KEY))
    shards = [[(0, 5), (CHUNK, CHUNK + 7)], [(5, CHUNK), (CHUNK + 7, d)]]
    states, order = [], columns(shards[0] + shards[1])
    for spans in shards:
        stream = NoiseStream(m, d, KEY, spans=spans)
        run(stream, stop)
        states.append(through_disk(stream.state_dict()))
    assert all(
        states[0][field] == states[1][field] for field in states[0].keys() - {"state", "ready"}
    )
    joined = {
        name: torch.cat([state[name] for state in states], dim=1)[:, np.argsort(order)]
        for name in ("state", "ready")
    }
    for spans in ([(0, d)], [(3, CHUNK + 2), (CHUNK + 3, d)], []):
        stream = NoiseStream(m, d, KEY, spans=spans)
        cut = {name: rows[:, columns(spans)] for name, rows in joined.items()}
        stream.load_state_dict(states[0] | cut)
        expected = whole[stop:, columns(spans)]
        np.testing.assert_array_equal(run(stream).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 5), (4, 9)], "span's start must be in [5, n_parameters=10], got 4"),
        ([(5, 9), (0, 2)], "span's start must be in [9, n_parameters=10], got 0"),
        ([(0, 11)], "span's stop must be in [0, n_parameters=10], got 11"),
        ([(6, 5)], "span's stop must be in [6, n_parameters=10], got 5"),
        ([(-1, 5)], "span's start must be in [0, n_parameters=10], got -1"),
        ([(0, 1.5)], "span's stop must be an integer, got 1.5"),
    ],
)
def test_spans_are_checked(spans, message):
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
        NoiseStream(mechanism(), 10, KEY, spans=spans)


# ----------------------------------------------------------------------------------------- memory


def bisr(bands=5, n_steps=40):
    split = factorize(SGD(n_steps, momentum=0.9), SINGLE, "bisr", bands=bands)
    return Mechanism("test", split.workload, SINGLE, split.strategy, 2.0, 1e-5)


@pytest.mark.parametrize("memory", ["look-ahead", "ring", "regenerate", "offload"])
@pytest.mark.parametrize("bands", [1, 2, 5, 40])
def test_every_memory_mode_makes_the_same_noise(memory, bands):
    m = bisr(bands)
    stream = NoiseStream(m, 50, KEY, memory=memory)
    noise = run(stream)
    assert_close(noise, oracle(m, 50))
    like = NoiseStream(m, 50, KEY, block_steps=stream.block_steps)
    np.testing.assert_array_equal(noise, run(like))


@pytest.mark.parametrize("block_steps", [1, 2, 7, 40])
def test_regeneration_has_the_same_bits_in_blocks_of_every_size(block_steps):
    m = bisr()
    drawn, kept = (
        run(NoiseStream(m, CHUNK + 5, KEY, memory=memory, block_steps=block_steps))
        for memory in ("regenerate", "look-ahead")
    )
    np.testing.assert_array_equal(drawn, kept)


@pytest.mark.parametrize(
    ("make", "memory", "rows"),
    [
        (partial(mechanism, bands=9), "look-ahead", 8),  # the noise is the state
        (partial(mechanism, bands=9), "ring", 8),
        (partial(mechanism, bands=9), "offload", 8),
        (mechanism, "look-ahead", 8),  # 4 of state, which are noise too, and 4 more
        (bisr, "look-ahead", 12),  # 4 of z, 8 of noise
        (bisr, "ring", 5),
        (bisr, "regenerate", 4),
        (partial(bisr, bands=1), "look-ahead", 1),
        (partial(bisr, bands=2), "regenerate", 1),
        (partial(registered, "blt"), "ring", 2),  # one buffer and the noise of the step
        (partial(registered, "lambda-cgd"), "regenerate", 1),
    ],
)
def test_memory_rows_are_what_is_held(make, memory, rows):
    stream = NoiseStream(make(), 1000, KEY, memory=memory)
    assert stream.memory_rows == rows
    run(stream)
    assert stream.memory_rows == rows
    assert stream._memory.shape == (rows, 1000)


PEAK = """
import gc, json
from pathlib import Path
from rootnoise.noise import NoiseStream
from rootnoise.keys import Key
from test_noise import bisr

def kilobytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])

def rows_beyond_memory(memory, d):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    stream = NoiseStream(bisr(5), d, Key.from_seed(0), memory=memory, threads=2)
    for _ in range(6):
        stream.next()
    return (kilobytes("VmHWM") - before) * 1024 / (4 * d) - stream.memory_rows

rows_beyond_memory("look-ahead", 2**16)
print(json.dumps([rows_beyond_memory(m, 2**21) for m in ("look-ahead", "ring", "regenerate")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_the_rows_and_the_noise_handed_out():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        # glibc then returns each row to the system as soon as it is freed.
        env=os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    # One row is the noise handed out; the work space of two threads is less than another one.
    for rows in json.loads(done.stdout):
        assert 0.5 < rows < 2, done.stdout


def test_a_state_is_stored_once_after_loading():
    stopped = NoiseStream(mechanism(bands=9), 10, KEY)
    run(stopped, 11)
    resumed = NoiseStream(mechanism(bands=9), 10, KEY)
    resumed.load_state_dict(through_disk(stopped.state_dict()))
    assert resumed.memory_rows == stopped.memory_rows == 8


def test_what_remembers_its_noise_cannot_be_regenerated():
    message = (
        "memory='regenerate' must have a mechanism that remembers past draws alone (a banded "
        "inverse), got one that remembers its noise"
    )
    for m in (mechanism(), registered("blt"), registered("tree")):
        with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}$"):
            NoiseStream(m, 10, KEY, memory="regenerate")


def test_a_regenerated_run_is_resumed_by_its_like_alone():
    m = bisr()
    whole = run(NoiseStream(m, 30, KEY, memory="regenerate"))
    for stop in (1, 4, 6, 39):
        stopped = NoiseStream(m, 30, KEY, memory="regenerate")
        run(stopped, stop)
        state = through_disk(stopped.state_dict())
        assert state["state"].shape == (0, 30)
        resumed = NoiseStream(m, 30, KEY, memory="regenerate")
        resumed.load_state_dict(state)
        np.testing.assert_array_equal(run(resumed), whole[stop:])
        message = r"^saved noise's state must be float32 of shape \(4, 30\), got .* \(0, 30\)$"
        with pytest.raises(RootnoiseError, match=message):
            NoiseStream(m, 30, KEY).load_state_dict(state)


# ------------------------------------------------------------------------------------------- GPU


def test_float32_products_keep_float32_precision_and_the_setting_returns():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n_parameters", [10, CudaSource.chunk + 7])
def test_a_gpu_makes_the_noise_of_its_own_normals(n_parameters):
    m = mechanism(bands=7)
    stream = NoiseStream(m, n_parameters, KEY, device="cuda")
    source = CudaSource(KEY.derive(f"noise {m.fingerprint}"), "cuda")
    chunks = range(-(-n_parameters // CudaSource.chunk))
    drawn = torch.empty((len(chunks), m.n_steps, CudaSource.chunk), device="cuda")
    source.fill(0, chunks, drawn)
    z = drawn.transpose(0, 1).reshape(m.n_steps, -1)[:, :n_parameters].cpu().double().numpy()
    expected = m.noise_std * solve_triangular(m.strategy.dense(), z, lower=True)
    noise = torch.stack([stream.next() for _ in range(m.n_steps)])
    assert noise.device.type == "cuda"
    assert_close(noise.cpu().numpy(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_noise_is_that_of_the_cpu():
    m = mechanism(bands=7)
    stream = NoiseStream(m, 1000, KEY, device="cuda", memory="offload")
    expected = NoiseStream(m, 1000, KEY)
    for _ in range(m.n_steps):
        noise = stream.next()
        assert noise.device.type == "cuda"
        assert torch.equal(noise.cpu(), expected.next())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_of_a_gpu_and_of_a_cpu_are_not_mixed_up():
    m = mechanism()
    state = NoiseStream(m, 10, KEY).state_dict()
    with pytest.raises(RootnoiseError, match=r"^saved noise's source must be 'philox"):
        NoiseStream(m, 10, KEY, device="cuda").load_state_dict(state)


# ------------------------------------------------------------------------------------------- keys


def test_streams_without_a_key_share_no_noise():
    m = mechanism(bands=3, n_steps=3)
    first, second = NoiseStream(m, 1000), NoiseStream(m, 1000)
    assert first.key != second.key
    a, b = run(first).ravel(), run(second).ravel()
    # 1,000 independent columns: a correlation of 6 / 1000^0.5 = 0.19 has probability below 1e-7.
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.19
    np.testing.assert_array_equal(
        run(NoiseStream(m, 9, first.key)), run(NoiseStream(m, 9, first.key))
    )


def test_runs_of_different_mechanisms_share_no_noise():
    # Equal strategies, another noise multiplier: with equal Z, the noise of both could be removed.
    a, b = mechanism(noise_multiplier=2.0), mechanism(noise_multiplier=3.0)
    assert a.fingerprint != b.fingerprint
    za, zb = normals(a, 1000), normals(b, 1000)
    # 40,000 pairs: a correlation of 6 / 200 happens with probability 2e-9.
    assert abs(np.corrcoef(za.ravel(), zb.ravel())[0, 1]) < 6 / 200


def test_no_global_generator_is_read_or_moved():
    def states():
        numpy_state = np.random.get_state(legacy=False)
        return str(numpy_state), torch.get_rng_state().tolist(), random.getstate()

    before = states()
    run(NoiseStream(mechanism(), 10))
    assert states() == before


def test_noise_does_not_depend_on_torchs_defaults():
    m = mechanism(bands=5, n_steps=9)
    expected = run(NoiseStream(m, 20, KEY))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            stream = NoiseStream(m, 20, KEY)
            start = run(stream, 3)
            state = stream.state_dict()
            resumed = NoiseStream(m, 20, KEY)
            resumed.load_state_dict(state)
            rest = run(resumed)
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_array_equal(np.concatenate([start, rest]), expected)


def test_the_tensor_is_the_callers_own():
    m = mechanism(bands=5)
    stream, kept = NoiseStream(m, 20, KEY), []
    for _ in range(m.n_steps):
        kept.append(stream.next())
        assert kept[-1].dtype == torch.float32
        assert kept[-1].shape == (20,)
    expected = torch.stack(kept)
    other = NoiseStream(m, 20, KEY)
    for row in expected:
        tensor = other.next()
        assert torch.equal(tensor, row)
        tensor.zero_()


@pytest.mark.parametrize(("bands", "rows"), [(1, 1), (2, 8), (9, 8), (16, 16), (40, 40), (66, 65)])
def test_look_ahead_costs_a_banded_strategy_at_most_seven_rows(bands, rows):
    stream = NoiseStream(mechanism(bands, n_steps=80), 10)
    assert stream.memory_rows == rows
    assert stream.block_steps == min(rows, MOST_STEPS)
    ring = NoiseStream(mechanism(bands, n_steps=80), 10, memory="ring")
    assert ring.memory_rows == max(1, bands - 1)
    ahead = NoiseStream(mechanism(bands, n_steps=80), 10, block_steps=30)
    assert ahead.memory_rows == max(30, bands - 1)


def test_a_default_block_is_bounded():
    assert NoiseStream(mechanism(bands=200, n_steps=200), 10).block_steps == MOST_STEPS


@pytest.mark.parametrize(("n_parameters", "rows"), [(SMALL, 8), (SMALL + 1, 3)])
def test_a_large_vector_holds_no_row_for_speed_alone_wherever_its_spans_lie(n_parameters, rows):
    for spans in ([(0, 5)], [(n_parameters - 5, n_parameters)]):
        stream = NoiseStream(mechanism(bands=4), n_parameters, spans=spans)
        assert stream.memory_rows == stream.block_steps == rows


# --------------------------------------------------------------------------------------- refusals


def test_no_noise_past_the_last_step():
    stream = NoiseStream(mechanism(n_steps=7), 10, KEY)
    run(stream)
    message = (
        "step 7 is past the mechanism's n_steps=7: its privacy claim covers no further release"
    )
    for _ in range(2):
        with pytest.raises(RootnoiseError, match=f"^{message}$"):
            stream.next()


def test_arguments_are_checked():
    m = mechanism()
    with pytest.raises(RootnoiseError, match=r"^n_parameters must be >= 1, got 0$"):
        NoiseStream(m, 0)
    for block_steps in (0, 41):
        message = rf"^block_steps must be in \[1, n_steps=40\], got {block_steps}$"
        with pytest.raises(RootnoiseError, match=message):
            NoiseStream(m, 10, block_steps=block_steps)
    with pytest.raises(RootnoiseError, match=r"^key must be a Key, got int$"):
        NoiseStream(m, 10, 7)
    message = r"^memory must be in \['look-ahead', 'ring', 'regenerate', 'offload'\], got 'disk'$"
    with pytest.raises(RootnoiseError, match=message):
        NoiseStream(m, 10, memory="disk")
    with pytest.raises(RootnoiseError, match=r"^threads must be >= 1, got 0$"):
        NoiseStream(m, 10, threads=0)
    with pytest.raises(RootnoiseError, match=r"^device of AES noise must be cpu .*, got cuda$"):
        NoiseStream(m, 10, device="cuda", source=AesSource)


class BreaksOff(AesSource):
    """Is interrupted once, in the second chunk of a block: the first one has moved on by then."""

    left = 1

    def fill(self, t, chunks, out):
        if t == 20 and chunks == [1] and BreaksOff.left:
            BreaksOff.left -= 1
            raise KeyboardInterrupt
        super().fill(t, chunks, out)


def test_an_interrupted_block_cannot_be_continued():
    stream = NoiseStream(mechanism(), CHUNK + 5, KEY, block_steps=20, source=BreaksOff)
    run(stream, 20)
    with pytest.raises(KeyboardInterrupt):
        stream.next()
    message = "noise must not go on after an exception broke off the block of step 20: resume from "
    for act in (stream.next, stream.state_dict):
        with pytest.raises(RootnoiseError, match=f"^{message}"):
            act()


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 39, 40])
def test_a_resumed_stream_has_the_same_bits(case, stop):
    whole = run(NoiseStream(case, 30, KEY, block_steps=3))
    stopped = NoiseStream(case, 30, KEY, block_steps=3)
    before = run(stopped, stop)
    state = through_disk(stopped.state_dict())
    resumed = NoiseStream(case, 30, KEY, block_steps=3)
    resumed.load_state_dict(state)
    assert resumed.t == stop
    after = run(resumed)
    np.testing.assert_array_equal(
        np.concatenate([before.reshape(-1, 30), after.reshape(-1, 30)]), whole
    )
    # And saving changed nothing for the stream that was saved.
    np.testing.assert_array_equal(run(stopped).reshape(-1, 30), whole[stop:])


@pytest.mark.parametrize("bands", [1, 16])
def test_a_resume_across_chunks_has_the_same_bits(bands):
    m, d = mechanism(bands, n_steps=20), CHUNK + 9
    whole = run(NoiseStream(m, d, KEY))
    for stop in (7, 8, 9):
        stopped = NoiseStream(m, d, KEY)
        run(stopped, stop)
        resumed = NoiseStream(m, d, KEY)
        resumed.load_state_dict(through_disk(stopped.state_dict()))
        np.testing.assert_array_equal(run(resumed), whole[stop:])


@pytest.mark.parametrize(("m", "other"), [(1, 7), (7, 1), (7, 3), (3, 40), (40, 5)])
def test_a_resume_with_other_blocks_agrees_to_rounding(case, m, other):
    stopped = NoiseStream(case, 30, KEY, block_steps=m)
    run(stopped, 9)
    resumed = NoiseStream(case, 30, KEY, block_steps=other)
    resumed.load_state_dict(stopped.state_dict())
    assert_close(run(resumed), oracle(case, 30)[9:])


def test_the_saved_state_holds_neither_key_nor_a_view():
    stream = NoiseStream(mechanism(), 30, KEY)
    run(stream, 5)
    state = stream.state_dict()
    before = {name: str(value) for name, value in state.items()}
    run(stream)
    assert {name: str(value) for name, value in state.items()} == before
    assert KEY.secret not in state.values()
    assert KEY.secret.hex() not in str(state)
    assert {type(value) for value in state.values()} == {int, str, float, torch.Tensor}


def test_a_stream_only_moves_forward():
    m = mechanism()
    stream = NoiseStream(m, 10, KEY)
    fresh = stream.state_dict()
    stream.next()
    message = "noise stream must be at step 0 to load a state, got step 1"
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        stream.load_state_dict(fresh)
    resumed = NoiseStream(m, 10, KEY)
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(RootnoiseError, match=f"^{message}$"):
        resumed.load_state_dict(stream.state_dict())


class Other(AesSource):
    name = "other"


OTHERS = {
    "bands": ("fingerprint", lambda m: NoiseStream(mechanism(bands=4), 10, KEY)),
    "n_steps": ("fingerprint", lambda m: NoiseStream(mechanism(n_steps=41), 10, KEY)),
    "sigma": ("fingerprint", lambda m: NoiseStream(mechanism(noise_multiplier=2.1), 10, KEY)),
    "clip": ("fingerprint", lambda m: NoiseStream(replace(m, clip_norm=1.1), 10, KEY)),
    "model": ("n_parameters", lambda m: NoiseStream(m, 11, KEY)),
    "key": ("key_id", lambda m: NoiseStream(m, 10, Key.from_seed(1))),
    "source": ("source", lambda m: NoiseStream(m, 10, KEY, source=Other)),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run_is_not_continued(change):
    field, make = OTHERS[change]
    m = mechanism()
    stream = NoiseStream(m, 10, KEY)
    run(stream, 4)
    other = make(m)
    with pytest.raises(RootnoiseError, match=f"^saved noise's {field} must be .*, got .*$"):
        other.load_state_dict(stream.state_dict())
    assert other.t == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "saved noise's version must be 1, got 2"),
        ({"n_steps": 39}, "saved noise's n_steps must be 40, got 39"),
        ({"noise_std": 0.1}, "saved noise's noise_std must be "),
        ({"chunk": 10}, f"saved noise's chunk must be {CHUNK}, got 10"),
        ({"t": 41}, "saved noise's t must be in [0, n_steps=40], got 41"),
        ({"t": None}, "saved noise's t must be an integer, got None"),
        ({"made": 2}, "saved noise's made must be in [3, 40], got 2"),
        (
            {"made": 5},
            "saved noise's ready must be float32 of shape (2, 10), got torch.float32 of ",
        ),
        (
            {"state": torch.zeros(3, 10)},
            "saved noise's state must be float32 of shape (4, 10), got torch.float32 of shape "
            "(3, 10)",
        ),
        ({"ready": None}, "saved noise's ready must be float32 of shape (1, 10), got nothing"),
        (
            {"ready": torch.zeros(1, 10).double()},
            "saved noise's ready must be float32 of shape (1, 10), got torch.float64 of shape "
            "(1, 10)",
        ),
        (
            {"ready": torch.full((1, 10), torch.nan)},
            "saved noise's ready must be finite, got NaN or infinite values",
        ),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    stream = NoiseStream(mechanism(), 10, KEY, block_steps=4)
    run(stream, 3)
    fresh = NoiseStream(mechanism(), 10, KEY, block_steps=4)
    with pytest.raises(RootnoiseError, match=f"^{re.escape(message)}"):
        fresh.load_state_dict(stream.state_dict() | change)
    assert_close(run(fresh), oracle(mechanism(), 10))  # a refused state leaves no trace

"""The noise of a step is the calibrated, correlated one, bit by bit a function of its place."""

from __future__ import annotations

import random  # noqa: TID251 - read, to see that nothing moved it
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import solve_triangular
from threadpoolctl import threadpool_limits

from noise_cases import (
    CHUNK,
    KEY,
    assert_close,
    each_case,
    mechanism,
    normals,
    oracle,
    run,
    with_strategy,
)
from rootnoise._check import RootnoiseError
from rootnoise.causal import Dense, Toeplitz, series
from rootnoise.causal.banded import Banded
from rootnoise.factorization import factorize, mechanisms
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.noise.engine import full_precision
from rootnoise.noise.sources import CudaSource
from rootnoise.participation import FixedCycle
from rootnoise.workload import SGD

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


@each_case
@pytest.mark.parametrize("block_steps", [1, 2, 3, 7, 40, None])
def test_every_map_in_blocks_of_every_size_agrees_with_the_dense_solve(make, block_steps):
    case = make()
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


# ------------------------------------------------------------------------ what the noise depends on


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

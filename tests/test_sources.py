import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from rootnoise._check import RootnoiseError
from rootnoise.keys import Key
from rootnoise.noise.sources import AesSource, CudaSource, philox_state

KEY = Key.from_seed(0)
CHUNK = AesSource.chunk
PAIRS = CHUNK // 2


def draw(key=KEY, t=0, chunks=(0,), steps=1):
    out = np.empty((len(chunks), steps, CHUNK), dtype=np.float32)
    AesSource(key).fill(t, chunks, out)
    return out


def oracle(key, t, chunk):
    """Encrypt the counters one by one, and take Box and Muller at their word, in float64."""
    aes = algorithms.AES(key.derive("aes").secret)
    cipher = Cipher(aes, modes.ECB()).encryptor()  # noqa: S305 - what counter mode is made of
    first = t * (12 * PAIRS // 16)
    counters = b"".join(struct.pack(">QQ", chunk, first + i) for i in range(12 * PAIRS // 16))
    words = cipher.update(counters)
    radius = np.frombuffer(words[: 8 * PAIRS], "<i8").astype(float) / 2**63
    angle = math.pi * np.frombuffer(words[8 * PAIRS :], "<i4").astype(float) / 2**31
    r = np.sqrt(-2 * np.log(np.abs(radius)))
    return np.concatenate([r * np.cos(angle), r * np.sin(angle)])


# --------------------------------------------------------------------------------- the same values


@pytest.mark.parametrize(("t", "chunk"), [(0, 0), (1, 0), (0, 1), (17, 5), (2**40, 2**63)])
def test_normals_are_box_muller_of_the_encrypted_counters(t, chunk):
    # float32: 24 bits of the angle and of tan leave an error of a few times 2**-24 of the radius.
    np.testing.assert_allclose(draw(t=t, chunks=[chunk])[0, 0], oracle(KEY, t, chunk), atol=2e-5)


def test_the_first_values_are_pinned():
    # A change here breaks the bit-exact resume of every saved run.
    z = draw(t=3, chunks=[5])[0, 0]
    expected = [-0.11806964874267578, -0.2637689709663391, 0.8967221975326538, 0.1955280303955078]
    np.testing.assert_allclose(z[[0, 1, PAIRS, PAIRS + 1]], expected, rtol=1e-5)


@pytest.mark.parametrize("t", [0, 5, 10**9])
@pytest.mark.parametrize("steps", [1, 3, 16, 17, 40])
def test_a_row_has_the_same_bits_however_it_is_drawn(t, steps):
    chunks = [0, 1, 2, 7, 2**40]
    together = draw(t=t, chunks=chunks, steps=steps)
    for i, chunk in enumerate(chunks):
        for j in {0, steps // 2, steps - 1}:
            np.testing.assert_array_equal(together[i, j], draw(t=t + j, chunks=[chunk])[0, 0])


def test_draws_do_not_depend_on_torchs_defaults():
    expected = draw(t=3, steps=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            np.testing.assert_array_equal(draw(t=3, steps=2), expected)
    finally:
        torch.set_default_dtype(before)


def test_a_source_writes_nowhere_else():
    space = np.full((3, 30, CHUNK), 7, dtype=np.float32)
    AesSource(KEY).fill(4, [1, 2], space[1:, 5:25])
    np.testing.assert_array_equal(space[1:, 5:25], draw(t=4, chunks=[1, 2], steps=20))
    assert np.count_nonzero(space == 7) == 3 * 30 * CHUNK - 2 * 20 * CHUNK


def test_no_two_places_share_a_draw():
    # The words that a 32-bit seed, or a sum of step and chunk, would confuse.
    steps, chunks = [0, 1, 2, 2**31, 2**32, 2**33 + 1], [0, 1, 2, 2**31, 2**32, 2**63]
    rows = [
        hashlib.sha256(draw(key, t, [c]).tobytes()).digest()
        for key in (KEY, Key.from_seed(1))
        for t in steps
        for c in chunks
    ]
    assert len(set(rows)) == len(rows)


def test_no_counter_is_used_twice():
    # Blocks of consecutive steps of a chunk meet without overlap.
    assert AesSource._STEP_BLOCKS * 16 == AesSource._STEP_BYTES == 12 * PAIRS


# ------------------------------------------------------------------------------- the right ones


def scores(z):
    """Deviations from what N(0, 1) expects, each about standard normal.

    Moments: the mean of z^k has variance (E z^2k - (E z^k)^2) / N. Tail counts are binomial.
    """
    z = z.ravel().astype(np.float64)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    result = [
        (np.mean(z**k) - mean) * math.sqrt(z.size / variance)
        for k, (mean, variance) in moments.items()
    ]
    for c in (1.0, 2.0, 3.0, 4.0):
        p = stats.norm.sf(c)
        for tail in (z > c, z < -c):
            result.append((tail.mean() - p) * math.sqrt(z.size / (p * (1 - p))))
    return np.array(result)


def is_standard_normal(z):
    """Twelve scores within 6 deviations and Kolmogorov-Smirnov: a false alarm in 3e-7 of cases.

    A normal exceeds 6 deviations with probability 2e-9; each count beyond 4, of N = 2**20 about a
    Poisson variable of mean 33, with 8e-8. Kolmogorov-Smirnov: 1e-7.
    """
    return np.abs(scores(z)).max() < 6 and stats.kstest(z.ravel(), "norm").pvalue > 1e-7


def test_draws_are_standard_normal_and_a_wrong_scale_is_seen():
    z = draw(t=2, chunks=range(16), steps=16)
    assert z.size == 2**20
    assert is_standard_normal(z)
    # One percent moves the mean square by 2 %: 14 of its deviations, sqrt(2 / N) = 0.14 %.
    for wrong in (1.01 * z, 0.99 * z, z + 0.01, np.clip(z, -3, 3), np.round(z, 1)):
        assert not is_standard_normal(wrong)


def test_the_far_tail_is_there():
    # No sample gets there: set the words. A uniform of 24 bits would end at 5.77.
    source = AesSource(KEY)
    out = np.empty((1, 1, CHUNK), dtype=np.float32)
    extremes = [0, 1, -1, 2, 2**20, 2**40, 2**62, -(2**63), 2**63 - 1]
    source._radius_words[0, : len(extremes)] = extremes
    source._angle_words[0, :] = 0
    source._transform(out)
    squares = np.array(extremes, dtype=float) ** 2
    expected = np.sqrt(-np.log((np.minimum(squares + 1, 2.0**126)) / 2.0**126))
    np.testing.assert_allclose(out[0, 0, : len(extremes)], expected, rtol=1e-6, atol=1e-6)
    assert out.max() == pytest.approx(math.sqrt(126 * math.log(2)), rel=1e-6)  # 9.345


@pytest.mark.parametrize("angle", [-(2**31), 2**31 - 1, -(2**30), 2**30, 1, -1])
def test_every_angle_gives_finite_normals(angle):
    source = AesSource(KEY)
    out = np.empty((1, 1, CHUNK), dtype=np.float32)
    source._radius_words[0, :] = 2**40
    source._angle_words[0, :] = angle
    source._transform(out)
    r, a = math.sqrt(-2 * math.log(2.0**-23)), math.pi * angle / 2**31
    np.testing.assert_allclose(out[0, 0, [0, PAIRS]], [r * math.cos(a), r * math.sin(a)], atol=5e-6)


def test_draws_are_uncorrelated_across_steps_chunks_keys_positions_and_pairs():
    rows = [*draw(t=0, chunks=range(8), steps=8).reshape(-1, CHUNK), *draw(Key.from_seed(1))[0]]
    z = np.array(rows, dtype=np.float64)
    z /= np.sqrt(np.mean(z**2, axis=1, keepdims=True))
    across = z @ z.T / CHUNK
    np.fill_diagonal(across, 0)
    # 2,080 pairs of rows, each normal with deviation N^-1/2: 7 of them in 5e-9 of cases.
    assert np.abs(across).max() * math.sqrt(CHUNK) < 7
    # Within a row: 40 lags, and the two normals of a pair; their squares too, which an error of the
    # radius would tie together. N = 266,240 at least: 6.5 deviations in 7e-9 of cases.
    for w in (z, (z**2 - 1) / math.sqrt(2)):
        for lag in [*range(1, 40), PAIRS]:
            products = w[:, lag:] * w[:, :-lag]
            # Products of centred squares have heavy tails, and their mean is normal all the same:
            # the excess kurtosis, 21, is divided by N.
            assert abs(products.mean()) * math.sqrt(products.size) < 6.5, lag


# ------------------------------------------------------------------------------------- places


def test_aes_runs_on_the_cpu_alone():
    message = r"^device of AES noise must be cpu \(memory='offload' delivers it\), got cuda$"
    with pytest.raises(RootnoiseError, match=message):
        AesSource(KEY, "cuda")


def test_cuda_noise_runs_on_a_gpu_alone():
    with pytest.raises(RootnoiseError, match=r"^device of CUDA noise must be a GPU, got cpu$"):
        CudaSource(KEY, "cpu")


def test_the_place_of_a_cuda_draw_is_one_to_one():
    places = [(t, c) for t in (0, 1, 2**31, 2**32 - 1) for c in (0, 1, 2**22, 2**23 - 1)]
    states = [philox_state(b"8 bytes.", t, c) for t, c in places]
    offsets = sorted(struct.unpack("=8sq", state)[1] for state in states)
    assert {state[:8] for state in states} == {b"8 bytes."}
    # torch asks for multiples of 4, and a draw of 2**18 moves at most 128 on.
    assert all(offset % 4 == 0 for offset in offsets)
    assert min(np.diff(offsets)) >= 256
    assert offsets[-1] < 2**63


@pytest.mark.parametrize(("t", "chunk"), [(2**32, 0), (-1, 0), (0, 2**23), (0, -1)])
def test_a_place_that_does_not_fit_is_refused(t, chunk):
    with pytest.raises(RootnoiseError, match=r"^(t|chunk) must be in \[0, \d+\], got -?\d+$"):
        philox_state(bytes(8), t, chunk)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_are_normal_and_depend_on_their_place_alone():
    source = CudaSource(KEY, "cuda")
    out = torch.empty((2, 8, CudaSource.chunk), device="cuda")
    source.fill(3, [4, 9], out)
    again = torch.empty((1, 1, CudaSource.chunk), device="cuda")
    for i, chunk in enumerate((4, 9)):
        for j in range(8):
            source.fill(3 + j, [chunk], again)
            assert torch.equal(again[0, 0], out[i, j])
    assert is_standard_normal(out.cpu().numpy())
    assert not is_standard_normal(1.01 * out.cpu().numpy())

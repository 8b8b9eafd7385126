import stat

import numpy as np
import pytest
import torch
from scipy import stats

from rootnoise._check import RootnoiseError
from rootnoise.randomness import GaussianSource, Key

KEY = Key.from_seed(0)
PINNED = [-0.15776006877422333, 0.5549784898757935, -0.5488138794898987, 0.1730174422264099]


def draw(key=KEY, t=0, chunk=0, size=1000):
    out = np.empty(size, dtype=np.float32)
    GaussianSource(key).fill(t, chunk, out)
    return out


def test_fresh_keys_differ_and_seeded_keys_repeat():
    assert Key.fresh() != Key.fresh()
    assert Key.from_seed(5) == Key.from_seed(5) != Key.from_seed(6)
    assert len(Key.fresh().secret) == 32


def test_nothing_printed_shows_the_secret():
    assert repr(KEY) == str(KEY) == f"Key(id='{KEY.id}')"
    assert KEY.secret.hex() not in repr(KEY)
    assert KEY.id not in KEY.secret.hex()


def test_derived_keys_are_separate():
    keys = [KEY, KEY.derive("noise"), KEY.derive("noise "), KEY.derive("sampler"), KEY.derive("")]
    assert len({key.secret for key in keys} | {key.derive("noise").secret for key in keys}) == 9
    assert len({key.id for key in keys}) == len(keys)
    assert KEY.derive("noise") == KEY.derive("noise")


@pytest.mark.parametrize(
    ("secret", "got"), [(b"short", "5"), (b"", "0"), ("x" * 32, "str"), (None, "NoneType")]
)
def test_a_key_is_32_bytes(secret, got):
    with pytest.raises(RootnoiseError, match=f"^secret must be 32 bytes, got {got}$"):
        Key(secret)


def test_seeds_are_not_negative():
    with pytest.raises(RootnoiseError, match=r"^seed must be >= 0, got -1$"):
        Key.from_seed(-1)


def test_a_saved_key_is_private_complete_and_never_overwritten(tmp_path):
    path = tmp_path / "run.key"
    KEY.save(path)
    assert Key.load(path) == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(RootnoiseError, match=r"^key file must not exist yet, got .*run.key$"):
        Key.fresh().save(path)
    assert Key.load(path) == KEY


@pytest.mark.parametrize("text", [b"", b"ab" * 31, b"xy" * 32, b"\xff" * 64])
def test_a_damaged_key_file_is_refused_without_its_text(tmp_path, text):
    path = tmp_path / "run.key"
    path.write_bytes(text)
    with pytest.raises(RootnoiseError, match=r"^key file must hold 64 hex digits, got .*run.key$"):
        Key.load(path)


def test_the_first_values_are_pinned():
    # A change here (of NumPy's ziggurat, say) breaks the bit-exact resume of every saved run.
    assert draw(t=3, chunk=5, size=4).tolist() == PINNED


def test_a_draw_depends_on_key_step_and_chunk_alone():
    first = draw(t=7, chunk=2)
    draw(t=8, chunk=2)
    np.testing.assert_array_equal(draw(t=7, chunk=2), first)
    np.testing.assert_array_equal(draw(t=7, chunk=2, size=10), first[:10])


def test_no_two_positions_share_a_draw():
    # The words that a 32-bit seed, or a sum of step and chunk, would confuse.
    words = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40, 2**64 - 1]
    rows = [draw(key, t, c, 8) for key in (KEY, Key.from_seed(1)) for t in words for c in words]
    values = np.concatenate(rows)
    # 1,024 float32 normals: equal neighbours by chance happen, equal pairs in order do not.
    assert len({row[:2].tobytes() for row in rows}) == len(rows)
    assert np.unique(values).size > 0.99 * values.size


@pytest.mark.parametrize("name", ["t", "chunk"])
@pytest.mark.parametrize("word", [-1, 2**64])
def test_positions_fit_a_counter_word(name, word):
    with pytest.raises(
        RootnoiseError, match=rf"^{name} must be in \[0, {2**64 - 1}\], got {word}$"
    ):
        KEY.generator(**{name: word})


def is_standard_normal(z):
    """Kolmogorov-Smirnov and the mean square, each with a false-alarm rate below 1e-7."""
    # Mean square: relative deviation sqrt(2 / N); 6 deviations happen with probability 2e-9.
    spread = abs(np.mean(np.square(z, dtype=np.float64)) - 1) * np.sqrt(z.size / 2)
    return spread < 6 and stats.kstest(z, "norm").pvalue > 1e-7


def test_draws_are_standard_normal_and_a_wrong_scale_is_seen():
    z = np.concatenate([draw(t=t, chunk=c, size=2**14) for t in range(8) for c in range(8)])
    assert is_standard_normal(z)
    # 2 % is 4 % of the square, or 29 of its deviations at N = 2**20; a shift of 0.02 moves the
    # distribution function by 0.008, 16 times the 1e-3 / 2 that chance does.
    for wrong in (1.02 * z, 0.98 * z, z + 0.02):
        assert not is_standard_normal(wrong)


def test_draws_of_different_steps_chunks_and_keys_are_uncorrelated():
    places = [(KEY, t, c) for t in range(4) for c in range(4)] + [(Key.from_seed(1), 0, 0)]
    z = np.array([draw(*place, 2**16) for place in places], dtype=np.float64)
    correlation = z @ z.T / z.shape[1]
    np.fill_diagonal(correlation, 0)
    # 136 pairs, each normal with deviation N^-1/2: 6.5 deviations happen with probability 1.1e-8.
    assert np.abs(correlation).max() * np.sqrt(z.shape[1]) < 6.5


def test_no_global_generator_is_read_or_moved():
    def states():
        numpy_state = np.random.get_state(legacy=False)
        return str(numpy_state), torch.get_rng_state().tolist()

    before = states()
    first = draw()
    with torch.random.fork_rng():
        torch.rand(1)
        np.testing.assert_array_equal(draw(), first)
    Key.fresh()
    assert states() == before

import os
import stat

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.keys import Key

KEY = Key.from_seed(0)


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


def test_a_saved_key_is_on_the_disk_before_its_first_use(tmp_path, monkeypatch):
    path, seen = tmp_path / "run.key", []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(Key.load(path)))
    KEY.save(path)
    assert seen == [KEY]


@pytest.mark.parametrize("text", [b"", b"ab" * 31, b"xy" * 32, b"\xff" * 64])
def test_a_damaged_key_file_is_refused_without_its_text(tmp_path, text):
    path = tmp_path / "run.key"
    path.write_bytes(text)
    with pytest.raises(RootnoiseError, match=r"^key file must hold 64 hex digits, got .*run.key$"):
        Key.load(path)


def test_the_first_words_of_a_generator_are_pinned():
    # A change here reorders the examples of every saved run.
    words = KEY.generator(t=3, chunk=5).integers(2**63, size=3)
    assert words.tolist() == [5925908155526827413, 7414003610953253782, 1440459360629616408]


def test_a_generator_depends_on_key_and_place_alone():
    first = KEY.generator(t=7, chunk=2).random(100)
    KEY.generator(t=8, chunk=2).random(100)
    np.testing.assert_array_equal(KEY.generator(t=7, chunk=2).random(100), first)


def test_no_two_places_share_words():
    # The words that a 32-bit seed, or a sum of step and chunk, would confuse.
    words = [0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**40, 2**64 - 1]
    keys = (KEY, Key.from_seed(1))
    draws = [
        key.generator(t, c).integers(2**63, size=8) for key in keys for t in words for c in words
    ]
    assert len({word for draw in draws for word in draw.tolist()}) == 8 * len(draws)


@pytest.mark.parametrize("name", ["t", "chunk"])
@pytest.mark.parametrize("word", [-1, 2**64])
def test_positions_fit_a_counter_word(name, word):
    with pytest.raises(
        RootnoiseError, match=rf"^{name} must be in \[0, {2**64 - 1}\], got {word}$"
    ):
        KEY.generator(**{name: word})

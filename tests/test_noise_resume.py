"""What a noise stream refuses, and how a saved one goes on."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from noise_cases import CHUNK, KEY, assert_close, each_case, mechanism, oracle, run, through_disk
from rootnoise._check import RootnoiseError
from rootnoise.keys import Key
from rootnoise.noise import NoiseStream
from rootnoise.noise.sources import AesSource

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


@each_case
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 39, 40])
def test_a_resumed_stream_has_the_same_bits(make, stop):
    case = make()
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


@each_case
@pytest.mark.parametrize(("m", "other"), [(1, 7), (7, 1), (7, 3), (3, 40), (40, 5)])
def test_a_resume_with_other_blocks_agrees_to_rounding(make, m, other):
    case = make()
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

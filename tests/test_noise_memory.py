"""What a noise stream holds: spans of the parameters, modes of memory, rows of state."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from noise_cases import (
    CHUNK,
    KEY,
    assert_close,
    bisr,
    columns,
    mechanism,
    oracle,
    registered,
    run,
    through_disk,
)
from rootnoise._check import RootnoiseError
from rootnoise.noise import NoiseStream
from rootnoise.noise.blockplan import MOST_STEPS, SMALL

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
from noise_cases import bisr

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

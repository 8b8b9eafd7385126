"""Strategies, files, fingerprints and noise are those that golden.json recorded.

Whatever an optimiser or BLAS may round otherwise on another processor is compared as a number.
Fingerprints and noise are those of recorded fields, which no processor changes.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import golden
import rootnoise as rn

GOLDEN = json.loads(golden.FILE.read_text())
EXPLICIT = ("bsr", "bisr", "identity", "square-root", "tree", "workload")


def test_every_registered_mechanism_is_recorded():
    assert set(GOLDEN["mechanisms"]) == set(rn.mechanisms())


@pytest.mark.parametrize("name", sorted(GOLDEN["mechanisms"]))
def test_recorded_files_load_with_their_fingerprint(name):
    recorded = GOLDEN["mechanisms"][name]
    mechanism = rn.Mechanism.from_dict(recorded["fields"])
    assert mechanism.fingerprint == recorded["fingerprint"]
    assert mechanism.to_dict()["definition"] == recorded["fields"]["definition"]
    np.testing.assert_allclose(mechanism.strategy.dense(), recorded["strategy"], atol=1e-12)
    assert mechanism.noise_std == pytest.approx(recorded["noise_std"], rel=1e-12)
    assert mechanism.rmse == pytest.approx(recorded["rmse"], rel=1e-10)


@pytest.mark.parametrize("name", sorted(GOLDEN["mechanisms"]))
def test_factorizations_are_built_as_recorded(name):
    built, recorded = golden.calibrated(name, golden.N_STEPS), GOLDEN["mechanisms"][name]
    close = 1e-10 if name in EXPLICIT else 1e-3
    np.testing.assert_allclose(built.strategy.dense(), recorded["strategy"], rtol=0, atol=close)
    assert built.rmse == pytest.approx(recorded["rmse"], rel=min(close, 1e-5))


@pytest.mark.parametrize("name", golden.STREAMS)
def test_noise_is_as_recorded(name):
    recorded = GOLDEN["noise"][name]
    mechanism = rn.Mechanism.from_dict(recorded["fields"])
    for size, expected in recorded["sizes"].items():
        actual = golden.drawn(mechanism, int(size))
        scale = mechanism.noise_std
        np.testing.assert_allclose(
            actual["values"], expected["values"], atol=1e-4 * scale, rtol=1e-5
        )
        np.testing.assert_allclose(
            actual["squares"], expected["squares"], atol=1e-6 * scale**2, rtol=1e-4
        )


@pytest.mark.skipif(
    GOLDEN["bits"]["processor"] != golden.processor(),
    reason="the last bit of a logarithm is that of another processor",
)
@pytest.mark.parametrize("name", golden.STREAMS)
def test_noise_is_as_recorded_to_the_last_bit(name):
    mechanism = rn.Mechanism.from_dict(GOLDEN["noise"][name]["fields"])
    for size, expected in GOLDEN["bits"]["sha256"][name].items():
        assert golden.bits(mechanism, int(size)) == expected


@pytest.mark.parametrize("room", golden.VALUES)
def test_values_are_written_and_read_as_recorded(room):
    texts = [golden.written(room, value) for value in golden.VALUES[room]]
    assert texts == GOLDEN["texts"][room]
    again = [golden.written(room, golden.READ[room](json.loads(text))) for text in texts]
    assert again == texts

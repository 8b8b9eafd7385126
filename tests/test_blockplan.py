"""Plans of blocks: which rows are computed, which only copied, and which copies go together."""

from __future__ import annotations

import numpy as np
import pytest

from rootnoise._check import RootnoiseError
from rootnoise.causal import Toeplitz
from rootnoise.noise.blockplan import BlockPlan, _runs

BAND = Toeplitz(np.array([1.0, 0.5, 0.25]), 9)


def test_copies_are_joined_where_both_numbers_count_up():
    pairs = [(0, 3), (1, 4), (2, 5), (4, 6), (5, 9), (6, 10), (7, 12), (9, 13)]
    assert _runs(pairs) == [(0, 3, 3), (4, 6, 1), (5, 9, 2), (7, 12, 1), (9, 13, 1)]
    assert _runs([]) == []


def test_rows_that_are_copies_are_not_computed_with_either_sign_of_zero():
    plan = BlockPlan(np.array([[-0.0, 1.0], [1.0, 0.0]]), 1)
    assert (plan.outputs, plan.next_state, plan.rows.shape) == ([1], [0], (0, 2))
    assert plan.rows.dtype == np.float32
    assert BlockPlan(BAND.block(0, 2), 2).rows.dtype == np.float32


def test_past_draws_alone_can_be_drawn_again():
    plan = BlockPlan(BAND.block(0, 2), 2, regenerate=True)
    assert (plan.next_state, plan.regenerates) == ([], True)
    kept = BlockPlan(BAND.block(0, 2), 2)
    assert (kept.next_state, kept.regenerates) == ([2, 3], False)
    with pytest.raises(RootnoiseError, match=r"^memory='regenerate' must have a mechanism that re"):
        BlockPlan(BAND.inverse().block(0, 2), 2, regenerate=True)

"""Updates: clipped exactly, whatever a client sends."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import federated_runs as runs
from federated_runs import closed, vector
from rootnoise._check import RootnoiseError
from rootnoise.federated import PrivateAggregator, Reply
from rootnoise.federated.updates import POINTS, Layout, from_grid, on_grid
from rootnoise.keys import Key

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("scale", [1e-308, 1e-8, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("clip", [1e-3, 1.0, 50.0])
def test_no_update_exceeds_the_clip_norm(scale, clip):
    """Exactly, in integers; and below it nothing changes but by a grid point."""
    update = vector() * scale
    grid = on_grid(update, clip)
    squares = sum(x * x for x in grid.tolist())
    assert squares <= POINTS**2
    norm = scale * math.sqrt(sum(x**2 for x in vector().tolist()))
    expected = update * min(1.0, clip / norm)
    assert torch.allclose(from_grid(grid, clip), expected, rtol=2e-7, atol=clip / POINTS)
    assert norm <= clip or squares > POINTS**2 * (1 - 1e-6)


def test_the_grid_is_cut_towards_zero():
    """Rounded to nearest, many small numbers would add to the norm."""
    small = torch.full((1000,), 0.9 / POINTS, dtype=torch.float64)
    assert not on_grid(small, 1.0).any()
    assert not on_grid(-small, 1.0).any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_number_makes_an_update_count_as_zero(bad):
    update = vector()
    update[77] = bad
    assert on_grid(update, 1.0) is None
    assert not on_grid(torch.zeros(5, dtype=torch.float64), 1.0).any()


def test_weights_instead_of_updates_are_the_same_to_the_last_bit(tmp_path):
    """Changes that are exact in float32; the weights that a round begins with are not zero."""
    change = {name: torch.full_like(runs.WEIGHTS[name], 2**-9) for name in ("a", "b")}
    ends = []
    for how in ("receive", "receive_weights"):
        begin = {n: w + 1 if w.is_floating_point() else w for n, w in runs.WEIGHTS.items()}
        server = PrivateAggregator(
            tmp_path / how, runs.mechanism(), begin, cohort_size=3, key=Key.from_seed(5)
        )
        opened = server.open(runs.there(0))
        for client in opened.cohort[:2]:
            after = {name: opened.weights[name] + c for name, c in change.items()}
            sent = change if how == "receive" else after | {"steps": torch.tensor(8)}
            assert getattr(server, how)(0, client, sent) is Reply.COUNTED
        for bad in (GARBAGE["broadcast"], None):
            assert getattr(server, how)(0, opened.cohort[2], bad) is not Reply.COUNTED
        assert float(server._total.abs().max()) == pytest.approx(2 * 2**-9 / 0.5 * POINTS, rel=1e-6)
        ends.append(closed(server))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


def test_integer_buffers_are_left_alone(tmp_path):
    server = runs.server(tmp_path)
    for client in server.open(runs.there(0)).cohort:
        update = runs.update(0, client) | {"steps": torch.tensor(99)}
        assert server.receive(0, client, update) is Reply.COUNTED
    weights = closed(server)
    assert weights["steps"] == 7
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weights"]["steps"] == 7


class Raises(dict[str, Any]):
    """A stranger's mapping."""

    def __getitem__(self, name):
        raise ZeroDivisionError


class Liar(torch.Tensor):
    """Says that its norm is 0."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 0 if func is torch.Tensor.abs else found


GARBAGE = {
    "raises": Raises(a=torch.ones(4, 3), b=torch.ones(5)),
    "subclass": {"a": torch.ones(4, 3).as_subclass(Liar), "b": torch.ones(5)},
    "nothing": None,
    "text": "update",
    "empty": {},
    "missing": {"a": torch.ones(4, 3)},
    "unknown": {"a": torch.ones(4, 3), "b": torch.ones(5), "c": torch.ones(1)},
    "shape": {"a": torch.ones(3, 4), "b": torch.ones(5)},
    "broadcast": {"a": torch.ones(4, 3), "b": torch.ones(1)},
    "integers": {"a": torch.ones(4, 3, dtype=torch.int64), "b": torch.ones(5)},
    "complex": {"a": torch.ones(4, 3, dtype=torch.complex64), "b": torch.ones(5)},
    "objects": {"a": np.full((4, 3), None), "b": np.ones(5)},
    "lists": {"a": [[1.0] * 3] * 4, "b": [1.0] * 5},
    "sparse": {"a": torch.ones(4, 3).to_sparse(), "b": torch.ones(5)},
    "meta": {"a": torch.ones(4, 3, device="meta"), "b": torch.ones(5)},
}

BAD = {
    "nan": {"a": torch.full((4, 3), NAN), "b": torch.ones(5)},
    "inf": {"a": torch.full((4, 3), INF), "b": torch.ones(5)},
    "half overflow": {"a": (torch.ones(4, 3) * 1e6).half(), "b": torch.ones(5).half()},
}

GOOD = {
    "half": {"a": torch.full((4, 3), 6e4).half(), "b": torch.full((5,), 6e4).half()},
    "bfloat16": {"a": torch.full((4, 3), 1e38).bfloat16(), "b": torch.ones(5).bfloat16()},
    "huge": {"a": np.full((4, 3), 1e300), "b": np.full(5, -1e300)},
    "zero": {"a": np.zeros((4, 3)), "b": np.zeros(5)},
    "parameters": {"a": torch.nn.Parameter(torch.ones(4, 3)), "b": torch.ones(5)},
}


def noiseless(server, t, replies):
    """Return the open round's sum after these replies, over the clip norm."""
    opened = server.open(range(50))
    kinds = [server.receive(t, c, u) for c, u in zip(opened.cohort, replies, strict=False)]
    return from_grid(server._total, 1.0), kinds, opened


@pytest.mark.parametrize(
    ("updates", "kind", "norm"),
    [(GARBAGE, Reply.MALFORMED, 0.0), (BAD, Reply.NON_FINITE, 0.0), (GOOD, Reply.COUNTED, None)],
)
def test_what_an_update_can_do(tmp_path, updates, kind, norm):
    """Garbage adds zero and takes its client's turn; overflow in half precision is clipped."""
    mechanism = runs.mechanism(n=len(updates), b=2, k=1)
    server = PrivateAggregator(tmp_path, mechanism, runs.WEIGHTS, cohort_size=1)
    for name, update in updates.items():
        check_one(server, name, update, kind, norm)


def check_one(server, name, update, kind, norm):
    total, kinds, opened = noiseless(server, server.t, [update])
    assert kinds == [kind], name
    wanted = norm if norm is not None else float(name != "zero")
    assert float(total.norm()) == pytest.approx(wanted, abs=1e-6)
    server.close()
    (who,) = server.clients.join(opened.cohort)
    assert not server.clients.may_join(np.array([who]))[0]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"a": torch.zeros(3).half()}, r"weight a must be float32 or float64 on the server"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "got torch.complex64"),
        ({"a": [0.0]}, "weight a must be a tensor, got list"),
        ({"n": torch.tensor(3)}, r"weights must hold floating ones, got \['n'\]"),
        ({}, r"weights must hold floating ones, got \[\]"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, reason):
    with pytest.raises(RootnoiseError, match=reason):
        Layout(weights)


def test_tied_weights_are_refused():
    """Each copy would get a noise of its own, and the norm would count it twice."""
    layer = torch.nn.Linear(3, 3, bias=False)
    model = torch.nn.ModuleDict({"in": layer, "out": layer})
    with pytest.raises(RootnoiseError, match=r"must not share memory .*\['in.weight', 'out.weigh"):
        Layout(model.state_dict())

"""`save` and `resume=`: the same run goes on, with its own data, or not at all."""

import io
import random  # noqa: TID251 - data sets use it

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    Subset,
    TensorDataset,
)

from front_door_parts import BATCH, GOAL, again, data, parts, train, weights
from rootnoise import (
    Key,
    RootnoiseError,
    make_private,
)
from rootnoise.front_door.saved import _digest, identity, sealed
from rootnoise.front_door.several import _contents


def test_a_saved_run_goes_on_bit_by_bit(tmp_path):
    settings = {"batch_size": BATCH, "mechanism": "bsr"} | GOAL
    model, sgd = parts()
    run = make_private(model, sgd, data(), **settings)
    batches = iter(run.loader)
    for _ in range(2):  # in the middle of an epoch
        x, y = next(batches)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
    file = tmp_path / "run.pt"
    run.optimizer.private.non_finite = 3  # as if
    run.optimizer.save(file)
    assert file.stat().st_mode & 0o077 == 0
    train(run.model, run.optimizer, batches, epochs=1)
    whole = weights(model)
    saved = torch.load(io.BytesIO(file.read_bytes()[:-32]), weights_only=True)
    del run, batches, sgd

    model, sgd = parts(seed=9)
    run = make_private(model, sgd, data(), resume=file, **settings)
    assert (run.optimizer.t, run.optimizer.private.non_finite) == (2, 3)
    train(*run, epochs=1)
    assert torch.equal(weights(model), whole)

    rule = "^resume must be of the mechanism that these arguments make, got "
    spent = f"epsilon: saved {settings['epsilon']:g}, given"
    with pytest.raises(RootnoiseError, match=rule + spent + " 5$"):
        again(resume=file, **(settings | {"epsilon": 5.0}))
    with pytest.raises(RootnoiseError, match=rule + r"delta: saved 1e-05, given 1e-06$"):
        again(resume=file, **(settings | {"delta": 1e-6}))
    with pytest.raises(RootnoiseError, match=r"^key must be left out on resume"):
        again(resume=file, key=Key.fresh(), **settings)
    with pytest.raises(RootnoiseError, match=r"^resume must be readable, got .*: No such file"):
        again(resume=tmp_path / "none", **settings)
    for damaged in (saved | {"key": "no key"}, {n: saved[n] for n in saved if n != "optimizer"}):
        file.write_bytes(sealed(damaged))
        with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got a damaged"):
            again(resume=file, **settings)
    file.write_bytes(sealed(saved | {"weights": saved["weights"] | {"more": torch.ones(1)}}))
    with pytest.raises(RootnoiseError, match=r"^resume must be of this model, got .*more"):
        again(resume=file, **settings)
    file.write_bytes(sealed(saved | {"version": 0}))
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, version 2"):
        again(resume=file, **settings)
    file.write_bytes(sealed(saved)[:-1] + b"x")
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got .*: not as it"):
        again(resume=file, **settings)
    file.write_bytes(b"PK nothing" + _digest(b"PK nothing"))
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got .*: "):
        again(resume=file, **settings)
    file.write_bytes(b"PK nothing")
    with pytest.raises(RootnoiseError, match=r"^resume must be a file of save, got"):
        again(resume=file, **settings)
    with pytest.raises(RootnoiseError, match=r"^path must be writable, got .*: No such file"):
        run.optimizer.save(tmp_path / "no" / "where")


def other_data(change):
    x, y = data().tensors
    return {
        "fewer": lambda: Subset(data(), range(23)),
        "one number": lambda: TensorDataset(x + 1e-6 * (torch.arange(24) == 7)[:, None], y),
        "another type": lambda: TensorDataset(x.double(), y),
        "order": lambda: Subset(data(), [1, 0, *range(2, 24)]),
        "in two": lambda: ConcatDataset([Subset(data(), range(12)), Subset(data(), range(12))]),
    }[change]()


@pytest.mark.parametrize("change", ["fewer", "one number", "another type", "order", "in two"])
def test_a_run_goes_on_with_its_own_data_alone(change, tmp_path):
    settings = {"batch_size": BATCH, "mechanism": "bsr"} | GOAL
    run = again(**settings)
    run.optimizer.save(tmp_path / "run.pt")
    saved_key = run.optimizer.private.stream.key
    assert saved_key.secret.hex().encode() not in str(identity(data(), saved_key)).encode()
    del run
    settings["resume"] = tmp_path / "run.pt"
    line = "got 23 records, not 24" if change == "fewer" else "got other contents"
    model, sgd = parts()
    with pytest.raises(RootnoiseError, match=f"^data must be those of the run that is .*{line}$"):
        make_private(model, sgd, other_data(change), **settings)
    assert again(**settings).optimizer.t == 0


def test_data_that_may_change_are_known_by_their_number():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 5

    key = Key.from_seed(1)
    assert identity(Augmented(), key) == [5, None]
    assert identity(Subset(Augmented(), [0, 1]), key) == [2, None]
    assert identity(ConcatDataset([data(), Augmented()]), key) == [29, None]
    assert identity(data(), key) == identity(data(), key) != identity(data(), Key.from_seed(2))


class Drawn(torch.utils.data.Dataset):
    """Records that every global generator has a part in."""

    def __init__(self, name="x", shift=0):
        self.name, self.shift = name, shift

    def __len__(self):
        return 24

    def __getitem__(self, i):
        drawn = random.random(), np.random.rand(), torch.rand(2)  # noqa: S311
        return {self.name: drawn, "y": i + self.shift}


def test_ranks_compare_records_by_name_and_value_and_move_no_generator():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state()

    before, found = states(), _contents(Drawn())
    assert before[:2] == states()[:2]
    assert torch.equal(before[2], states()[2])
    random.random(), np.random.rand(), torch.rand(1)  # noqa: S311
    assert _contents(Drawn()) == found
    assert _contents(Drawn("w")) != found != _contents(Drawn(shift=1))

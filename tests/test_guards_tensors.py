"""Neither forward nor anybody after it changes weights and buffers."""

import pytest
import torch
from torch import nn

from rootnoise._check import RootnoiseError
from rootnoise.training import privatize
from rootnoise.training.guards import _Seen
from test_guards import X, loss_of, make, plain_step


class Changes(nn.Module):
    def __init__(self, change, frozen=False):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.other = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.change = change

    def forward(self, x):
        self.change(self, x)
        return self.inner(x)


def in_place(m, x):
    with torch.no_grad():
        m.mean += x.mean(0)


def anew(m, x):
    m.mean = 0.9 * m.mean + x.detach().mean(0)


def frozen_weight(m, x):
    with torch.no_grad():
        m.other.copy_(x[0])


def weight(m, x):
    with torch.no_grad():
        m.inner.weight.div_(m.inner.weight.norm())


def data(m, x):
    m.mean.data = x.detach()[0]


def added(m, x):
    m.register_buffer("extra", x.detach()[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (in_place, "mean"),
        (anew, "mean"),
        (frozen_weight, "other"),
        (weight, "weight"),
        (data, "mean"),
        (added, "extra"),
    ],
)
def test_forward_must_not_change_tensors(change, name, training):
    o = make(nn.Sequential(Changes(change)))
    layer = "0.inner" if name == "weight" else "0"
    message = (
        rf"^layer {layer} \(\w+\) must leave its {name} as it is in forward: .*; got a change$"
    )
    with pytest.raises(RootnoiseError, match=message), torch.set_grad_enabled(training):
        o.module(X[:4])
    o._place.check = lambda rows: None
    o.zero_grad()
    with pytest.raises(RootnoiseError, match=message):  # it stays refused: what is done is done
        o.step(o.sampler.batch(0))


def test_hidden_writes_are_found_where_a_step_is_probed():
    o = make(nn.Sequential(Changes(lambda m, x: m.mean.data.add_(x.detach()[0]))), "probed")
    with pytest.raises(
        RootnoiseError, match=r"^layer 0 .Changes. must leave its mean as it is in f"
    ):
        o.module(X[:4])


def test_nobody_changes_tensors_between_forward_and_step():
    o = make(nn.Sequential(Changes(lambda m, x: None)))
    batch = o.sampler.batch(0)
    loss_of(o, batch).backward()
    in_place(o.module._module[0], X)
    with pytest.raises(RootnoiseError, match="leave its mean as it is between forward and step"):
        o.step(batch)


def test_weights_may_change_between_steps():
    o = make()
    plain_step(o)
    o.module.load_state_dict({n: 2 * v for n, v in o.module.state_dict().items()})
    plain_step(o)
    assert o.t == 2


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_refused_by_name(kind):
    message = r"^layer 1 must not rewrite its weights in forward, .*, got \w+ with max_norm=1.0$"
    with pytest.raises(RootnoiseError, match=message):
        privatize(nn.Sequential(nn.Identity(), kind(5, 2, max_norm=1.0)))


def test_values_that_become_nan_have_changed_and_those_that_stay_have_not():
    t = torch.tensor([1.0, float("nan")])
    seen = _Seen.of(t, deep=True)
    assert seen.same(t, identical=True)
    t.data[0] = float("nan")
    assert not seen.same(t, identical=True)
    t.data[:] = torch.tensor([1.0, 2.0])
    assert not seen.same(t, identical=True)

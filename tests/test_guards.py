"""One forward and one backward of the batch a step; see `test_guards_tensors` for weights."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import FixedCycleSampler, OwnBatches, Sampler
from rootnoise.training import PrivateOptimizer, UnplannedOptimizerWarning, privatize
from rootnoise.training.guards import ForwardGuard, tensors_of
from rootnoise.workload import SGD

N, BATCH = 16, 4
X = torch.sin(torch.arange(N * 3.0) ** 2).view(N, 3)
Y = torch.arange(N) % 2


def make(model=None, independence="assumed", seed=0, own_batches=False):
    sampler: Sampler = FixedCycleSampler(N, BATCH, 3, seed=0)
    if own_batches:
        sampler = OwnBatches(sampler.participation, N, BATCH, sampler.n_steps)
    participation = sampler.participation
    split = factorize(SGD(sampler.n_steps, 0.9), participation, "bsr")
    mechanism = Mechanism.calibrate(split, participation, noise_multiplier=0.3, delta=1e-5)
    if model is None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    module = privatize(model)
    sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    key = Key.from_seed(1)
    return PrivateOptimizer(sgd, module, mechanism, sampler, key, independence=independence)


def loss_of(o, batch, x=X):
    return cross_entropy(o.module(x[batch]), Y[batch])


def weights(o):
    return torch.cat([p.detach().flatten() for p in o.module.parameters()])


def plain_step(o, x=X):
    batch = o.sampler.batch(o.t)
    o.zero_grad()
    loss_of(o, batch, x).backward()
    o.step(batch)


def refused(o, message, batch=None):
    """Refuse the step, leave the weights alone, and go on after zero_grad as if it had not been."""
    before = weights(o)
    with pytest.raises(RootnoiseError, match=message) as refusal:
        o.step(o.sampler.batch(o.t) if batch is None else batch)
    assert "\n" not in str(refusal.value)
    assert torch.equal(weights(o), before)
    goes_on(o)


def goes_on(o):
    twin = make()
    plain_step(o)
    plain_step(twin)
    assert torch.equal(weights(o), weights(twin))


# ------------------------------------------------------------------------------------------ passes


def test_gradients_of_a_forward_that_zero_grad_dropped():
    # The attack: step(A) would hold B's gradients.
    o = make()
    a, b = o.sampler.batch(0), o.sampler.batch(1)
    loss_a = loss_of(o, a)
    loss_of(o, b).backward()
    o.zero_grad()
    with pytest.raises(RootnoiseError, match=r"^backward must be of the last forward, got one"):
        loss_a.backward()
    refused(o, "gradients of 0.weight are missing", a)


def test_zero_grad_leaves_nothing_of_the_pass():
    o = make()
    loss_of(o, o.sampler.batch(0))
    loss_of(o, o.sampler.batch(1)).backward()
    assert o.module.rows == BATCH
    assert o.module.left
    o.zero_grad()
    assert o.module.rows == 0
    assert not o.module.left
    assert all(p.grad is None for p in o.module.parameters())
    goes_on(o)


def test_two_forwards_and_one_backward():
    o = make()
    a, b = o.sampler.batch(0), o.sampler.batch(1)
    (loss_of(o, a) + loss_of(o, b)).backward()
    refused(o, "^backward must run once a step, got 2 for 0.weight|^forward must run once")
    o = make()
    loss_of(o, b)
    loss_of(o, a).backward()
    with pytest.raises(RootnoiseError, match=r"^forward must run once a step .*, got 2 in"):
        o.step(a)


def test_passes_are_counted_by_the_guard_alone():
    def counted(message, passes):
        o = make()
        o._place.check = lambda rows: None
        batch = o.sampler.batch(0)
        passes(o, batch)
        with pytest.raises(RootnoiseError, match=message):
            o.step(batch)
        assert o.t == 0

    def no_grad(o, batch):
        with torch.no_grad():
            loss_of(o, batch)

    counted("^forward must run once a step .*, got 0 in training mode", lambda o, b: None)
    counted("^forward must run once a step .*, got 0 in training mode", no_grad)
    counted("^backward must run once a step, .* got none", loss_of)


def test_backward_twice():
    o = make()
    loss = loss_of(o, o.sampler.batch(0))
    loss.backward(retain_graph=True)
    message = "^backward must run once a step, got a second one of the same forward"
    with pytest.raises(RootnoiseError, match=message):
        loss.backward()
    refused(o, message)


def test_backward_that_was_broken_off():
    o = make()
    batch = o.sampler.batch(0)
    out = o.module(X[batch])

    def stop(_):
        raise KeyError("stop")

    out.register_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        cross_entropy(out, Y[batch]).backward()
    o._place.check = lambda rows: None
    with pytest.raises(RootnoiseError, match="to its end; got one broken off"):
        o.step(batch)


def test_a_layer_called_by_itself():
    o = make()
    batch = o.sampler.batch(0)
    loss_of(o, batch).backward()
    o.module._module[2](torch.ones(4, 4))
    refused(o, r"^layer 2 must be called by the model's forward alone .*, got a call of its own")


def test_what_backward_left_is_not_to_be_touched():
    message = "^per-sample gradients must be those that backward left, got others"
    batch = make().sampler.batch(0)
    for i in range(4):  # input and output gradient of each layer
        o = make()
        loss_of(o, batch).backward()
        assert len(o.module.left) == 4
        o.module.left[i].mul_(2)
        refused(o, message)
    o = make()
    loss_of(o, batch).backward()
    (layer, ((inputs, g),)), *_ = o.module._taps.items()
    o.module._taps[layer] = [(inputs, torch.stack(list(g.flip(0))).add_(0))]  # of the same version
    refused(o, message)
    o = make()
    loss_of(o, batch).backward()
    o.module._taps.popitem()
    refused(o, message)
    o, x = make(), X[batch]
    cross_entropy(o.module(x), Y[batch]).backward()
    x.copy_(X[o.sampler.batch(1)])  # a buffer that is filled again: other records, uncounted
    refused(o, message)
    o, twin = make(), make()
    loss_of(o, batch).backward()
    for p in o.module.parameters():  # the raw gradient is not used
        p.grad = torch.ones_like(p)
    o.step(batch)
    plain_step(twin)
    assert torch.equal(weights(o), weights(twin))


def orders():  # noqa: C901 - a list of short loops
    def before(o, batch):
        o.zero_grad()
        loss_of(o, batch).backward()

    def between(o, batch):
        loss = loss_of(o, batch)
        o.zero_grad()
        loss.backward()

    def thrice(o, batch):
        o.zero_grad()
        loss = loss_of(o, batch)
        o.zero_grad()
        o.zero_grad()
        loss.backward()

    def dropped(o, batch):
        loss_of(o, batch[::-1].copy())  # never used: the next takes its place
        o.zero_grad()
        loss_of(o, batch).backward()

    def inner(o, batch):
        o.optimizer.zero_grad()
        loss_of(o, batch).backward()

    def module(o, batch):
        o.module.zero_grad()
        loss_of(o, batch).backward()

    def evaluated(o, batch):
        o.zero_grad()
        loss = loss_of(o, batch)
        with torch.no_grad():
            o.module(X)
        loss.backward()
        o.module.eval()
        o.module(X)
        o.module.train()

    def broken(o, batch):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            o.module(torch.ones(4, 5))
        o.zero_grad()
        loss_of(o, batch).backward()

    def skipped(o, batch):
        loss_of(o, batch[::-1].copy()).backward()
        o.zero_grad()
        loss_of(o, batch).backward()

    def unwrapped(o, batch):
        o.zero_grad()
        cross_entropy(o.module._module(X[batch]), Y[batch]).backward()

    def functional(o, batch):
        o.zero_grad()
        torch.autograd.backward(loss_of(o, batch))

    return [v for v in locals().values() if callable(v)]


@pytest.mark.parametrize("independence", ["assumed", "probed"])
@pytest.mark.parametrize("order", orders())
def test_legal_orders(order, independence):
    o, twin = make(independence=independence), make()
    for _ in range(3):
        batch = o.sampler.batch(o.t)
        order(o, batch)
        o.step(batch)
        plain_step(twin)
    assert torch.equal(weights(o), weights(twin))


def test_an_empty_batch_after_a_forward():
    o = make(own_batches=True)
    loss = loss_of(o, torch.arange(BATCH))
    o.step([])
    with pytest.raises(RootnoiseError, match=r"^backward must be of the last forward"):
        loss.backward()


def test_copies_of_the_model_are_not_guarded():
    o = make()
    plain_step(o)
    twin = copy.deepcopy(o.module._module)
    with torch.no_grad():  # Opacus's own hooks refuse a copy with gradients
        twin(X)
    plain_step(o)
    assert o.t == 2


# --------------------------------------------------------------------------- what Opacus cannot do


class Positions(nn.Module):
    """As BERT, GPT-2 and T5 have them: positions without a batch dimension."""

    def __init__(self, expand):
        super().__init__()
        self.words, self.places, self.expand = nn.Embedding(7, 4), nn.Embedding(5, 4), expand
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        places = torch.arange(x.shape[1])[None]
        if self.expand:
            places = places.expand(len(x), -1)
        return self.head((self.words(x) + self.places(places)).mean(1))


def test_positions_without_a_batch_dimension():
    o = make(Positions(expand=False))
    message = r"^layer places \(Embedding\) must get one row an example \(4\), got 1: expand its"
    with pytest.raises(RootnoiseError, match=message):
        o.module(torch.ones(4, 5, dtype=torch.int64))
    o = make(Positions(expand=True), "probed")
    tokens = torch.arange(20).reshape(4, 5) % 7
    cross_entropy(o.module(tokens), Y[:4]).backward()
    o.step(o.sampler.batch(0))
    assert o.t == 1


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return self[1](checkpoint(self[0], x, use_reentrant=False))


def test_checkpointing_is_refused_by_the_layers_name():
    o = make(Checkpointed(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)))
    loss = loss_of(o, o.sampler.batch(0))
    message = "^layer 0.0 must run once a forward: switch activation checkpointing off, got a sec"
    with pytest.raises(RootnoiseError, match=message):
        loss.backward()


def test_no_warning_asks_nothing_of_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UnplannedOptimizerWarning)  # it does ask
        o = make(independence="probed")
        plain_step(o)


class Keeps(nn.Module):
    """Keeps what its first layer made."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.kept = []

    def forward(self, x):
        self.kept.append(self.first(x))
        return {"logits": [self.last(self.kept[-1])]}


def test_backward_through_a_layer_of_a_dropped_forward():
    model = Keeps()
    guard = ForwardGuard(model, lambda: None)
    model(X[:4])
    guard.clear()
    model(X[4:8])
    with pytest.raises(RootnoiseError, match=r"^backward must be of the last forward, got one"):
        model.kept[0].sum().backward()


def test_layers_that_may_run_again_are_watched_where_forward_ends():
    model = Keeps()
    guard = ForwardGuard(model, lambda: None, checkpointing=True)
    loss = model(X[:4])["logits"][0].sum()
    with pytest.raises(RootnoiseError, match=r"got none$"):
        guard.check(4)
    loss.backward()
    guard.check(4)


def test_outputs_are_found_in_containers_and_not_without_end():
    a, b = torch.zeros(1), torch.ones(1)
    assert [t.item() for t in tensors_of({"a": a, "b": [b, 2, None, "c"]})] == [0, 1]
    assert [t.item() for t in tensors_of(Thing(a))] == [0]
    assert len(tensors_of([[[[a]]]])) == 1
    assert tensors_of([[[[[a]]]]]) == []


class Thing:
    def __init__(self, value):
        self.value = value


def test_a_model_that_is_compiled_afterwards_is_refused():
    o = make()
    compiled = torch.compile(o.module, backend="eager")
    with pytest.raises(
        RootnoiseError, match=r"^model must run as it is, .* got it compiled: leave"
    ):
        compiled(X[:BATCH])
    with torch.no_grad():
        compiled(X[:BATCH])
    plain_step(o)
    assert o.t == 1


def closed_over(layer):
    """Return what calls the compiled forward, and bears no mark of torch itself."""
    compiled = torch.compile(layer.forward, backend="eager")

    def forward(x):
        return compiled(x)

    return forward


@pytest.mark.parametrize("name", ["", "1", "1.0"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_is_compiled_alone_is_refused(name, when):
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    o = make(model) if when == "after" else None
    layer = model.get_submodule(name)
    layer.forward = torch.compile(layer.forward, backend="eager")
    if o is None:
        line = f"^{f'layer {name}' if name else 'model'} must not be compiled, got (Seq|Lin)"
        with pytest.raises(RootnoiseError, match=line):
            make(model)
        return
    where, what = (f"layer {name}", "its forward") if name else ("model", "it")
    line = rf"^{where} must run as it is, .* got {what} compiled: leave"
    with pytest.raises(RootnoiseError, match=line):
        o.module(X[:BATCH])
    with torch.no_grad():  # inference may be compiled
        o.module(X[:BATCH])
    del layer.forward
    plain_step(o)
    assert o.t == 1


@pytest.mark.parametrize("name", ["", "1"])
def test_a_compiled_forward_without_a_mark_is_refused_by_the_layer_inside(name):
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    o = make(model)
    layer = model.get_submodule(name)
    layer.forward = closed_over(layer)
    with pytest.raises(RootnoiseError, match=r"^model must run as it is, .* got it compiled: lea"):
        o.module(X[:BATCH])
    del layer.forward
    plain_step(o)
    assert o.t == 1


def test_a_forward_that_is_kept_from_the_compiler_may_be_trained():
    o = make()
    layer = o.module._module[0]
    layer.forward = torch.compiler.disable(layer.forward)
    goes_on(o)

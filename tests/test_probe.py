"""Losses and layers that mix examples are refused by name; those that do not are let through."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import probe_runs
from processes import launch
from rootnoise._check import RootnoiseError
from rootnoise.batches.samplers import FixedCycleSampler
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.training.probe import _differ, _sources, _Trace
from rootnoise.workload import SGD

N, BATCH, T, V = 24, 6, 6, 6  # classes, tokens and examples are as many: the hardest to tell apart
RNG = torch.Generator().manual_seed(0)
X = torch.randn(N, 8, generator=RNG)
Y = torch.randint(0, V, (N,), generator=RNG)
TOKENS = torch.randint(1, V, (N, T), generator=RNG)
MASK = torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=RNG)
PADDED = torch.where(MASK, TOKENS, 0)


class Add(nn.Module):
    """A residual of a function of the batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def mlp(*middle):
    return nn.Sequential(nn.Linear(8, 8), *middle, nn.Linear(8, V))


class Tokens(nn.Module):
    """A causal transformer of one head; with labels it returns the loss too, as Hugging Face."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(V, 8), nn.Embedding(T, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.drop, self.head = nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, V)

    def forward(self, tokens, attention_mask=None, labels=None, by_token=False):
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        h = self.drop(self.words(tokens) + self.places(places))
        q, k, v = self.qkv(h).chunk(3, -1)
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        mask = causal if attention_mask is None else causal & attention_mask[:, None, :]
        mask = mask | torch.eye(T, dtype=torch.bool)
        h = self.norm(h + self.out(F.scaled_dot_product_attention(q, k, v, mask)))
        logits = self.head(h)
        if labels is None:
            return logits
        if by_token:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)
        else:
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            loss = each.mean(1).mean()
        return {"loss": loss, "logits": logits}


def make(model, reduction="mean", **options):
    sampler = FixedCycleSampler(N, BATCH, 3, seed=0)
    participation = sampler.participation
    split = factorize(SGD(sampler.n_steps, 0.9), participation, "bsr")
    mechanism = Mechanism.calibrate(split, participation, noise_multiplier=0.3, delta=1e-5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4, generator=generator)
    module = privatize(model, reduction)
    sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    return PrivateOptimizer(sgd, module, mechanism, sampler, Key.from_seed(1), **options)


def train(o, loss_of, steps=2):
    for _ in range(steps):
        batch = o.sampler.batch(o.t)
        o.zero_grad()
        loss_of(o.module, batch).backward()
        o.step(batch)


def weights(o):
    return torch.cat([p.detach().flatten() for p in o.module.parameters()])


def ce(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch])


def lm(module, batch):
    logits = module(TOKENS[batch])
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), TOKENS[batch][:, 1:])


# ----------------------------------------------------------------------------------------- refused


def contrastive(module, batch):
    h = F.normalize(module(X[batch]), dim=1)
    return F.cross_entropy(h @ h.T / 0.1, torch.arange(len(h)))


def contrastive_halves(module, batch):
    a, b = module(X[batch]).chunk(2)
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


def token_mean(module, batch):
    return F.cross_entropy(
        module(TOKENS[batch]).flatten(0, 1), PADDED[batch].flatten(), ignore_index=0
    )


def token_count(module, batch):
    y = PADDED[batch]
    each = F.cross_entropy(module(TOKENS[batch]).flatten(0, 1), y.reshape(-1), reduction="none")
    return (each * (y != 0).reshape(-1)).sum() / (y != 0).sum()


def token_number(module, batch):
    y = PADDED[batch]
    each = F.cross_entropy(module(TOKENS[batch]).transpose(1, 2), y, reduction="none")
    return each.sum() / (y != 0).sum().item()


def masked_rows(module, batch):
    out, mask = module(TOKENS[batch]), MASK[batch]
    return F.cross_entropy(out[mask], TOKENS[batch][mask])


def counted_by_labels(module, batch):
    y = Y[batch]
    each = F.cross_entropy(module(X[batch]), y, reduction="none")
    return each.sum() / (1 + (y < V // 2).sum())


def class_weights_of_the_batch(module, batch):
    y = Y[batch]
    return F.cross_entropy(module(X[batch]), y, weight=1 / (1.0 + torch.bincount(y, minlength=V)))


def hardest(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], reduction="none").topk(2).values.mean()


def loss_max(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], reduction="none").max()


def one_forward_variance(module, batch):
    out = module(X[batch])
    return F.cross_entropy(out, Y[batch]) + out.var(0).sum()


def weighted_mean(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], weight=torch.arange(1.0, V + 1))


def with_a_number(module, batch):
    out = module(X[batch])
    return F.cross_entropy(out, Y[batch]) / float(out.detach().norm())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def own_function(module, batch):
    return Square.apply(module(X[batch])).sum()


def hf_by_token(module, batch):
    return module(TOKENS[batch], labels=PADDED[batch], by_token=True)["loss"]


def bn(h):
    return F.batch_norm(h, None, None, training=True)


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(8, V), torch.zeros(8)

    def forward(self, x):
        out = self.inner(x + self.seen)
        self.seen = self.seen + x.detach().mean(0)
        return out


MIXING = [
    (lambda: mlp(Add(lambda h: h - h.mean(0))), ce, r"^layer 1 \(Add\) must not mix the examples"),
    (lambda: mlp(Add(bn)), ce, r"^layer 1 \(Add\) must not mix"),
    (lambda: mlp(nn.Softmax(dim=0)), ce, r"^layer 1 \(Softmax\) must not mix"),
    (lambda: mlp(Add(lambda h: h / h.norm())), ce, r"^layer 1 \(Add\) must not mix"),
    (lambda: mlp(Add(lambda h: h.roll(1, 0))), ce, r"^layer 1 \(Add\) must not mix"),
    (Memory, ce, "^forward must return the same again .* it keeps what it has seen"),
    (mlp, contrastive, r"^loss \(cross_entropy\) must not mix"),
    (mlp, contrastive_halves, r"^loss \(cross_entropy\) must not mix"),
    (Tokens, token_mean, r"^loss \(cross_entropy\) must not mix"),
    (Tokens, token_count, r"^loss \(div|__truediv__\) must not mix"),
    (
        Tokens,
        token_number,
        r"^loss must not depend on a number that left torch, got one by item: ke",
    ),
    (Tokens, masked_rows, r"^loss \(cross_entropy\) must not mix"),
    (Tokens, hf_by_token, r"^loss, or what follows layer head \(Linear\), must not mix|^loss \("),
    (mlp, counted_by_labels, r"^loss \(\w+\) must not mix"),
    (mlp, class_weights_of_the_batch, r"^loss \(cross_entropy\) must not mix"),
    (mlp, weighted_mean, r"^loss \(cross_entropy\) must not mix"),
    (mlp, hardest, r"^loss \(mean\) must not mix"),
    (mlp, loss_max, r"^loss \(max\) must not mix"),
    (mlp, one_forward_variance, r"^loss \(\w+\) must not mix"),
    (mlp, with_a_number, "^loss must not depend on a number that left torch, got one by __float__"),
    (mlp, own_function, "^loss must come from what forward returned, .* got a tensor of Square"),
]


@pytest.mark.parametrize(("model", "loss", "message"), MIXING, ids=range(len(MIXING)))
def test_what_mixes_is_refused_before_anything_is_released(model, loss, message):
    o = make(model())
    before = weights(o)
    with pytest.raises(RootnoiseError, match=message) as refusal:
        train(o, loss, steps=1)
    assert "\n" not in str(refusal.value)
    assert "independence='assumed'" in str(refusal.value)
    assert torch.equal(weights(o), before)
    assert o.t == o.ledger.t == o.stream.t == 0
    assumed = make(model(), independence="assumed")
    train(assumed, loss, steps=1)
    assert assumed.claim().endswith("was assumed, not probed.")


# ----------------------------------------------------------------------------------------- allowed


def mse(module, batch):
    return F.mse_loss(module(X[batch]), X[batch][:, :V])


def summed(module, batch):
    return nn.CrossEntropyLoss(reduction="sum")(module(X[batch]), Y[batch])


def smoothed(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], label_smoothing=0.1)


def bce(module, batch):
    target = F.one_hot(Y[batch], V).float()
    return F.binary_cross_entropy_with_logits(
        module(X[batch]), target, pos_weight=torch.arange(1.0, V + 1)
    )


def class_weights_summed(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], weight=CLASS_SCALE, reduction="sum")


def scaled_classes(module, batch):
    return F.cross_entropy(module(X[batch]) * CLASS_SCALE, Y[batch])


CLASS_SCALE = torch.arange(1.0, V + 1)


def example_weights(module, batch):
    each = F.cross_entropy(module(X[batch]), Y[batch], reduction="none")
    return (each * X[batch, 0].abs()).mean()


def per_example_tokens(module, batch):
    y = PADDED[batch]
    each = F.cross_entropy(
        module(TOKENS[batch]).transpose(1, 2), y, reduction="none", ignore_index=0
    )
    return (each.sum(1) / (y != 0).sum(1).clamp(min=1)).mean()


def fixed_divisor(module, batch):
    y = PADDED[batch]
    out = module(TOKENS[batch], attention_mask=MASK[batch])
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=0, reduction="sum") / (
        T * len(y)
    )


def batch_before(module, batch):
    x, y = X[batch], torch.from_numpy(np.asarray(Y)[batch])
    return F.cross_entropy(module(x), y)


def logged(module, batch):
    loss = ce(module, batch)
    loss.item()
    return loss


def metrics(module, batch):
    out = module(X[batch])
    loss = F.cross_entropy(out, Y[batch])
    HITS.add_((out.argmax(1) == Y[batch]).sum())
    float(HITS)
    return loss


HITS = torch.zeros((), dtype=torch.int64)


def drawn(module, batch):
    loss = ce(module, batch)
    torch.rand(5)
    return loss


def filled(module, batch):
    return F.cross_entropy(module(X[batch]) * FILLED.fill_(2.0), Y[batch])


FILLED = torch.ones(1)


def in_place(module, batch):
    out = module(X[batch])
    total = torch.zeros(())
    total += F.cross_entropy(out.clone().clamp_(-9, 9), Y[batch])
    total += 0.1 * out.square().mean()
    return total


def regularised(module, batch):
    return ce(module, batch) + 0.1 * sum(p.square().sum() for p in module.parameters())


def noisy(module, batch):
    out = F.dropout(module(X[batch]), 0.3)
    return F.cross_entropy(out + 0.1 * torch.randn_like(out), Y[batch])


def noise_of_its_own(module, batch):
    generator = torch.Generator().manual_seed(3)
    out = module(X[batch])
    return F.cross_entropy(out + torch.rand(out.shape, generator=generator), Y[batch])


def autocast(module, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(module(X[batch]).float(), Y[batch])


def weighted_vector(module, batch):
    return F.cross_entropy(module(X[batch]), Y[batch], reduction="none").sum() * 2


def targets_without_gradients(module, batch):
    out = module(X[batch])
    with torch.no_grad():
        soft = (out.detach() + F.one_hot(Y[batch], V)).softmax(1)
    return F.kl_div(out.log_softmax(1), soft, reduction="batchmean")


def triplet(module, batch):
    out = module(X[batch])
    return F.triplet_margin_loss(out, X[batch][:, :V], X[batch][:, -V:])


def hf(module, batch):
    return module(TOKENS[batch], attention_mask=MASK[batch], labels=TOKENS[batch])["loss"]


def whole_set_index(module, batch):
    out = module(X.index_select(0, torch.from_numpy(batch)))
    return F.cross_entropy(out, Y.index_select(0, torch.from_numpy(batch)))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 4, 2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, V),
    )


def stochastic():
    return mlp(nn.Dropout(0.5), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.1))


def frozen():
    model = mlp(nn.Tanh())
    model[0].requires_grad_(False)
    return model


def two(module, batch):
    return F.cross_entropy(module(X[batch], shift=X[batch].flip(1)), Y[batch])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, V), nn.Linear(8, V)

    def forward(self, x, *, shift):
        return self.a(x).relu() + self.b(shift)


class Memoryless(nn.Module):
    """Keeps its last activations, for whoever looks, and never reads them."""

    def __init__(self):
        super().__init__()
        self.inner, self.last, self.all = nn.Linear(8, V), None, []

    def forward(self, x):
        self.last = self.inner(x)
        self.all.append(self.last.detach())
        return self.last


INDEPENDENT = [
    *[
        (mlp, loss)
        for loss in (
            ce,
            mse,
            summed,
            smoothed,
            bce,
            class_weights_summed,
            scaled_classes,
            example_weights,
            batch_before,
            logged,
            metrics,
            drawn,
            filled,
            in_place,
            regularised,
            noisy,
            noise_of_its_own,
            autocast,
            weighted_vector,
            targets_without_gradients,
            triplet,
            whole_set_index,
        )
    ],
    *[(model, ce) for model in (conv, stochastic, frozen)],
    *[(Tokens, loss) for loss in (lm, per_example_tokens, fixed_divisor, hf)],
    (Two, two),
    (Memoryless, ce),
    (lambda: mlp(nn.ReLU(), Add(lambda h: h - h.mean(1, keepdim=True))), ce),
]


@pytest.mark.parametrize(("model", "loss"), INDEPENDENT, ids=range(len(INDEPENDENT)))
def test_what_does_not_mix_passes_and_a_probe_changes_no_bit(model, loss):
    """Probed and unprobed runs are bitwise equal in weights, gradients and generators."""
    ends = []
    for independence in ("probed", "assumed"):
        HITS.zero_()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(5).get_state())
            o = make(model(), independence=independence)
            train(o, loss, steps=4)
            ends.append([weights(o), torch.get_rng_state(), HITS.clone()])
        if independence == "probed":
            assert o._probe.probed == [0, 1, 2]
            assert "was probed at 3 of this process's steps, last at its step 2" in o.claim()
            if isinstance(o.module._module, Memoryless):
                assert len(o.module._module.all) == 4
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ------------------------------------------------------------------------------------------- rules


def test_equal_examples_show_nothing_and_are_made_up_for():
    o = make(mlp())
    x, y = torch.ones_like(X), torch.zeros_like(Y)
    train(o, lambda m, b: F.cross_entropy(m(x[b]), y[b]), steps=3)
    assert o.claim().endswith("has not been probed yet.")
    train(o, ce, steps=1)
    assert o._probe.probed == [3]
    train(o, ce, steps=2)
    assert o._probe.probed == [3, 4]
    o = make(mlp())
    train(o, lambda m, b: F.cross_entropy(m(x[b]), y[b]), steps=3)
    with pytest.raises(RootnoiseError, match=r"^loss \(cross_entropy\) must not mix"):
        train(o, contrastive, steps=1)


def test_later_steps_are_probed():
    o = make(mlp(), probe_every=3)
    train(o, ce, steps=8)
    assert o._probe.probed == [0, 1, 2, 3, 4, 6]
    o = make(Tokens())
    full = lambda m, b: F.cross_entropy(m(TOKENS[b]).flatten(0, 1), TOKENS[b].flatten())  # noqa: E731
    train(o, full, steps=4)  # without padding all tokens count
    with pytest.raises(RootnoiseError, match=r"^loss \(cross_entropy\) must not mix"):
        train(o, token_mean, steps=1)


def test_options_are_checked():
    with pytest.raises(RootnoiseError, match=r"^independence must be probed or assumed, got 'no'"):
        make(mlp(), independence="no")
    with pytest.raises(RootnoiseError, match=r"^probe_every must be >= 0, got -1"):
        make(mlp(), probe_every=-1)


def test_a_step_that_cannot_be_replayed_is_refused():
    def refused(message, loss, model=mlp):
        o = make(model())
        with pytest.raises(RootnoiseError, match=message):
            train(o, loss, steps=1)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(8, V), [0]

        def forward(self, x):
            self.calls.append(0)
            if len(self.calls) > 2:
                raise KeyError("once")
            return self.inner(x)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, V)

        def forward(self, batch):
            return self.inner(X[batch])

    def written(module, batch):
        out, y = module(X[batch]), Y[batch]
        scale = torch.ones(len(y))
        first = scale_of(scale)
        loss = F.cross_entropy(out, y, reduction="none") * first
        OUTSIDE[0].add_(1)
        return loss.mean()

    def scale_of(scale):
        return scale * OUTSIDE[1]

    refused("^step must run again for the probe of independence, got KeyError 'once'", ce, Counts)
    refused("^tensors of the loss must not be written to", written)
    rows = lambda m, b: F.cross_entropy(m(b), Y[b])  # noqa: E731
    refused(
        r"^one tensor that the model gets must have one row an example \(6\), got none", rows, Rows
    )


OUTSIDE = torch.ones(2, 1).split(1)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("what", ["layer", "loss"])
def test_all_ranks_refuse_together(tmp_path, sharded, what):
    launch(2, probe_runs.mix, tmp_path, sharded, what)
    zero, one = ((tmp_path / f"{rank}.txt").read_text().split("\n") for rank in range(2))
    assert zero[0] == "step 0 was refused by rank 1"
    assert one[0].startswith("layer 1 (Mean) must" if what == "layer" else "loss (add) must")
    for lines in (zero, one):
        assert lines[1] == "step 1"  # and they can go on
        assert lines[2].endswith("was probed at 1 of this process's steps, last at its step 0.")


def test_rounding_is_told_from_mixing():
    """A hundred times the type's epsilon of the row's largest number, and of 1e-3 at the least."""
    kept, eps = torch.tensor([True, True, False]), torch.finfo(torch.float32).eps
    old = torch.tensor([[1.0, 0.5], [1e-6, 0.0], [1.0, 1.0]])
    for row, off, seen in (
        (0, 50 * eps, False),
        (0, 200 * eps, True),
        (1, 5e-2 * eps, False),
        (1, 2e-1 * eps, True),
        (2, 1.0, False),  # replaced, so that it may change
    ):
        new = old.clone()
        new[row] += off
        assert _differ(old, new, 3, kept) == seen
    assert _differ(old, None, 3, kept)
    assert not _differ(torch.zeros(3, 2), None, 3, kept)


def test_faint_mixing_is_seen():
    o = make(mlp(Add(lambda h: h + 1e-3 * h.mean(0))))
    batch = o.sampler.batch(0)
    F.cross_entropy(o.module(X[batch]), Y[batch]).backward()
    with pytest.raises(RootnoiseError, match=r"must not mix the examples of a batch"):
        o.step(batch)


class WithLoss(nn.Module):
    """Makes its loss itself, over the sum of the batch's weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 9))

    def forward(self, x, y):
        weights = 1.0 + y
        return (weights * F.cross_entropy(self.net(x), y, reduction="none")).sum() / weights.sum()


def test_a_loss_made_inside_is_seen_in_the_gradients_of_layers():
    o = make(WithLoss())
    batch = o.sampler.batch(0)
    o.module(X[batch], Y[batch]).backward()
    message = r"^loss, or what follows layer net.2 \(Linear\), must not mix the examples"
    with pytest.raises(RootnoiseError, match=message):
        o.step(batch)


@pytest.mark.parametrize("rows", range(2, 9))
def test_every_example_stays_once_and_is_replaced_once(rows):
    kept = [source == torch.arange(rows) for source in _sources(rows, t=3)]
    assert (kept[0] ^ kept[1]).all()
    assert [int(k.sum()) for k in kept] == [rows // 2, rows - rows // 2]


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, V), nn.Linear(8, 4)

    def forward(self, x):
        logits, other = self.first(x), self.last(x)
        return {"logits": logits, "other": other, "scores": logits.softmax(1)}


def test_each_output_counts_and_none_need_be_used():
    def legal(module, batch):
        found = module(X[batch])
        return F.cross_entropy(found["logits"], Y[batch]) + found["other"].square().mean()

    def mixing(module, batch):
        found = module(X[batch])
        spread = (found["other"] - found["other"].mean(0)).square().mean()
        return F.cross_entropy(found["logits"], Y[batch]) + spread

    o = make(TwoHeads())
    train(o, legal)
    assert o.t == 2
    with pytest.raises(RootnoiseError, match=r"^loss \(\w+\) must not mix the examples"):
        train(make(TwoHeads()), mixing)


def test_a_sharded_model_returns_rows():
    one = torch.ones((), requires_grad=True)
    with pytest.raises(RootnoiseError, match=r"^loss of a sharded model must be made of rows that"):
        _Trace(nn.Linear(2, 2), 4, deep=False).backward(2 * one, None, [one])


def test_labels_are_labels_beside_tensors_as_wide_as_the_batch():
    def loss(module, batch):
        y = Y[batch]
        logits = module(X[batch]) * 2.0  # as many classes as examples
        return F.cross_entropy(logits, y, reduction="sum") / (1 + y).sum()

    with pytest.raises(RootnoiseError, match=r"^loss \(\w+\) must not mix the examples"):
        train(make(mlp()), loss)

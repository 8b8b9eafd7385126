"""Losses and layers that mix examples are refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from probe_cases import (
    BATCH,
    MASK,
    PADDED,
    TOKENS,
    Add,
    Tokens,
    V,
    X,
    Y,
    ce,
    contrastive,
    make,
    mlp,
    token_mean,
    train,
    weights,
)
from rootnoise._check import RootnoiseError


def contrastive_halves(module, batch):
    a, b = module(X[batch]).chunk(2)
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


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


class Steps(nn.Module):
    """A recurrent layer over (steps, examples, width), with a hook on its outputs' gradient."""

    def __init__(self, steps, hook=None, by_name=False):
        super().__init__()
        self.steps, self.hook, self.by_name = steps, hook, by_name
        self.layer = nn.GRU(2, V)

    def forward(self, x):
        x = torch.cat([x, x], 1)[:, : 2 * self.steps].unflatten(1, (self.steps, 2))
        x, start = x.transpose(0, 1), x.new_zeros(1, len(x), V)
        y = (self.layer(input=x, hx=start) if self.by_name else self.layer(x, start))[0]
        if self.hook is not None:
            y.register_hook(self.hook)
        return y[-1]


def apart(g):
    return g - g.mean(1, keepdim=True)


MIXING = [
    (lambda: Steps(4, apart), ce, r"^loss, or what follows layer layer \(GRU\), must not mix"),
    (
        lambda: Steps(4, apart, True),
        ce,
        r"^loss, or what follows layer layer \(GRU\), must not mix",
    ),
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


@pytest.mark.parametrize("steps", [4, BATCH])
def test_steps_first_are_compared_by_example(steps):
    o = make(Steps(steps))
    train(o, ce)
    assert o.claim().endswith("at 2 of this process's steps, last at its step 1.")


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

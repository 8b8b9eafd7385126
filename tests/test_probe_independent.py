"""Losses and layers that do not mix examples pass the probe, and no bit is changed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from probe_cases import (
    MASK,
    PADDED,
    TOKENS,
    Add,
    T,
    Tokens,
    V,
    X,
    Y,
    ce,
    lm,
    make,
    mlp,
    train,
    weights,
)


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


@pytest.mark.filterwarnings("ignore::rootnoise.training.IgnoredPenaltyWarning")  # `regularised`
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

"""Models, examples and losses for the probe of independence, and a loop that trains."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import PrivateOptimizer, privatize
from rootnoise.workload import SGD

N, BATCH, T, V = 24, 6, 6, 6  # classes, tokens and examples are as many: the hardest to tell apart
X = torch.sin(torch.arange(N * 8.0) ** 2).view(N, 8)
Y = torch.arange(N) * 7 % 11 % V
TOKENS = 1 + (torch.arange(N * T) ** 2 % 37 % (V - 1)).view(N, T)
MASK = torch.arange(T) < 1 + torch.arange(N)[:, None] * 5 % 7 % T
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


def contrastive(module, batch):
    h = F.normalize(module(X[batch]), dim=1)
    return F.cross_entropy(h @ h.T / 0.1, torch.arange(len(h)))


def token_mean(module, batch):
    return F.cross_entropy(
        module(TOKENS[batch]).flatten(0, 1), PADDED[batch].flatten(), ignore_index=0
    )

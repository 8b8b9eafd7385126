"""The clipping engine under `PrivateOptimizer`: what one record moves, and what is refused."""

import itertools
import warnings
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rootnoise._check import RootnoiseError
from rootnoise.factorization import factorize
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation.samplers import FixedCycleSampler
from rootnoise.training import IgnoredPenaltyWarning, PrivateOptimizer, privatize
from rootnoise.training.clip.bounds import EXAMPLES, SLACK
from rootnoise.training.clipping import Clip
from rootnoise.training.ranks import Ranks
from rootnoise.training.replicated import Copies
from rootnoise.workload import SGD

N, BATCH = 12, 4
KEY = Key.from_seed(1)


# ------------------------------------------------------------------------ what one record can move


class Two(Ranks):
    """The last of two ranks, whose other one holds nothing; or the first, without noise."""

    def __init__(self, noise=True):
        super().__init__()
        self.rank, self.size = int(noise), 2

    def span(self, n):
        return (0, n) if self.rank else (0, 0)

    def add_(self, total):
        """Add the other one's, which is zero; whole numbers alone add up exactly."""
        assert torch.equal(total, total.round())


def place(model, clip, ranks=None):
    copies = Copies(privatize(model, "sum"), ranks or Ranks(), clip)
    copies._dtype = torch.float64  # so that a mean shows every bit of its sum
    return copies


def units(copies, x, g, cuts=()):
    """The whole release without noise, as Python integers, for any inputs and output gradients."""
    for a, b in zip(np.split(x, cuts), np.split(g, cuts), strict=True):
        if len(a):
            (copies._module(torch.as_tensor(a)) * torch.as_tensor(b)).sum().backward()
        copies.take(len(a))
        copies._module.discard()
    size = sum(copies._sizes)
    total, _ = copies.noised_mean(0, torch.zeros(size), 0, 1)
    whole = [int(v) for v in (total / copies._clip.grid).tolist()]
    assert whole == (total / copies._clip.grid).tolist()
    return np.array(whole, dtype=object)


def moved(copies, x, g, i, cuts=()):
    """The exact square of how far record i moves the release, in clip norms."""
    rest = (np.delete(x, i, 0), np.delete(g, i, 0))
    change = units(copies, x, g, cuts) - units(copies, *rest, [c for c in cuts if c < len(rest[0])])
    unit = Fraction(copies._clip.grid) / Fraction(copies._clip.norm)
    return Fraction(sum(v * v for v in change)) * unit**2


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 30),
    tokens=st.integers(1, 6),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    norm=st.sampled_from([1e-10, 0.3, 1.0, 1e10]),
    size=st.floats(-6, 6),
    cancel=st.floats(-9, 0),
    cut=st.integers(0, 30),
)
def test_no_record_moves_a_release_by_more_than_the_clip_norm(
    seed, rows, tokens, widths, norm, size, cancel, cut
):
    """Tokens that cancel, of gradients from far below the clip norm to far above it."""
    rng = np.random.default_rng(seed)
    x = 1 + 10**cancel * rng.normal(size=(rows, tokens, widths[0]))
    g = rng.normal(size=(rows, tokens, widths[1]))
    g = (g - (1 - 10**cancel) * g.mean(1, keepdims=True)) * norm * 10**size
    copies = place(nn.Linear(*widths), Clip.fit(norm, rows, noise_std=norm))
    x, g = x.astype(np.float32), g.astype(np.float32)
    assert moved(copies, x, g, seed % rows, [min(cut, rows)]) <= 1


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_arrays_of_float32_products_move_a_release_by_no_more(size):
    """Wide enough for Gram norms, of enough tokens for float32."""
    rng = np.random.default_rng(3)
    x = 1 + 0.1 * rng.normal(size=(5, 48, 100))
    g = size * (rng.normal(size=(5, 48, 100)) + 0.3)
    copies = place(nn.Linear(100, 100), Clip.fit(1.0, 5, noise_std=1.0))
    found = moved(copies, x.astype(np.float32), g.astype(np.float32), 2, [3])
    assert found <= 1
    assert found > (1 - 2e-3) ** 2 or size < 1


@pytest.mark.parametrize("norm", [1e-10, 1.0, 1e10])
def test_gradients_of_any_size(norm):
    """From those whose squares vanish to those near the end of float32; zero counts as zero."""
    copies = place(nn.Linear(1, 3000, bias=False), Clip.fit(norm, 2, norm))
    x, g = np.ones((2, 1), dtype=np.float32), np.ones((2, 3000), dtype=np.float32)
    for size in (0.0, 1e-40, 1e-20, 1e-9, 1.0, 1e17, 1e20, 3e38):
        g[0] = size
        alone = units(copies, x[:1], g[:1])
        unit = Fraction(copies._clip.grid) / Fraction(norm)
        share = Fraction(sum(v * v for v in alone)) * unit**2
        assert share <= 1
        assert share > Fraction(999, 1000) or size <= norm
        assert moved(copies, x, g, 0) <= 1
    g[0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert moved(copies, x, g, 0) == 0


@pytest.mark.parametrize("ranks", [Ranks(), Two(), Two(noise=False)], ids=["one", "last", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_never_lies_where_the_next_sum_is_made(ranks, dtype):
    """Else the raw sum would stand in it; a rank of several may draw none of the noise."""
    model = nn.Linear(2, 3, bias=False).to(dtype)
    copies = Copies(privatize(model, "sum"), ranks, Clip.fit(1.0, 2, 1.0))
    x = torch.ones(2, 2, dtype=dtype)
    for _ in range(2):
        drawn = ranks.span(6)[1]
        mean, _ = copies.noised_mean(0, torch.ones(drawn), 0, 1)
        assert mean.tolist() == [float(drawn > 0)] * 6
        copies.write(mean)
        before = [p.grad.clone() for p in copies._parameters.values()]
        copies._module(x).sum().backward()
        copies.take(2)
        after = [p.grad for p in copies._parameters.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert {p.grad.dtype for p in copies._parameters.values()} == {dtype}
        copies.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_has_its_parameters_digits(dtype):
    """In the memory of float32 noise it would have no more than those."""
    model = nn.Linear(1, 4, bias=False).to(dtype)
    copies = Copies(privatize(model, "sum"), Ranks(), Clip.fit(1.0, 2, 1.0))
    third = torch.full((4,), 1 / 3)
    copies.write(copies.noised_mean(0, third.clone(), 0, 7)[0])
    gradient = torch.cat([p.grad for p in copies._parameters.values() if p.grad is not None])
    assert torch.equal(gradient[:, 0], (third.double() / 7).to(dtype))


def test_many_rows_of_one_direction():
    rng = np.random.default_rng(0)
    x = np.ones((32_768, 1), dtype=np.float32)
    g = (rng.uniform(size=(32_768, 8)) + 1).astype(np.float32)
    copies = place(nn.Linear(1, 8, bias=False), Clip.fit(1.0, len(x), 1.0))
    found = [moved(copies, x, g, i) for i in rng.integers(0, len(x), 4)]
    assert (1 - 2 * SLACK) ** 2 < min(found) <= max(found) <= 1


def test_rounding_to_the_grid_is_paid_for():
    """Others push each coordinate to just below a half, and the record over it: a unit more."""
    clip, d = Clip(1.0, 2.0**-10), 100
    copies = place(nn.Linear(1, d, bias=False), clip)
    x, worst = np.ones((2, 1), dtype=np.float32), Fraction(0)
    for offset in np.linspace(0, 1, 41):
        g = np.stack([np.full(d, 5.0), np.full(d, offset * clip.grid)]).astype(np.float32)
        worst = max(worst, moved(copies, x, g, 0))
    assert Fraction(98, 100) < worst <= 1
    unpaid = 0.1 + clip.grid / 2  # a coordinate of the clipped record, rounded up
    assert unpaid * d**0.5 > 1
    with pytest.raises(
        RootnoiseError, match=r"^noise must leave float64 digits for the clip norm, "
    ):
        place(nn.Linear(1, d, bias=False), Clip(1.0, 2.0**-9))


@pytest.mark.parametrize("ranks", [Ranks(), Two()], ids=["one", "two"])
def test_ranks_and_noise_add_up_exactly(ranks):
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(8, 2, n)).astype(np.float32) for n in (5, 7))
    clip = Clip.fit(1.0, 8, 2.0)
    copies = place(nn.Linear(5, 7), clip, ranks)
    noise = torch.from_numpy(rng.normal(size=42)).float()
    exact = units(copies, x, g)
    (copies._module(torch.from_numpy(x)) * torch.from_numpy(g)).sum().backward()
    noised, bad = copies.noised_mean(8, noise, 0, 1)
    assert bad == 0
    expected = [
        int(s) + round(Fraction(z) / Fraction(clip.grid))
        for s, z in zip(exact, noise.tolist(), strict=True)
    ]
    assert [int(v) for v in (noised / clip.grid).tolist()] == expected


def test_a_step_of_too_many_examples_is_refused_before_it_is_admitted():
    o = make(nn.Sequential(nn.Linear(3, 2)))
    batch = o.sampler.batch(0)
    o.module(torch.ones(BATCH, 3)).sum().backward()
    o.module._examples = EXAMPLES - 3
    with pytest.raises(RootnoiseError, match=rf"^step must have at most {EXAMPLES} examples "):
        o.step(batch)
    assert o.ledger.t == o.stream.t == 0


# ------------------------------------------------------------------------- models and their twins


def make(model, **options):
    sampler = FixedCycleSampler(N, BATCH, 2, seed=0)
    who = sampler.participation
    split = factorize(SGD(sampler.n_steps), who, "bsr")
    mechanism = Mechanism.calibrate(split, who, noise_multiplier=0.3, delta=1e-5, clip_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer .* is not in the table of layers", UserWarning)
        module = privatize(model)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    return PrivateOptimizer(sgd, module, mechanism, sampler, KEY, **options)


class Attention(nn.Module):
    """torch's own attention and LSTM, which Opacus refuses, and a layer outside of the table."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(4, 2, batch_first=True)
        self.second, self.third = nn.LSTM(4, 3, batch_first=True), nn.PReLU()

    def forward(self, x):
        y, _ = self.first(x, x, x, need_weights=False)
        return self.third(self.second(x + y)[0]).mean(1)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, for LSTM
def test_layers_that_are_run_again_are_one_pass_to_the_guard():
    o = make(Attention())
    x = torch.randn(N, 5, 4, generator=torch.Generator().manual_seed(1))
    noise = NoiseStream(o.mechanism, sum(p.numel() for p in o.module.parameters()), KEY)
    for t in range(2):
        batch = o.sampler.batch(t)
        expected = noise.next().double()
        with o.module.paused():
            for i in batch:
                loss = o.module(x[i : i + 1]).square().sum()
                made = torch.autograd.grad(loss, list(o.module.parameters()))
                own = torch.cat([m.flatten() for m in made]).double()
                expected += own * min(1.0, 0.5 / float(own.norm()))
        o.zero_grad()
        o.module(x[batch]).square().sum(1).mean().backward()
        assert all(p.grad is None for p in o.module.parameters())
        o.step(batch)
        found = torch.cat([p.grad.flatten() for p in o.module.parameters()]).double() * BATCH
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert o._probe.probed == [0, 1]


class Borrows(nn.Module):
    """Uses a layer's weight past the layer, as models with tied output do by hand."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(3, 3)

    def forward(self, x):
        return functional.linear(self.table(x), self.table.weight)


def test_a_weight_that_forward_uses_past_its_layer_is_refused_in_forward():
    o = make(Borrows())
    message = r"^parameter table.weight must be used by its own layer's call alone"
    with pytest.raises(RootnoiseError, match=message):
        o.module(torch.ones(4, 3))
    with torch.no_grad():
        o.module(torch.ones(4, 3))


def test_a_penalty_leaves_nothing_behind_and_counts_nothing():
    found = []
    for penalty in (0.0, 5.0):
        o = make(nn.Sequential(nn.Linear(3, 2)))
        batch = o.sampler.batch(0)
        loss = o.module(torch.ones(4, 3)).square().mean()
        (loss + penalty * sum(p.square().sum() for p in o.module.parameters())).backward()
        assert all(p.grad is None or not p.grad.any() for p in o.module.parameters())
        line = r"term of parameters, such as 0\.(weight|bias), which counts nothing: give w"
        with pytest.warns(IgnoredPenaltyWarning, match=line) if penalty else nullcontext():
            o.step(batch)
        found.append(torch.cat([p.detach().flatten() for p in o.module.parameters()]))
    assert torch.equal(*found)


def test_a_layer_that_is_frozen_later_stays_frozen_and_is_refused():
    o = make(nn.Sequential(nn.Linear(3, 2)))
    batch = o.sampler.batch(0)
    o.module._module[0].bias.requires_grad_(False)
    o.module(torch.ones(4, 3)).sum().backward()
    assert not o.module._module[0].bias.requires_grad
    with pytest.raises(RootnoiseError, match=r"1 trainable parameters once and no other, got 2"):
        o.step(batch)


def test_rows_that_a_guard_does_not_see():
    """A keyword argument without a batch dimension."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.words(x) + self.places(input=torch.eye(4)[:1])

    o = make(Positions())
    with pytest.raises(
        RootnoiseError, match=r"^layer places must take and give one row an example"
    ):
        o.module(torch.ones(4, 3)).sum().backward()


def test_names_and_states_are_those_of_before():
    o = make(nn.Sequential(nn.Linear(3, 2)))
    assert [name for name, _ in o.state_dict()["layout"]] == ["_module.0.weight", "_module.0.bias"]
    assert list(o.module.state_dict()) == ["_module.0.weight", "_module.0.bias"]
    assert privatize(nn.Linear(3, 2)).in_features == 3
    with pytest.raises(AttributeError, match="nothing"):
        _ = o.module.nothing


def test_orders_of_micro_batches_are_one_sum():
    """Any order of any division: the sums differ by rounding alone."""
    rng = np.random.default_rng(2)
    x, g = (rng.normal(size=(6, n)).astype(np.float32) for n in (5, 7))
    copies = place(nn.Linear(5, 7), Clip.fit(1.0, 6, 1.0))
    found = [
        units(copies, x[list(order)], g[list(order)], cuts)
        for order, cuts in itertools.product([range(6), [3, 1, 5, 0, 2, 4]], [(), (2,), (1, 5)])
    ]
    for other in found[1:]:
        assert max(abs(other - found[0])) <= 1  # unit

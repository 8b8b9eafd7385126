"""The clipping engine against one float64 backward an example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from rootnoise import RootnoiseError
from rootnoise.training.clip import Automatic, ClipRule, Flat, PerLayer, PrivateModule
from rootnoise.training.clip.bounds import gram_squares

CLIP = 0.5


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return (y.flatten(1) * torch.linspace(0.5, 2, y[0].numel(), dtype=y.dtype)).sin().sum()


def true_gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return (examples, parameters), float64, by one backward an example."""
    model = copy.deepcopy(model).double()
    if isinstance(model, Checkpointed):
        model.reentrant = False  # which torch.autograd.grad does not work with
    x = x.double() if x.is_floating_point() else x
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        made = torch.autograd.grad(loss_of(model(x[i : i + 1])), parameters, allow_unused=True)
        both = zip(made, parameters, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in both])
        )
    return torch.stack(rows)


def private(model: nn.Module, reduction: str = "sum") -> PrivateModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PrivateModule(model, reduction)


def check(model: nn.Module, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    truth = true_gradients(model, x)
    norms = truth.norm(dim=1)
    clip = float(norms.median())
    expected = ((clip / norms).clamp(max=1)[:, None] * truth).sum(0)
    ours = private(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss_of(ours(x)).backward()
    found = ours.norms(len(x))
    ours.add(Flat(clip))
    total, bad = ours.finish()
    assert bad == 0
    assert all(p.grad is None for p in model.parameters())
    assert (found >= norms * (1 - tolerance)).all()
    assert (found <= norms * (1 + 1e-3) + 1e-9).all()
    slack = 1e-3 if (found > norms * (1 + tolerance)).any() else 2 * tolerance
    assert (total - expected).norm() <= slack * expected.norm() + 1e-12


class First(nn.Module):
    """The first output of a layer that gives several."""

    def __init__(self, layer: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(*[x] * self.copies)[0]
        return result


class Bare(nn.Module):
    """A parameter of its own, and a child."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.child = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.child(torch.cat([self.token.expand(len(x), 1, 4), x], 1))
        return y


class Twice(nn.Module):
    """One layer used twice, one never, one frozen, one tied to an embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.mix, self.unused = nn.Linear(width, width), nn.Linear(width, 2)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.out = nn.Linear(width, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.table(ids)).tanh()
        y: torch.Tensor = self.out(self.mix(self.frozen(x)))
        return y


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 40), nn.Linear(40, 30)
        self.last, self.reentrant = nn.Linear(30, 20), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def block(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.second(self.first(x).tanh())
            return y

        if self.reentrant:
            x = x.clone().requires_grad_()
        y: torch.Tensor = self.last(checkpoint(block, x, use_reentrant=self.reentrant))
        return y


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


def ids(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 7, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(30, 20), floats(5, 30)),
    "linear 3-D, Gram": (lambda: nn.Linear(30, 40), floats(5, 3, 30)),
    "linear 4-D, made": (lambda: nn.Linear(3, 2), floats(5, 3, 4, 3)),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(9, 50), nn.ReLU(inplace=True), nn.Linear(50, 4)),
        floats(6, 9),
    ),
    "conv 1": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2), floats(5, 4, 11)),
    "conv 2, Gram": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), floats(5, 8, 3, 3)),
    "conv 2 groups, Gram": (lambda: nn.Conv2d(16, 32, 3, groups=2), floats(5, 16, 4, 4)),
    "conv 2 same": (
        lambda: nn.Conv2d(3, 4, (2, 4), padding="same", padding_mode="circular"),
        floats(5, 3, 6, 6),
    ),
    "conv 3": (
        lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"),
        floats(4, 2, 3, 3, 4),
    ),
    "conv relu": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.GroupNorm(1, 3)),
        floats(4, 2, 5, 5),
    ),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 2), floats(4, 2, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=2), ids(6, 8)),
    "bag": (lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=2), ids(6, 8)),
    "bag sum": (lambda: nn.EmbeddingBag(7, 5, mode="sum"), ids(6, 8)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), floats(5, 2, 3, 4)),
    "RMS norm": (lambda: nn.RMSNorm(4), floats(5, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), floats(5, 4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), floats(5, 4, 3, 3)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)), floats(5, 4)),
    "attention with keys of its own": (
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True), 3),
        floats(4, 5, 6),
    ),
    "attention": (
        lambda: First(nn.MultiheadAttention(6, 2, batch_first=True), 3),
        floats(4, 5, 6),
    ),
    "Opacus attention": (
        lambda: First(DPMultiheadAttention(6, 2, batch_first=True), 3),
        floats(4, 5, 6),
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        floats(4, 5, 8),
    ),
    "LSTM": (lambda: First(nn.LSTM(4, 3, batch_first=True)), floats(5, 6, 4)),
    "Opacus LSTM": (lambda: First(DPLSTM(4, 30, batch_first=True)), floats(5, 3, 4)),
    "Opacus GRU": (lambda: First(DPGRU(4, 3, 2, batch_first=True)), floats(5, 6, 4)),
    "bare parameter": (Bare, floats(5, 2, 4)),
    "tied, twice, frozen, unused": (lambda: Twice(5), ids(6, 4)),
    "the same, wide": (lambda: Twice(40), ids(6, 4)),
    "checkpointed": (lambda: Checkpointed(False), floats(5, 30)),
    "checkpointed, reentrant": (lambda: Checkpointed(True), floats(5, 30)),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_and_clipped_sums_are_those_of_one_float64_backward_an_example(case: str) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(len(case))  # inside the fork
        make, draw = CASES[case]
        check(make(), draw())


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    tokens=st.integers(1, 9),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear_of_any_shape(
    n: int, tokens: int, d_in: int, d_out: int, bias: bool, seed: int
) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        check(nn.Linear(d_in, d_out, bias), torch.randn(n, tokens, d_in))


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    seed=st.integers(0, 2**31),
)
def test_convolution_of_any_shape(
    dims: int,
    groups: int,
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    padding: int,
    mode: str,
    seed: int,
) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    c_in, c_out = (groups * c for c in channels)
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        options: dict[str, Any] = {"padding_mode": mode, "groups": groups, "dilation": dilation}
        model = layer(c_in, c_out, kernel, stride, padding, **options)
        check(model, torch.randn(3, c_in, *[5] * dims))


def test_bags_by_offsets_with_weights() -> None:
    bag = nn.EmbeddingBag(7, 5, mode="sum", padding_idx=1)
    flat, starts = torch.tensor([0, 1, 4, 4, 6]), torch.tensor([0, 2, 2])
    weights = torch.linspace(0.5, 2, 5)
    out = bag(flat, starts, per_sample_weights=weights)
    truth = [torch.autograd.grad(loss_of(y[None]), bag.weight, retain_graph=True)[0] for y in out]
    ours = private(bag)
    # The batch is the number of bags, which the first tensor must have.
    loss_of(ours_forward(ours, starts, flat, weights)).backward()
    assert torch.allclose(ours.norms(3).float(), torch.stack(truth).flatten(1).norm(dim=1))


def ours_forward(ours: PrivateModule, starts: Any, flat: Any, weights: Any) -> torch.Tensor:
    result: torch.Tensor = ours(offsets=starts, input=flat, per_sample_weights=weights)
    return result


@pytest.mark.parametrize("rule", [Flat(CLIP), PerLayer(CLIP), Automatic(CLIP)])
def test_one_example_adds_at_most_the_clip_norm(rule: ClipRule) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(5)
        ours = private(nn.Sequential(nn.Linear(9, 50), nn.ReLU(), nn.Linear(50, 4)))
        for scale in (1e-6, 1.0, 1e6):
            loss_of(scale * ours(torch.randn(1, 9))).backward()
            ours.norms(1)
            ours.add(rule)
            assert float(ours.finish()[0].norm()) <= rule.sensitivity


def test_micro_batches_of_any_sizes_add_up() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(6)
        ours, x = private(nn.Linear(9, 5), "mean"), torch.randn(10, 9)
        totals = []
        for sizes in ([10], [1, 7, 2], [5, 0, 5]):
            for part in torch.split(x, sizes):
                if len(part):
                    y = ours(part)
                    (loss_of(y) / len(part)).backward()
                ours.norms(len(part))
                ours.add(Flat(CLIP))
            totals.append(ours.finish()[0])
    assert torch.allclose(totals[0], totals[1], rtol=0, atol=1e-6)
    assert torch.allclose(totals[0], totals[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [3, 60])
def test_non_finite_examples_count_as_zero_and_touch_no_other(width: int) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(7)
        ours, x = private(nn.Linear(width, width)), torch.randn(4, 2, width)
    loss_of(ours(x[:3])).backward()
    ours.norms(3)
    ours.add(Flat(CLIP))
    clean = ours.finish()[0]
    x[3, 0, 1] = torch.inf
    loss_of(ours(x)).backward()
    assert not ours.norms(4)[3].isfinite()
    ours.add(Flat(CLIP))
    total, bad = ours.finish()
    assert bad == 1
    assert torch.allclose(total, clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cancel", [0.0, 1e-6, 1e-3, 1.0])
def test_gram_norms_are_never_too_small_where_tokens_cancel(cancel: float) -> None:
    """Nearly constant activations, and output gradients that sum to nearly nothing."""
    with torch.random.fork_rng():
        torch.random.manual_seed(8)
        a = 1 + cancel * torch.randn(20, 1, 8, 33)
        g = torch.randn(20, 1, 8, 65)
        g = g - g.mean(2, keepdim=True) * (1 - cancel)
    for bias in (False, True):
        made = torch.einsum("nkti,nktj->nij", g.double(), a.double())
        square = made.square().sum((1, 2)) + bias * g.double().sum(2).square().sum((1, 2))
        assert (gram_squares(a, g, True, bias) >= square).all()


def test_autocast_to_bfloat16() -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(9)
        model = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.PReLU(), nn.Linear(40, 3))
        x = torch.randn(6, 30)
    truth, ours = true_gradients(model, x), private(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(ours(x).float())
    loss.backward()
    assert torch.allclose(ours.norms(6), truth.norm(dim=1), rtol=0.05)
    ours.add(Flat(CLIP))
    assert ours.finish()[0].dtype == torch.float64


class TestRefusals:
    """Each in one line, with the layer's name, before anything counts."""

    def test_another_reduction(self) -> None:
        with pytest.raises(RootnoiseError, match="loss_reduction must be mean or sum, got 'max'"):
            PrivateModule(nn.Linear(2, 2), "max")

    def test_nothing_to_train(self) -> None:
        with pytest.raises(RootnoiseError, match="trainable parameter, got none"):
            PrivateModule(nn.ReLU())

    def test_compiled(self) -> None:
        layer = nn.Linear(2, 2)
        layer.compile(backend="eager")
        with pytest.raises(RootnoiseError, match="layer 0 must not be compiled, got Linear"):
            PrivateModule(nn.Sequential(layer))

    @pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
    def test_embeddings_that_read_the_batch(self, option: dict[str, Any]) -> None:
        with pytest.raises(RootnoiseError, match=r"model must not use .* reads the whole batch"):
            PrivateModule(nn.Embedding(3, 2, **option))

    def test_a_second_forward(self) -> None:
        ours = private(nn.Linear(2, 2))
        ours(torch.ones(3, 2))
        with pytest.raises(RootnoiseError, match="forward must run once a micro-batch"):
            ours(torch.ones(3, 2))
        ours.zero_grad()
        ours(torch.ones(3, 2))

    def test_a_second_backward(self) -> None:
        ours = private(nn.Linear(2, 2))
        loss = ours(torch.ones(3, 2)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RootnoiseError, match="second at layer model"):
            loss.backward()

    def test_an_old_backward(self) -> None:
        ours = private(nn.Linear(2, 2))
        loss = ours(torch.ones(3, 2)).sum()
        ours.zero_grad()
        with pytest.raises(RootnoiseError, match="an older one at layer model"):
            loss.backward()

    def test_a_layer_called_from_outside(self) -> None:
        ours = private(nn.Sequential(nn.Linear(2, 2)))
        y = ours(torch.ones(3, 2))
        with pytest.raises(RootnoiseError, match="layer 0 must be called by its model alone"):
            ours._module[0](y)

    def test_a_parameter_used_outside_its_layer(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        ours = private(model)
        with pytest.raises(RootnoiseError, match=r"parameter 0\.weight must be used by its own"):
            (ours(torch.ones(3, 2)) @ model[0].weight).sum().backward()
        assert model[0].weight.grad is None

    def test_the_bare_model(self) -> None:
        model = nn.Linear(2, 2)
        private(model)
        with pytest.raises(RootnoiseError, match="gradient from elsewhere"):
            model(torch.ones(3, 2)).sum().backward()

    def test_rows_that_are_not_examples(self) -> None:
        ours = private(nn.Sequential(nn.Flatten(0, 1), nn.Linear(2, 2)))
        with pytest.raises(RootnoiseError, match=r"layer 1 must take and give one row an example"):
            ours(torch.ones(3, 4, 2))

    def test_tokens_in_the_rows_of_as_many_examples(self) -> None:
        class Transposed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
                return y

        with pytest.raises(RootnoiseError, match="layer layer must keep the examples apart"):
            private(Transposed())(torch.randn(3, 3, 2))

    def test_positions_that_all_examples_share(self) -> None:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(3, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = x + self.table(torch.arange(3))
                return y

        with pytest.raises(RootnoiseError, match="layer table must keep the examples apart"):
            private(Positions())(torch.randn(3, 3, 2))

    def test_dropout_inside_a_layer_that_is_run_again(self) -> None:
        layer = nn.MultiheadAttention(4, 2, dropout=0.5, add_bias_kv=True, batch_first=True)
        ours = private(First(layer, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(RootnoiseError, match="layer layer must draw no random numbers"):
                ours(torch.randn(3, 5, 4)).sum().backward()

    def test_norms_without_forward_or_backward_or_of_other_rows(self) -> None:
        ours = private(nn.Linear(2, 2))
        with pytest.raises(RootnoiseError, match="gradients are missing: run forward and backward"):
            ours.norms(3)
        with pytest.raises(RootnoiseError, match="norms must be asked for"):
            ours.add(Flat(CLIP))
        y = ours(torch.ones(3, 2))
        with pytest.raises(RootnoiseError, match="backward must run once a micro-batch, got none"):
            ours.norms(3)
        with pytest.raises(RootnoiseError, match="micro-batch must be added before"):
            ours.finish()
        y.sum().backward()
        with pytest.raises(
            RootnoiseError, match=r"indices must be one a gradient row \(3\), got 4"
        ):
            ours.norms(4)

    def test_no_tensor(self) -> None:
        with pytest.raises(RootnoiseError, match="must get a tensor with one row an example"):
            private(nn.Linear(2, 2))()

    def test_a_clip_norm_or_gamma_that_is_not_positive(self) -> None:
        with pytest.raises(RootnoiseError, match="clip_norm must be a finite number > 0"):
            Flat(0.0)
        with pytest.raises(RootnoiseError, match="gamma must be a finite number > 0"):
            Automatic(1.0, gamma=0.0)


def test_a_copy_of_the_model_is_nobodys() -> None:
    model = nn.Linear(2, 2)
    ours = PrivateModule(model, guarded=True)
    model(torch.ones(3, 2)).sum().backward()  # guarded, the same as by the module around it
    assert ours.rows == 3
    assert model.weight.grad is None
    twin = copy.deepcopy(model)
    twin(torch.ones(5, 2)).sum().backward()
    assert twin.weight.grad is not None
    assert ours.rows == 3


def test_layers_outside_the_table_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"layer 0 \(PReLU\) is not in the table of layers"):
        PrivateModule(nn.Sequential(nn.PReLU()))

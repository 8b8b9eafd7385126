"""Every layer of the table in random shapes, half frozen, adapted; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rootnoise import RootnoiseError
from rootnoise.training.clip import Flat, PrivateModule
from rootnoise.training.clip.convolutions import Convolution
from test_clip_engine import First, check, private

KINDS = ("embedding", "bag", "layer", "rms", "group", "instance", "prelu", "attention", "lstm")


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 6),
    tokens=st.integers(2, 7),
    width=st.integers(1, 6),
    option=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_other_layers_of_any_shape(
    kind: str, n: int, tokens: int, width: int, option: int, seed: int
) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        x, d = torch.randn(n, tokens, 2 * width), 2 * width
        channels = torch.randn(n, d, tokens, 3)
        ids = torch.randint(0, 5, (n, tokens))
        padding, mode = (None, 0, 4)[option], ("sum", "mean", "sum")[option]
        model, inputs = {
            "embedding": (nn.Embedding(5, width, padding_idx=padding), ids),
            "bag": (nn.EmbeddingBag(5, width, mode=mode, padding_idx=padding), ids),
            "layer": (nn.LayerNorm([d] if option else [tokens, d], bias=option < 2), x),
            "rms": (nn.RMSNorm(d), x),
            "group": (nn.GroupNorm(2 if option else 1, d), channels),
            "instance": (nn.InstanceNorm2d(d, affine=True), channels),
            "prelu": (nn.PReLU(), x),
            "attention": (First(nn.MultiheadAttention(d, 2, batch_first=True), 3), x),
            "lstm": (First(nn.LSTM(d, width, batch_first=True)), x),
        }[kind]
        check(model, inputs, 1e-4)  # normalising loses digits


class Conv1D(nn.Module):
    """Hugging Face's, whose weight is (d_in, d_out)."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x @ self.weight + self.bias
        return y


Conv1D.__module__ = "transformers.pytorch_utils"


class Adapted(nn.Module):
    """A frozen layer with a trainable product of low rank beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.filterwarnings("error")  # none is outside the table
def test_conv1d_of_hugging_face(tokens: int) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        check(Conv1D(40, 30), torch.randn(4, tokens, 30))


@pytest.mark.parametrize("width", [3, 40])
def test_adapters_of_a_frozen_layer(width: int) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(2)
        check(nn.Sequential(Adapted(width), nn.Tanh(), Adapted(width)), torch.randn(5, 3, width))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_of_which_one_parameter_is_frozen(name: str) -> None:
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        layers: list[tuple[nn.Module, tuple[int, ...]]] = [
            (nn.Linear(30, 40), (5, 3, 30)),
            (nn.Linear(3, 4), (5, 30, 3)),
            (nn.Conv2d(8, 16, 3), (5, 8, 4, 4)),
            (nn.LayerNorm(4), (5, 3, 4)),
            (nn.GroupNorm(2, 4), (5, 4, 3)),
            (Conv1D(40, 30), (5, 3, 30)),
        ]
        for layer, shape in layers:
            layer.get_parameter(name).requires_grad_(False)
            check(layer, torch.randn(shape), 1e-4)


class TestRefusals:
    """Numbers of rows that a tap would otherwise believe."""

    def test_outputs_of_a_layer_of_another_kind(self) -> None:
        class Folded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x * self.scale).flatten(0, 1)

        ours = private(Folded())
        with pytest.raises(RootnoiseError, match=r"layer model must give one row an example \(1\)"):
            ours(torch.ones(1, 3, 2)).sum().backward()

    def test_inputs_of_a_layer_of_another_kind(self) -> None:
        ours = private(nn.Sequential(nn.Flatten(0, 1), nn.PReLU(), nn.Unflatten(0, (1, -1))))
        with pytest.raises(RootnoiseError, match=r"layer 1 must .* one row an example \(1\)"):
            ours(torch.ones(1, 3, 2)).sum().backward()

    def test_packed_sequences(self) -> None:
        ours = private(nn.LSTM(2, 3))
        packed = pack_sequence([torch.ones(2, 2), torch.ones(1, 2)])
        with pytest.raises(RootnoiseError, match="padded to one length, got a PackedSequence"):
            ours(packed)[0].data.sum().backward()

    def test_keys_of_other_rows(self) -> None:
        layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=False)
        ours = private(First(layer, 1))
        ours._module.forward = lambda x: layer(x, *[torch.ones(3, 2, 3)] * 2)[0]
        with pytest.raises(
            RootnoiseError, match=r"one row an example \(5\) in dimension 1 of query"
        ):
            ours(torch.ones(5, 2, 4)).sum().backward()

    def test_a_mask_for_each_example_in_a_layer_that_is_run_again(self) -> None:
        layer = nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True)
        ours, x = private(layer), torch.ones(1, 3, 4)
        with pytest.raises(RootnoiseError, match="attention mask that all examples share, got 3"):
            ours(x, x, x, attn_mask=torch.zeros(2, 3, 3))[0].sum().backward()

    def test_a_sum_that_was_broken_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise MemoryError("full")

        ours = PrivateModule(nn.Linear(2, 2))
        ours(torch.ones(3, 2)).sum().backward()
        ours.norms(3)
        monkeypatch.setattr(ours, "_add", broken)
        with pytest.raises(MemoryError, match="full"):
            ours.add(Flat(1.0))
        for use in (ours.finish, lambda: ours.add(Flat(1.0))):
            with pytest.raises(RootnoiseError, match="sum must be whole, got one whose add was"):
                use()


MEMORY = """
import resource, torch
from torch import nn
from rootnoise.training.clip import Flat, PrivateModule
ours = PrivateModule(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10)))
x = torch.randn(256, 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    ours(x).sum().backward()
    ours.norms(256)
    ours.add(Flat(1.0))
    ours.finish()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_peak_memory_holds_no_gradient_an_example() -> None:
    """256 gradients of 1e6 numbers are 1000 MB; the float64 sum is 8."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, check=True, text=True
    )
    assert float(done.stdout) < 150


@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (1, 32), (2, 4)])
def test_a_convolution_makes_an_array_of_one_example_alone(groups: int, channels: int) -> None:
    """The same bits whoever else is in the batch, and with nobody else."""
    generator = torch.Generator().manual_seed(1)
    layer = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=groups)
    row = Convolution(layer, ["bias", "weight"])
    a = torch.randn(9, channels, 14, 14, generator=generator)
    g = torch.randn(9, 2 * channels, 14, 14, generator=generator)
    whole = row.per_sample(({"input": a}, g))
    for n in (1, 2, 5, 8):
        for part in (slice(0, n), slice(9 - n, 9)):
            made = row.per_sample(({"input": a[part]}, g[part]))
            for name in ("weight", "bias"):
                assert torch.equal(made[name], whole[name][part])

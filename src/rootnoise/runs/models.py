"""Small models for runs, all of which allow per-sample gradients (no BatchNorm).

A BatchNorm layer mixes the examples of a batch, so that no gradient belongs to one person alone.
Parameters are drawn from a separate generator: `build` is a pure function of its arguments, and
neither uses nor changes the global generator or the default dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rootnoise._check import RootnoiseError, integer, one_of

Shape = tuple[int, ...]


def build(name: str, input_shape: Sequence[int], n_classes: int, seed: int) -> nn.Module:
    """Return the model called `name`, mapping (batch, *input_shape) to (batch, n_classes) logits.

    - `logistic`: one linear layer on the flattened input.
    - `mlp`: one hidden layer of 128 tanh units.
    - `cnn`: two tanh convolutions for (channels, height, width), at least 6x6 pixels.
    - `resnet18`: the residual network of He et al. (2016) with group normalisation (Wu & He 2018)
      instead of BatchNorm and, below 64 pixels, a 3x3 first layer without pooling.
    - `transformer`: two encoder blocks of width 32 and four heads on the patches of an image, or on
      the single features of a (features,) input.

    Weights and biases are uniform in +-1/sqrt(fan_in), PyTorch's default. They are drawn from
    `seed` alone, in layer order, on the CPU in float32; normalisations start as the identity.

    Raises RootnoiseError for an unknown name, a shape the model cannot take, n_classes < 2 or a
    seed outside [0, 2^63).

    >>> model = build("cnn", (1, 28, 28), n_classes=10, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    26010
    """
    one_of("model", name, MODELS)
    shape = tuple(integer("input_shape entries", size, 1) for size in input_shape)
    if not shape:
        raise RootnoiseError("input_shape must have at least one axis, got ()")
    integer("n_classes", n_classes, 2)
    generator = torch.Generator().manual_seed(integer("seed", seed, 0, 2**63 - 1))
    with torch.device("meta"):  # layers without storage draw no numbers
        model = MODELS[name](shape, n_classes)
    return _initialise(model.float().to_empty(device="cpu"), generator)


def _initialise(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Fill every parameter from `generator`; a layer with unknown parameters is refused."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5  # entries of one output row: its fan-in
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)  # as in BERT
        elif [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            rule = "Linear, Conv2d, GroupNorm, LayerNorm or Embedding"
            raise RootnoiseError(f"model layers must be {rule}, got {type(layer).__name__}")
    return model


def _logistic(shape: Shape, n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), n_classes))


def _mlp(shape: Shape, n_classes: int) -> nn.Module:
    hidden = 128
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.Tanh(), nn.Linear(hidden, n_classes)
    )


def _cnn(shape: Shape, n_classes: int) -> nn.Module:
    """Return the tanh CNN of Papernot et al. (2021), "Tempered Sigmoid Activations".

    Its 8x8 and 4x4 kernels of stride 2 reduce 28x28 to 4x4. Inputs below 16 pixels get 3x3 kernels,
    the first of stride 1, which reduce the 8x8 digits to 2x2.
    """
    if len(shape) != 3 or min(shape[1:]) < 6:
        rule = "(channels, height, width) of at least 6x6 pixels"
        raise RootnoiseError(
            f"input_shape of model cnn (mlp takes any) must be {rule}, got {shape}"
        )
    channels, *sides = shape
    if min(sides) < 16:
        first, second = nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2)
    else:
        first = nn.Conv2d(channels, 16, 8, stride=2, padding=3)
        second = nn.Conv2d(16, 32, 4, stride=2)
    features = nn.Sequential(
        first, nn.Tanh(), nn.MaxPool2d(2, 1), second, nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten()
    )
    width = features(torch.empty(1, *shape)).shape[1]  # on the meta device: shapes only
    return nn.Sequential(*features, nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, n_classes))


class _Block(nn.Module):
    """Two 3x3 convolutions with a skip connection, a 1x1 convolution where shapes change."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, width),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.around = nn.Sequential(convolution, nn.GroupNorm(GROUPS, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return torch.relu(self.inner(x) + self.around(x))


def _resnet18(shape: Shape, n_classes: int) -> nn.Module:
    """Return four stages of two blocks; the widths are those of He et al."""
    if len(shape) != 3 or min(shape[1:]) < 8:
        rule = "(channels, height, width) of at least 8x8 pixels"
        raise RootnoiseError(f"input_shape of model resnet18 must be {rule}, got {shape}")
    small = min(shape[1:]) < 64
    first = nn.Conv2d(shape[0], 64, 3 if small else 7, 1 if small else 2, 1 if small else 3)
    layers: list[nn.Module] = [first, nn.GroupNorm(GROUPS, 64), nn.ReLU()]
    if not small:
        layers.append(nn.MaxPool2d(3, 2, 1))
    before = 64
    for width in (64, 128, 256, 512):
        layers += [_Block(before, width, 1 if width == 64 else 2), _Block(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


class _Encoder(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017; Xiong et al. 2020) from linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (batch, tokens, width) output."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return torch.as_tensor(x + self.feed(x))


class _Transformer(nn.Module):
    """Input tokens with position embeddings, encoder blocks, and a linear layer on all tokens.

    A short run can only train few tokens that are all read out: on the digits, 4 patches a side
    reach 97 % in 10 epochs without privacy, 32 % if only the mean token is read out, and 8 patches
    a side 10 to 20 % either way (SGD, lr 0.05, momentum 0.9).
    """

    def __init__(self, shape: Shape, n_classes: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.patch = 0
        if len(shape) == 3:  # at most 4 patches a side
            self.patch = max(1, -(-max(shape[1:]) // 4))
            tokens = math.prod(-(-side // self.patch) for side in shape[1:])
            self.embed = nn.Linear(shape[0] * self.patch**2, width)
        elif len(shape) == 1:
            tokens = shape[0]
            self.embed = nn.Linear(1, width)
        else:
            rule = "(channels, height, width) or (features,)"
            raise RootnoiseError(f"input_shape of model transformer must be {rule}, got {shape}")
        self.places = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(_Encoder(width, heads), _Encoder(width, heads))
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Flatten(), nn.Linear(tokens * width, n_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the (batch, n_classes) logits."""
        if self.patch:
            height, width = (-side % self.patch for side in x.shape[2:])
            x = nn.functional.pad(x, (0, width, 0, height))
            x = nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        else:
            x = x[:, :, None]
        # One row of positions per example, for per-sample gradients.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        tokens = self.blocks(self.embed(x) + self.places(places))
        return torch.as_tensor(self.read(tokens))


# Divides all numbers of channels, 64 to 512.
GROUPS = 16

MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet18": _resnet18,
    "transformer": _Transformer,
}

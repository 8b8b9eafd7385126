"""Small models for the lab, all of them with per-sample gradients (no BatchNorm).

A BatchNorm layer mixes the examples of a batch, so no gradient would belong to one person alone.
Parameters come from a generator of their own: `build` is a pure function of its arguments and
neither reads nor moves the global one, nor the default dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rootnoise._check import RootnoiseError, integer

Shape = tuple[int, ...]


def build(name: str, input_shape: Sequence[int], n_classes: int, seed: int) -> nn.Module:
    """Return the model called `name`, mapping (batch, *input_shape) to (batch, n_classes) logits.

    - `logistic`: one linear layer on the flattened input.
    - `mlp`: one hidden layer of 128 tanh units.
    - `cnn`: two tanh convolutions for (channels, height, width), from 6x6 pixels on.

    Weights and biases are uniform in +-1/sqrt(fan_in), PyTorch's default, drawn from `seed` alone
    in the order of the layers, on the CPU in float32.

    Raises RootnoiseError for an unknown name, a shape the model cannot take, n_classes < 2 or a
    seed outside [0, 2^63).

    >>> model = build("cnn", (1, 28, 28), n_classes=10, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    26010
    """
    if name not in MODELS:
        raise RootnoiseError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
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
        elif [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            layer_name = type(layer).__name__
            raise RootnoiseError(f"model layers must be Linear or Conv2d, got {layer_name}")
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

    Its 8x8 and 4x4 kernels of stride 2 shrink 28x28 to 4x4. Inputs under 16 pixels get 3x3
    kernels, the first of stride 1, which leave 2x2 of the 8x8 digits.
    """
    if len(shape) != 3 or min(shape[1:]) < 6:
        rule = "(channels, height, width) of at least 6x6 pixels"
        raise RootnoiseError(f"input_shape of model cnn must be {rule}, got {shape}")
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


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "logistic": _logistic,
    "mlp": _mlp,
    "cnn": _cnn,
}

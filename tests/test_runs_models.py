"""runs.models: shapes, seeds, the global generator left alone, and per-sample gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn.functional import cross_entropy

from rootnoise._check import RootnoiseError
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import models
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler
from rootnoise.runs.data import Dataset
from rootnoise.runs.trainer import Trainer

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
every_model = pytest.mark.parametrize("name", list(models.MODELS))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Eleven million gradients an example: one shape of the largest model is enough.
CASES = [(name, shape) for name in models.MODELS for shape in SHAPES[: 1 if "18" in name else 3]]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_per_sample_gradients_equal_single_example_backward_passes(
    name: str, shape: tuple[int, ...], batch: int
) -> None:
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (batch,), generator=generator)
    model = models.build(name, shape, 10, seed=1).double()
    wrapped = GradSampleModule(models.build(name, shape, 10, seed=1).double())
    logits = wrapped(inputs)
    assert logits.shape == (batch, 10)
    torch.autograd.backward(cross_entropy(logits, labels))
    for row in range(batch):
        model.zero_grad()
        one = slice(row, row + 1)
        torch.autograd.backward(cross_entropy(model(inputs[one]), labels[one]))
        for own, sampled in zip(model.parameters(), wrapped.parameters(), strict=True):
            assert own.grad is not None
            assert own.grad.abs().max() > 0
            torch.testing.assert_close(sampled.grad_sample[row], own.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "transformer"])
def test_larger_models_take_private_steps(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6)
    data = Dataset("noise", inputs, labels, inputs, labels, n_classes=10)
    config = RunConfig(model=name, epsilon=8.0, epochs=1, batch_size=2, bands=2, lr=1e-3)
    sampler = make_sampler(config, data.n_train)
    mechanism = make_mechanism(config, sampler)
    trainer = Trainer(config, data, sampler, mechanism, Key.from_seed(0))
    before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer.epoch()
    assert trainer.t == 3
    moved = nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before
    # Nearly all of it is noise, of known size in each coordinate. The spread of d > 10^4 samples
    # has a standard error of 0.7 % at most: 5 % is 7 errors.
    expected = np.sqrt(np.square(mechanism_rows(mechanism)).sum()) * config.lr / config.batch_size
    assert moved.std().item() == pytest.approx(expected, rel=0.05)


def mechanism_rows(mechanism: Mechanism) -> np.ndarray:
    """Return the last row of B = A C^-1 times the noise's standard deviation."""
    a = mechanism.workload.matrix.dense()
    decoder = a @ np.linalg.inv(mechanism.strategy.dense())
    return np.asarray(decoder[-1]) * mechanism.noise_std


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("logistic", (1, 28, 28), 784 * 10 + 10),
        ("mlp", (1, 28, 28), 785 * 128 + 129 * 10),
        ("cnn", (1, 28, 28), 26010),
        ("cnn", (1, 8, 8), 160 + 4640 + 4128 + 330),
        ("cnn", (3, 32, 32), 3088 + 8224 + 25632 + 330),
        ("cnn", (1, 6, 20), None),
        ("mlp", (5,), 6 * 128 + 129 * 10),
        # He et al. (2016): 11.7 million, less 0.5 of the 1000 classes; the first layer has a bias.
        ("resnet18", (3, 32, 32), 11_173_962 + 64),
        ("resnet18", (3, 64, 64), 11_173_962 + 64 + 64 * 3 * (49 - 9)),
        ("transformer", (1, 28, 28), 32 * 50 + 16 * 32 + 2 * 8544 + 64 + 16 * 320 + 10),
        ("transformer", (3, 9, 17), 32 * 76 + 2 * 4 * 32 + 2 * 8544 + 64 + 8 * 320 + 10),
        ("transformer", (5,), 64 + 5 * 32 + 2 * 8544 + 64 + 5 * 320 + 10),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], expected: int | None) -> None:
    model = models.build(name, shape, 10, seed=0)
    assert expected in (None, size(model))
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


@every_model
def test_parameters_depend_on_the_seed_alone_and_the_global_generator_does_not_move(
    name: str,
) -> None:
    before = torch.get_rng_state()
    first = models.build(name, (1, 8, 8), 10, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = models.build(name, (1, 8, 8), 10, seed=7).state_dict()
    other = models.build(name, (1, 8, 8), 10, seed=8).state_dict()
    for key, value in first.items():
        assert value.device.type == "cpu"
        assert value.dtype == torch.float32
        assert torch.equal(value, again[key])
        constant = bool((value == value.flatten()[0]).all())  # where a normalisation starts
        assert torch.equal(value, other[key]) == constant


def test_parameters_do_not_depend_on_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        weight = next(models.build("logistic", (3,), 2, seed=0).parameters())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight, next(models.build("logistic", (3,), 2, seed=0).parameters()))


@every_model
def test_initial_parameters_are_uniform_within_one_over_root_fan_in(name: str) -> None:
    for layer in models.build(name, (1, 28, 28), 10, seed=3).modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            assert max(p.abs().max() for p in layer.parameters()) <= bound
            if layer.weight.numel() >= 1000:
                # The spread of 1000 uniform draws has a standard error of 1.4 %: 15 % is 10 errors.
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vgg"}, r"^model must be one of logistic, .*, resnet18, transformer, got 'vgg'$"),
        ({"input_shape": ()}, r"^input_shape must have at least one axis, got \(\)$"),
        ({"input_shape": (1, 0, 8)}, "^input_shape entries must be >= 1, got 0$"),
        ({"input_shape": (64,)}, r"^input_shape of model cnn .* 6x6 pixels, got \(64,\)$"),
        ({"input_shape": (1, 5, 28)}, r"^input_shape of model cnn .* got \(1, 5, 28\)$"),
        ({"name": "resnet18", "input_shape": (1, 7, 8)}, r" resnet18 .* 8x8 .* got \(1, 7, 8\)$"),
        (
            {"name": "transformer", "input_shape": (4, 8)},
            r"^input_shape of model transformer .* or \(features,\), got \(4, 8\)$",
        ),
        ({"n_classes": 1}, "^n_classes must be >= 2, got 1$"),
        ({"seed": -1}, r"^seed must be in \[0, 9223372036854775807\], got -1$"),
        ({"seed": None}, "^seed must be an integer, got None$"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "name": "cnn",
        "input_shape": (1, 8, 8),
        "n_classes": 10,
        "seed": 0,
    }
    with pytest.raises(RootnoiseError, match=message):
        models.build(**(arguments | change))


def test_a_layer_that_could_not_be_initialised_or_mixes_examples_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.MODELS, "bn", lambda _, n_classes: nn.BatchNorm1d(n_classes))
    with pytest.raises(RootnoiseError, match=r"must be Linear, .* got BatchNorm1d$"):
        models.build("bn", (4,), 2, seed=0)

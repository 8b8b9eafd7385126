"""What a run leaves that has taken its last step: result, weights, picture, page and proofs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rootnoise._files import write_whole
from rootnoise.mechanism import Mechanism
from rootnoise.participation.ledger import Ledger
from rootnoise.runs import curves, inference
from rootnoise.runs.config import RunConfig, claim
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.report import Run, page
from rootnoise.runs.statement import Statement
from rootnoise.runs.trainer import Trainer
from rootnoise.training import PrivateOptimizer


@dataclass(frozen=True)
class Result:
    """The result of a run; privacy fields are None without privacy.

    `accuracy` is on the test set after the last step, `private` says whether `epsilon` is claimed,
    and `seconds` is the training time over all resumptions; None for the best of several trials,
    whose times are secret.
    """

    dataset: str
    model: str
    mechanism: str
    sampling: str
    accuracy: float
    private: bool
    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    clip_norm: float | None
    sensitivity: float | None
    rmse: float | None
    n_steps: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    decay: float
    bands: int | None
    memory_rows: int | None
    seconds: float | None
    claim: str
    out: str


@dataclass(frozen=True, eq=False)
class Trained:
    """A run after its last step, without what is large: its noise and its data.

    Attributes:
        config: its settings.
        mechanism: None without privacy.
        history: its evaluations.
        weights: of the plain model, on the CPU.
        about: which model that is.
        ledger: who took part; None without privacy.
        n_steps: steps.
        memory_rows: noise vectors of the model's size that it kept.
    """

    config: RunConfig
    mechanism: Mechanism | None
    history: Sequence[Mapping[str, Any]]
    weights: Mapping[str, torch.Tensor]
    about: Mapping[str, str]
    ledger: Ledger | None
    n_steps: int
    memory_rows: int | None

    @classmethod
    def of(cls, config: RunConfig, trainer: Trainer) -> Trained:
        """Return what a trainer leaves; all ranks call this, since each may hold some weights."""
        ledger, rows, optimizer = None, None, trainer.optimizer
        if isinstance(optimizer, PrivateOptimizer):
            ledger, rows = optimizer.ledger, optimizer.stream.memory_rows
        return cls(
            config,
            trainer.mechanism,
            trainer.history,
            trainer.weights(),
            inference.about(config, trainer.data.input_shape, trainer.data.n_classes),
            ledger,
            trainer.sampler.n_steps,
            rows,
        )

    def result(self, out: Path) -> Result:
        """Return the content of result.json in the folder `out`."""
        config, last, mechanism = self.config, self.history[-1], self.mechanism
        return Result(
            dataset=config.dataset,
            model=config.model,
            mechanism=config.mechanism,
            sampling=config.sampling,
            accuracy=last["test_accuracy"],
            private=mechanism is not None and config.insecure_noise_seed is None,
            epsilon=mechanism.epsilon if mechanism else None,
            delta=mechanism.delta if mechanism else None,
            noise_multiplier=mechanism.noise_multiplier if mechanism else None,
            clip_norm=mechanism.clip_norm if mechanism else None,
            sensitivity=mechanism.sensitivity.value if mechanism else None,
            rmse=mechanism.rmse if mechanism else None,
            n_steps=self.n_steps,
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.learning_rate,
            momentum=config.momentum,
            decay=config.decay,
            bands=mechanism.strategy.bands if mechanism else None,
            memory_rows=self.memory_rows,
            seconds=last["seconds"],
            claim=claim(config, mechanism),
            out=str(out),
        )

    def release(self, folder: RunFolder, stated: Statement, report: bool) -> Result:
        """Write all of it to the folder of the run, and delete the secrets there.

        Args:
            folder: of the run; its ledger is there.
            stated: the privacy statement of the run's beginning.
            report: also write report.html.
        """
        config, result = self.config, self.result(folder.path)
        title = f"{config.mechanism} on {config.dataset}"
        curve = [entry["test_accuracy"] for entry in self.history]
        curves.learning_curves(folder.path / "curves.png", {config.mechanism: [curve]}, title)
        if report:
            self._report(folder, stated, result)
        folder.finish(self.weights, self.about, asdict(result), stated, self.ledger)
        return result

    def _report(self, folder: RunFolder, stated: Statement, result: Result) -> None:
        """Write the page, or warn: no picture is worth a run that cannot end."""
        name = folder.path.resolve().name
        made = Run(name, self.config, stated, self.mechanism, self.history, asdict(result))
        try:
            text = page(made)
        except Exception as reason:  # noqa: BLE001 - whatever it was, the run is whole
            line = " ".join(f"{reason}".split())
            warnings.warn(
                f"report.html is left out ({line:.120}): rootnoise report may say more",
                stacklevel=2,
            )
        else:
            write_whole(folder.path / "report.html", text.encode())

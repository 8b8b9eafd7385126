"""One training run: refuse what does not fit, train, and keep its folder.

Reported are accuracies on the test set alone. Loss and accuracy on the training set are computed
from the raw data, and epsilon does not cover them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rootnoise._check import integer
from rootnoise.lab import plots
from rootnoise.lab.checkpoint import RunFolder
from rootnoise.lab.config import RunConfig, claim, make_key, make_mechanism, make_sampler
from rootnoise.lab.data import load
from rootnoise.lab.privacy import Statement, statement
from rootnoise.lab.trainer import OnStep, Trainer
from rootnoise.training import PrivateOptimizer


@dataclass(frozen=True)
class Result:
    """What a run gives; None where there is no privacy.

    `accuracy` is on the test set after the last step, `private` says whether `epsilon` is claimed,
    and `seconds` is the time of training, over all resumptions.
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
    seconds: float
    claim: str
    out: str


def run(
    config: RunConfig,
    out: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Train and evaluate, or continue to; all that can be refused is refused before `out` is made.

    Args:
        config: dataset, model and mechanism by name: those of `factorize`, dpsgd (independent noise
            under Poisson sampling), or none (no clipping, no noise). With sampling "auto", dpsgd
            samples by Poisson and everything else runs in fixed cycles. `seed` fixes the order of
            the data and the first weights. Noise comes from OS entropy, unless
            `insecure_noise_seed` makes it repeatable, and then no privacy is claimed.
        out: a new or empty folder; `lab.checkpoint` lists its files.
        data_dir: where the data set's files are.
        resume: continue the unfinished run in `out`, with the same config.
        checkpoint_every: steps between two checkpoints; there is one after each epoch anyway.
        on_step: called after every step.

    Raises:
        RootnoiseError: settings that do not fit each other, the data or the folder.
    """
    if checkpoint_every is not None:
        integer("checkpoint_every", checkpoint_every, 1)
    plots.check()
    with RunFolder(out) as folder:
        trainer, stated = _begin(config, folder, data_dir, resume)
        folder.write_metrics(trainer.history)
        while trainer.t < trainer.sampler.n_steps:
            trainer.epoch(on_step, checkpoint_every)
            folder.save_checkpoint(trainer.state_dict())
            folder.write_metrics(trainer.history)
        title = f"{config.mechanism} on {config.dataset}"
        curve = [entry["test_accuracy"] for entry in trainer.history]
        plots.learning_curves(folder.path / "curves.png", {config.mechanism: [curve]}, title)
        optimizer = trainer.optimizer
        ledger = optimizer.ledger if isinstance(optimizer, PrivateOptimizer) else None
        result = _result(config, trainer, folder.path)
        weights = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
        folder.finish(weights, asdict(result), stated, ledger)
    return result


def _begin(
    config: RunConfig, folder: RunFolder, data_dir: Path | None, resume: bool
) -> tuple[Trainer, Statement]:
    """Return the new or resumed run, its checkpoint on disk, and what it states."""
    settings = asdict(config)
    folder.reopen(settings) if resume else folder.refuse_used()
    data = load(config.dataset, data_dir)
    sampler = make_sampler(config, data.n_train)
    private = config.mechanism != "none"
    mechanism = folder.mechanism() if resume and private else make_mechanism(config, sampler)
    key = None
    if private:
        key = folder.key() if resume else make_key(config)
    stated = folder.statement() if resume else statement(config, sampler, mechanism, key)
    trainer = Trainer(config, data, sampler, mechanism, key)
    if resume:
        trainer.load_state_dict(folder.checkpoint())
    else:
        folder.create(settings, stated, mechanism, key, trainer.state_dict())
    if isinstance(trainer.optimizer, PrivateOptimizer):
        trainer.optimizer.ledger.keep(folder.path / "ledger.bin")
    return trainer, stated


def _result(config: RunConfig, trainer: Trainer, out: Path) -> Result:
    optimizer, last = trainer.optimizer, trainer.history[-1]
    rows, mechanism = None, None
    if isinstance(optimizer, PrivateOptimizer):
        rows, mechanism = optimizer.stream.memory_rows, optimizer.mechanism
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
        n_steps=trainer.sampler.n_steps,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        momentum=config.momentum,
        decay=config.decay,
        bands=mechanism.strategy.bands if mechanism else None,
        memory_rows=rows,
        seconds=last["seconds"],
        claim=claim(config, mechanism),
        out=str(out),
    )

"""One training run: check its settings, train, and keep its folder.

Only accuracies on the test set are reported. Loss and accuracy on the training set would be
computed from raw data, and epsilon would not cover them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rootnoise._check import RootnoiseError, integer
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.participation.ledger_file import Journal, pack
from rootnoise.runs import curves
from rootnoise.runs.config import (
    OPTIONS,
    RunConfig,
    make_key,
    make_mechanism,
    make_sampler,
    planned,
)
from rootnoise.runs.data import load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.release import Result, Trained
from rootnoise.runs.statement import Statement, begun, refuse_other, statement
from rootnoise.runs.trainer import OnStep, Trainer
from rootnoise.training import PrivateOptimizer
from rootnoise.training.ranks import Ranks

# Called when a checkpoint is on disk: what depends on the steps so far may be shown from then on.
OnCheckpoint = Callable[[Trainer], None]


def run(
    config: RunConfig,
    out: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    report: bool = False,
    ranks: Ranks | None = None,
    fsdp: bool = False,
) -> Result:
    """Train and evaluate, or resume a run; invalid settings are refused before `out` is created.

    Args:
        config: dataset, model and mechanism by name. Mechanisms are those of `factorize`, dpsgd
            (independent noise under Poisson sampling), none (no clipping, no noise), and auto (what
            a plan for the data set recommends, which the folder's settings then name). With
            sampling "auto", dpsgd uses Poisson sampling and all others fixed cycles. `seed` fixes
            the order of the data and the initial weights. Noise comes from OS entropy, unless
            `insecure_noise_seed` makes it repeatable, and then no privacy is claimed. Of lr auto
            the folder's settings have the number.
        out: a new or empty folder; `runs.folder` lists its files.
        data_dir: folder of the data set's files [default: that of `config`, or of the run in
            `out`]. A resumed run accepts any folder that holds the same training set.
        resume: continue the unfinished run in `out`, with the same config.
        checkpoint_every: steps between two checkpoints; there is always one after each epoch.
        on_step: called after every step.
        on_checkpoint: called with the trainer when a checkpoint is on disk: what it tells may be
            shown.
        report: also write report.html (`runs.report`), in about two seconds.
        ranks: the processes of the run, each of which calls this; rank 0 alone uses the folder, and
            the result is its. The number may change when the run is resumed.
        fsdp: cut the parameters over the ranks; this may change too.

    Raises:
        RootnoiseError: settings that do not fit together, or do not fit the data or the folder, or
            that differ between ranks.
    """
    ranks = ranks or Ranks()
    how = {"data_dir": data_dir, "resume": resume, "fsdp": fsdp}
    ranks.all_same(how | {"checkpoint_every": checkpoint_every} | asdict(config))
    if config.tuning is not None and config.tuning.number is not None:
        rule = "run must be one run, and the best of several trials is made by rootnoise tune"
        raise RootnoiseError(f"{rule}, got {config.tuning.number}")
    if checkpoint_every is not None:
        integer("checkpoint_every", checkpoint_every, 1)
    curves.check()
    with RunFolder(out) as folder:
        config, trainer, stated = _begin(config, folder, data_dir, resume, ranks, fsdp)
        try:
            return _to_the_end(
                config,
                folder,
                trainer,
                stated,
                checkpoint_every,
                on_step,
                on_checkpoint,
                report,
                ranks,
            )
        except OSError as reason:
            name = Path(reason.filename).name if reason.filename else str(folder.path)
            rule, got = f"{name} must be writable", reason.strerror
        except RootnoiseError as reason:
            # Only the error of a ledger that cannot be written is rephrased.
            if not isinstance(reason.__context__, OSError) and "full disk" not in str(reason):
                raise
            rule, got = "ledger.bin must be writable", str(reason).rsplit(": ", 1)[-1]
        raise RootnoiseError(
            f"{rule}, got {got}; the last checkpoint is whole: make room and {folder.resume}"
        )


def stored(out: Path, given: Mapping[str, Any]) -> RunConfig:
    """Return the settings of the unfinished run in `out`.

    Args:
        out: its folder.
        given: settings by name, which must equal those of the run.

    Raises:
        RootnoiseError: no unfinished run, one with a changed file, or one with other settings.
    """
    with RunFolder(out) as folder:
        folder.reopen(given)
        return RunConfig(**folder.config())


def without_choice(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that a plan chooses, or that are auto, to compare on resume."""
    auto = {name for name in ("mechanism", "sampling", "lr") if settings.get(name) == "auto"}
    chosen = {*OPTIONS, "groups", "separation", "memory_rows"} if "mechanism" in auto else set()
    return {name: value for name, value in settings.items() if name not in auto | chosen}


def _to_the_end(
    config: RunConfig,
    folder: RunFolder,
    trainer: Trainer,
    stated: Statement,
    every: int | None,
    on_step: OnStep | None,
    on_checkpoint: OnCheckpoint | None,
    report: bool,
    ranks: Ranks,
) -> Result:
    """Train to the end; rank 0 alone changes the folder, and the others wait for it."""
    first = ranks.rank == 0
    if first:
        folder.write_metrics(trainer.history)
    while trainer.t < trainer.sampler.n_steps:
        trainer.epoch(on_step, every)
        state = trainer.state_dict()

        def commit(state: Any = state) -> None:
            folder.save_checkpoint(state)
            folder.write_metrics(trainer.history)

        ranks.by_first(commit)  # before any rank tells of these steps
        if on_checkpoint is not None:
            on_checkpoint(trainer)
    trained = Trained.of(config, trainer)
    return trained.release(folder, stated, report) if first else trained.result(folder.path)


def _begin(
    config: RunConfig,
    folder: RunFolder,
    data_dir: Path | None,
    resume: bool,
    ranks: Ranks,
    fsdp: bool,
) -> tuple[RunConfig, Trainer, Statement]:
    """Return the new or resumed run, whose checkpoint is on disk, and its privacy statement.

    The settings returned are the run's own: of what is auto, what the plan chose. Rank 0 reads
    the folder, plans, makes the mechanism, and tells the others.
    """
    settings = asdict(config)
    known = settings.pop("data_dir")

    def enter() -> Any:
        if not resume:
            folder.refuse_used()
            return data_dir or known
        folder.reopen(without_choice(settings))
        return data_dir or known or folder.config().get("data_dir")

    where = ranks.by_first(enter)
    data = load(config.dataset, where and Path(where))
    config = _chosen(config, folder, resume, data.n_train, ranks)
    if not resume:
        settings = asdict(config) | {"data_dir": where and str(Path(where).resolve())}
    sampler = make_sampler(config, data.n_train)
    sampler.load_state_dict(ranks.first(sampler.state_dict()))
    private = config.mechanism != "none"

    def make() -> tuple[Mechanism | None, Key, Statement]:
        mechanism = folder.mechanism() if resume and private else make_mechanism(config, sampler)
        key = folder.key() if resume else make_key(config)
        if not resume:
            return mechanism, key, statement(config, sampler, mechanism, key)
        stated = folder.statement()
        refuse_other(stated, config, sampler, mechanism, key)
        return mechanism, key, stated

    mechanism, key, stated = ranks.by_first(make)
    trainer = Trainer(config, data, sampler, mechanism, key, ranks, fsdp)
    if resume:
        trainer.load_state_dict(ranks.by_first(folder.checkpoint))
        if stated != begun(stated) and trainer.t < sampler.n_steps:
            rule = "privacy.json must not be of a run that has ended"
            raise RootnoiseError(f"{rule}, got step {trainer.t} of {sampler.n_steps}")
    else:
        state = trainer.state_dict()
        ranks.by_first(lambda: folder.create(settings, stated, mechanism, key, state))
    if isinstance(trainer.optimizer, PrivateOptimizer) and ranks.rank == 0:
        path = folder.path / "ledger.bin"
        trainer.optimizer.ledger.keep(path)
        if resume:
            _refuse_other_future(path, trainer)
    return config, trainer, stated


def _chosen(
    config: RunConfig, folder: RunFolder, resume: bool, n_examples: int, ranks: Ranks
) -> RunConfig:
    """Return the settings of the run: of what is auto, what is planned, or was when it began."""
    if "auto" not in (config.mechanism, config.lr):
        return config
    return ranks.by_first(  # type: ignore[no-any-return]
        lambda: RunConfig(**folder.config()) if resume else planned(config, n_examples)
    )


def _refuse_other_future(path: Path, trainer: Trainer) -> None:
    """Refuse a ledger whose steps past the checkpoint differ from those that will be repeated.

    A crash between two checkpoints leaves such steps. Since a checkpoint is written at the end of
    each epoch, before the next one begins, a ledger that reaches into a later epoch belonged to a
    later checkpoint.
    """
    journal, sampler, t = Journal(path), trainer.sampler, trainer.t
    later = islice(journal.records(), t, None)  # `keep` has compared those before
    for step, record in enumerate(later, t):
        if step >= trainer.epoch_end:
            raise RootnoiseError(
                f"checkpoint.pt must be the last one of the run, got step {t} where ledger.bin "
                f"holds step {step} of a later epoch"
            )
        if record != pack(sampler.batch(step)):
            raise RootnoiseError(f"ledger.bin must hold the run's own batches, got others {path}")

"""Private trials of which the best is released, or trials on public data: `rootnoise tune`.

The conditions are those of the page Tuning of the documentation. Until the best trial is known,
nothing of any trial leaves the memory of this process: no file, no line, no warning, no number. So
there is nothing to delete, and a stop of any kind releases nothing. What is written then is of the
best trial alone, in new files, without times.
"""

from __future__ import annotations

import gc
import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise._files import lock
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.runs import curves
from rootnoise.runs.config import RunConfig, make_mechanism, make_sampler, planned
from rootnoise.runs.data import Dataset, load
from rootnoise.runs.folder import RunFolder
from rootnoise.runs.processes import launched
from rootnoise.runs.release import Result, Trained
from rootnoise.runs.statement import statement
from rootnoise.runs.trainer import Trainer
from rootnoise.runs.tuning import marker, starting_over

# Called after each trial on public data with their number so far, how many there will be, the test
# accuracy, and the point.
OnTrial = Callable[[int, int, float, dict[str, Any]], None]


def release_best(
    config: RunConfig, out: Path, *, data_dir: Path | None = None, report: bool = False
) -> Result | None:
    """Make a random, secret number of private trials, and write the best one to `out`.

    Each trial has a key of its own, and trains at a point of `config.tuning` that is drawn without
    looking at the data. The best is that of the highest accuracy on the test part; ties go to the
    earlier point of the grid, then to the larger hash of the weights. What can be refused is
    refused before the first trial; then errors and warnings are not shown, for they might tell of
    a trial that is not released.

    Args:
        config: the settings of a run; its `tuning` says what is tried, and how often.
        out: a new or empty folder. Beside it `marker(out)` says that a tuning has begun; it goes
            when the best trial is in `out`.
        data_dir: folder of the data set's files [default: that of `config`].
        report: also write report.html.

    Returns:
        The result, whose epsilon is that of the tuning; None if no trial was made, which a Poisson
        number allows: that costs the same epsilon.

    Raises:
        RootnoiseError: settings that do not fit together, the data or the folder; a tuning that
            began here and did not end; a trial that failed.
    """
    number = None if config.tuning is None else config.tuning.number
    if number is None:
        raise RootnoiseError("tuning must have private trials, got none")
    _refuse_several()
    where = data_dir or (Path(config.data_dir) if config.data_dir else None)
    out = Path(out)
    curves.check()
    RunFolder(out).refuse_used()
    _refuse_unended(out)
    data = load(config.dataset, where)
    config = replace(config, data_dir=None if where is None else str(where.resolve()))
    points = _points(config, data.n_train)
    Trainer(*points[0].parts(data))  # shows what is refused or warned of
    with _begun(out):
        best = _best(points, data, number.draw())
        if best is None:
            return None
        result = _write(best, out, report)
        marker(out).unlink(missing_ok=True)
    return result


def chosen_on_public(config: RunConfig, on_trial: OnTrial | None = None) -> RunConfig:
    """Try every point once on the public data of `config.tuning`, and return the best settings.

    Trials train as the private run will, with its noise, on the other data; keys are fresh. Ties go
    to the earlier point. The private data set is not looked at.

    Args:
        config: the settings of the private run.
        on_trial: called after each trial.

    Raises:
        RootnoiseError: settings without public data, or that do not fit these.
    """
    tuning = config.tuning
    if tuning is None or tuning.public is None:
        raise RootnoiseError("tuning must name public data, got none")
    _refuse_several()
    folder = tuning.public_dir
    data = load(tuning.public, None if folder is None else Path(folder))
    values = list(tuning.points())
    best, most = config, -1.0
    for i, point in enumerate(values, 1):
        tried = replace(config, **point)
        alone = replace(tried, dataset=tuning.public, tuning=None)
        trained = _Point.of(alone, data.n_train).train(data).trained
        accuracy = float(trained.history[-1]["test_accuracy"])
        if on_trial is not None:
            on_trial(i, len(values), accuracy, point)
        if accuracy > most:
            best, most = tried, accuracy
    return best


def _refuse_several() -> None:
    """Refuse a process of several, each of which would make trials of its own."""
    if launched():
        raise RootnoiseError("tuning must be in one process, got one that a launcher has started")


@dataclass(frozen=True, eq=False)
class _Point:
    """A point of the grid, ready to be tried."""

    config: RunConfig
    mechanism: Mechanism | None
    place: int = 0

    @classmethod
    def of(cls, config: RunConfig, n_examples: int) -> _Point:
        config = planned(config, n_examples)
        return cls(config, make_mechanism(config, make_sampler(config, n_examples)))

    def parts(self, data: Dataset) -> tuple[RunConfig, Dataset, Any, Mechanism | None, Key]:
        """Return what a trainer takes, with a fresh key."""
        sampler = make_sampler(self.config, data.n_train)
        return self.config, data, sampler, self.mechanism, Key.fresh()

    def train(self, data: Dataset) -> _Trial:
        parts = self.parts(data)
        trainer = Trainer(*parts)
        while trainer.t < trainer.sampler.n_steps:
            trainer.epoch()
        trained = Trained.of(self.config, trainer)
        # How long it took tells which trial it was: the first, say, loads more.
        history = [dict(entry) | {"seconds": None} for entry in trained.history]
        return _Trial(replace(trained, history=history), parts[-1], self.place)


@dataclass(frozen=True, eq=False)
class _Trial:
    trained: Trained
    key: Key
    place: int

    @cached_property
    def merit(self) -> tuple[float, int, str]:
        """What trials are ordered by: a function of the release alone."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.trained.weights.items()):
            digest.update(name.encode())
            digest.update(weight.contiguous().numpy().tobytes())
        return self.trained.history[-1]["test_accuracy"], -self.place, digest.hexdigest()


def _points(config: RunConfig, n_examples: int) -> list[_Point]:
    """Return every point, checked; the noise multiplier is the same at all of them."""
    made: dict[tuple[float, ...], _Point] = {}
    points = []
    assert config.tuning is not None  # noqa: S101 - checked by the caller
    for place, values in enumerate(config.tuning.points()):
        tried = replace(config, **values)
        if isinstance(tried.lr, str):  # an advised rate depends on all values
            known = tuple(values.values())
        else:  # what the workload is made of, and so the factorization
            known = (tried.momentum, tried.decay, tried.lr * tried.weight_decay)
        if known not in made:
            made[known] = _Point.of(tried, n_examples)
        like = made[known]
        mechanism = like.mechanism
        assert mechanism is not None  # noqa: S101 - RunConfig refuses trials without privacy
        chosen = replace(like.config, **values)
        points.append(_Point(chosen, replace(mechanism, clip_norm=tried.clip_norm), place))
    _refuse_unlike([point.mechanism for point in points])
    return points


def _refuse_unlike(mechanisms: list[Mechanism | None]) -> None:
    """Refuse trials that are not alike in what private selection supposes of them."""
    alike = {
        (m.noise_multiplier, m.participation, m.delta, m.n_steps, m.trials)
        for m in mechanisms
        if m is not None
    }
    if len(alike) != 1:
        raise RootnoiseError(f"trials must have one noise multiplier, got {len(alike)} mechanisms")


def _best(points: list[_Point], data: Dataset, n_trials: int) -> _Trial | None:
    """Return the best of so many trials, None of none; nothing is shown meanwhile."""
    best: _Trial | None = None
    failed = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(n_trials):
            try:
                trial = secrets.choice(points).train(data)
                if best is None or trial.merit > best.merit:
                    best = trial
            except Exception:  # noqa: BLE001 - its line may tell of the data
                failed = True
                break
            del trial
            gc.collect()  # wrapped models have cycles, and hold the weights
    if failed:  # raised here, so that no traceback leads to the reason
        raise RootnoiseError(
            "trials must all end, got one that failed; its reason may depend on the data and is "
            "not shown (train one point of the grid on other data to see it)"
        )
    return best


def _write(best: _Trial, out: Path, report: bool) -> Result:
    """Write the folder of the best trial, whole or not at all."""
    trained, existed = best.trained, out.is_dir()
    config, mechanism, ledger = trained.config, trained.mechanism, trained.ledger
    assert mechanism is not None  # noqa: S101
    assert ledger is not None  # noqa: S101
    sampler = make_sampler(config, ledger.n_examples)  # of a fixed cycle: the seed says all of it
    stated = statement(config, sampler, mechanism, best.key)
    with RunFolder(out) as folder:
        folder.take()
        try:
            folder.describe(asdict(config), stated, mechanism, trained.history)
            ledger.write_again(out / "ledger.bin", map(sampler.batch, range(sampler.n_steps)))
            return trained.release(folder, stated, report)
        except BaseException as reason:
            whole = out.resolve()  # a link to a folder is no folder to remove
            shutil.rmtree(whole, ignore_errors=True)
            if existed:
                whole.mkdir(exist_ok=True)
            if isinstance(reason, OSError):
                got = f"{reason.strerror}, and nothing is released"
                raise RootnoiseError(f"out must be writable, got {out}: {got}") from None
            raise


@contextmanager
def _begun(out: Path) -> Iterator[None]:
    """Leave a mark that only a release removes, and keep other tunings out."""
    path = marker(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as reason:
        if path.exists():
            _refuse_unended(out)
            raise _in_use(out) from None  # until now
        raise RootnoiseError(f"out must be writable, got {path}: {reason.strerror}") from None
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _refuse_unended(out: Path) -> None:
    """Refuse a place where a tuning began that did not end, or that goes on."""
    path = marker(out)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as reason:
        raise RootnoiseError(f"out must be writable, got {path}: {reason.strerror}") from None
    try:
        if not lock(descriptor):
            raise _in_use(out)
    finally:
        os.close(descriptor)
    rule = "out must be of no tuning that began and released nothing"
    raise RootnoiseError(f"{rule}, got {out}: {starting_over(out)}")


def _in_use(out: Path) -> RootnoiseError:
    return RootnoiseError(f"out must not be in use by another tuning, got {out}")

"""Private training in a grid of methods and budgets, each at its own best learning rate.

The protocol is the same for every method. Learning rates are powers of two. Starting from that of
the method's previous cell, the rate is doubled or halved as long as the mean accuracy on the test
set grows, on seeds from `TUNING_SEED` on, which no table reports. Then the seeds 0, 1, ... are
trained at the best rate. Noise comes from the seed too, so that tables can be reproduced; hence
none of these models may be released.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from parts.methods import METHODS
from parts.part import Report
from parts.studies import Study
from rootnoise import Mechanism, RootnoiseError
from rootnoise.runs.config import RunConfig, make_key, make_mechanism, make_sampler
from rootnoise.runs.data import Dataset, load
from rootnoise.runs.trainer import Trainer

TUNING_SEED = 1000
# Most learning rates tried per cell.
TRIES = 7


class Grid:
    """Appends each run of a study to a file as one JSON object, and skips runs already in it.

    `on_run` is called after each run with the number of runs done, the least number in the study,
    and a label.
    """

    def __init__(
        self,
        path: Path,
        data_dir: Path | None = None,
        on_run: Report | None = None,
        device: str = "cpu",
    ) -> None:
        self.path, self._data_dir, self._on_run, self._device = path, data_dir, on_run, device
        runs = read(path)
        self._done = {RunConfig(**run["config"]): run for run in runs}
        self._told = {(run["method"], RunConfig(**run["config"])) for run in runs}

    def run(self, study: Study) -> None:
        """Tune and train every cell of a study that is not yet in the file."""
        exponents = {method: METHODS[method].start for method in study.methods}
        cells = list(study.cells(self._device))
        self._least = len(cells) * len(study.methods) * (3 * study.tuning + study.seeds)
        self._count = 0
        for cell in cells:
            n_examples = find_data(cell.dataset, self._data_dir).n_train
            rates: dict[RunConfig, int] = {}  # the planner's choice may be another method
            for method in study.methods:
                own = METHODS[method].settled(cell, n_examples)
                if own not in rates:
                    rates[own] = self._tune(study, method, own, exponents[method])
                exponents[method] = rates[own]
                for seed in range(study.seeds):
                    self._accuracy(study, method, own, rates[own], seed)

    def _tune(self, study: Study, method: str, cell: RunConfig, start: int) -> int:
        tried = {start: self._tried(study, method, cell, start)}
        while True:
            best = min(tried, key=lambda e: (-tried[e], e))
            new = [e for e in (best - 1, best + 1) if e not in tried]
            if not new or len(tried) >= TRIES:
                return best
            tried[new[0]] = self._tried(study, method, cell, new[0])

    def _tried(self, study: Study, method: str, cell: RunConfig, exponent: int) -> float:
        """Return the mean accuracy on the tuning seeds."""
        seeds = range(TUNING_SEED, TUNING_SEED + study.tuning)
        found = [self._accuracy(study, method, cell, exponent, seed) for seed in seeds]
        return sum(found) / study.tuning

    def _accuracy(
        self, study: Study, method: str, cell: RunConfig, exponent: int, seed: int
    ) -> float:
        """Return the final test accuracy of one run, from the file if it is there.

        A run that another method has made is told again under this one's name.
        """
        config = replace(cell, lr=2.0**exponent, seed=seed, insecure_noise_seed=seed)
        made = self._done.get(config)
        if (method, config) not in self._told:
            label = {"study": study.name, "method": method, "config": asdict(config)}
            made = (made or self._train(config)) | label
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as lines:
                lines.write(json.dumps(label | made) + "\n")
            self._told.add((method, config))
            self._done[config] = made
        self._count += 1
        if self._on_run is not None:
            said = f"{study.name}, epsilon {cell.epsilon:g}, {method}"
            self._on_run(self._count, max(self._least, self._count), said)
        return float(self._done[config]["accuracy"])

    def _train(self, config: RunConfig) -> dict[str, Any]:
        start = time.process_time()
        data = find_data(config.dataset, self._data_dir)
        sampler = make_sampler(config, data.n_train)
        plain = replace(config, lr=1.0, seed=0, insecure_noise_seed=0, device="cpu")
        mechanism = _mechanism(plain, data.n_train)
        trainer = Trainer(config, data, sampler, mechanism, make_key(config))
        for _ in range(config.epochs):
            trainer.epoch()
        return {
            "accuracy": trainer.history[-1]["test_accuracy"],
            "n_steps": sampler.n_steps,
            "sampling": config.sampling,
            "noise_multiplier": mechanism.noise_multiplier,
            "sensitivity": mechanism.sensitivity.value,
            "rmse": mechanism.rmse,
            "cpu_seconds": round(time.process_time() - start, 2),
        }


@lru_cache(maxsize=1)
def find_data(name: str, data_dir: Path | None) -> Dataset:
    """Return a data set, from `data_dir` if it comes in files."""
    return load(name, None if name == "digits" else data_dir)


@lru_cache(maxsize=16)
def _mechanism(config: RunConfig, n_examples: int) -> Mechanism:
    mechanism = make_mechanism(config, make_sampler(config, n_examples))
    if mechanism is None:
        raise RootnoiseError("mechanism must be private in a study, got none")
    return mechanism


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file, in order; none if it is missing.

    Raises:
        RootnoiseError: a line that is not a run.
    """
    if not path.exists():
        return []
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            run = json.loads(line)
            run["config"], run["accuracy"] = dict(run["config"]), float(run["accuracy"])
            run["method"] = str(run["method"])
        except (ValueError, KeyError, TypeError):
            raise RootnoiseError(f"{path} line {number} must be a run, got {line:.60}") from None
        runs.append(run)
    return runs

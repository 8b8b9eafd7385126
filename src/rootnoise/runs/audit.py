"""The audit of a run's folder: everything that it claims, recomputed from its files.

There are two lines of defence. First, every file must be as it was when the run ended, by the seal
and a hash of each. Second, what the files say must be true: each number is recomputed by a second
route (`auditing.recompute`), and the ledger is replayed person by person (`auditing.replay`). The
first finds any careless edit, the second a consistent one that makes the privacy look better.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootnoise._check import RootnoiseError
from rootnoise.auditing import recompute
from rootnoise.auditing.replay import Replay, replay
from rootnoise.bounds import certificate
from rootnoise.mechanism import Mechanism
from rootnoise.runs import rebuilt, settings_file, statement
from rootnoise.runs.checks import Check, fields, ranged, same
from rootnoise.runs.config import RunConfig, claim
from rootnoise.runs.folder import SECRETS, RunFolder
from rootnoise.runs.settings import as_of_today
from rootnoise.runs.statement import Statement

if TYPE_CHECKING:
    from rootnoise.auditing.empirical import Verdict

# Relative difference allowed between sums in different orders.
ROUNDING = 1e-7
# Runs of the optimizer that the attacks need: for the noise alone, and for their scores.
ATTACKS = 4
# Largest deviation of the engine's noise, in standard deviations: over 1000 steps chance exceeds 7
# less than once in a million.
NOISE = 7.0

# Settings that result.json repeats.
REPEATED = (
    *("dataset", "model", "mechanism", "sampling", "epochs", "batch_size"),
    *("lr", "momentum", "decay"),
)

# What privacy.json says of the error; `_numbers` looks at each.
ERROR = ("rmse", "lower_bound", "gap")

# What result.json says beside settings and privacy: no other file tells.
MEASURED = ("accuracy", "memory_rows", "seconds", "out")

# Called with the amount of work done, the total, and its unit.
Progress = Callable[[int, int, str], None]


def audit(out: Path, seal: str | None = None) -> list[Check]:
    """Return every check of the run in `out`, whether it holds or fails.

    Args:
        out: the folder of a finished run, its `ledger.bin` included.
        seal: the seal that was noted when the run ended; without it, only edits that make
            `privacy.json` or the numbers inconsistent are found.

    Raises:
        RootnoiseError: the folder does not exist.
    """
    return list(checks(out, seal))


def empirical(
    out: Path, canaries: int = 4000, seed: int = 0, progress: Progress | None = None
) -> list[Check]:
    """Return what attacks on the run's mechanism find; see `auditing.empirical`.

    The real optimizer runs again, on synthetic records; nothing of the run itself is released.

    Args:
        out: the folder of the run.
        canaries: number of synthetic records to attack.
        seed: fixes the attacks.
        progress: called after every step of the attacks.

    Raises:
        RootnoiseError: not the folder of a private run, or a mechanism that cannot be attacked.
    """
    from rootnoise.auditing.attack import Attack
    from rootnoise.auditing.empirical import distinguish, one_run

    # One trial is attacked: what the best of several is not, no attack here can make.
    released = RunFolder(Path(out)).mechanism()
    mechanism = replace(released, trials=None)
    name = "attack" if released.trials is None else "attack on one trial"
    made, total = count(1), ATTACKS * mechanism.n_steps
    report: Progress = progress or (lambda step, steps, what: None)
    on_step = lambda: report(next(made), total, "steps of the attacks")  # noqa: E731
    attack = Attack(mechanism, canaries, seed, on_step=on_step)
    (variance, off), (correlation, far) = attack.variance(), attack.correlation()
    found = [
        Check("noise variance", abs(off) < NOISE, "1", f"{variance:.4f} ({off:+.1f} deviations)"),
        Check("noise correlation", far < NOISE, "0", f"at most {correlation:.3f} ({far:.1f} dev.)"),
    ]
    for verdict in (distinguish(attack), one_run(attack)):
        bound = f"epsilon > {verdict.lower_bound:.3g} ({verdict.detail})"
        found.append(Check(f"{name}: {verdict.audit}", not verdict.refuted, _claim(verdict), bound))
    return found


def _claim(verdict: Verdict) -> str:
    return f"epsilon <= {verdict.claimed:.6g}, refuted wrongly once in {1 / verdict.failure:.0f}"


def checks(out: Path, seal: str | None = None) -> Iterator[Check]:
    """Yield the checks of `audit` one by one, as they are carried out."""
    if not Path(out).is_dir():
        raise RootnoiseError(f"run must be a folder, got {out}")
    yield from _Audit(Path(out), seal).checks()


class _Audit:
    """The files of one run, and what they say."""

    def __init__(self, path: Path, seal: str | None) -> None:
        self.folder, self.seal = RunFolder(path), seal

    def checks(self) -> Iterator[Check]:
        here = self.folder.path
        finished = (here / "result.json").exists() or not (here / "config.json").exists()
        if not finished:
            yield self._unfinished()
        try:
            stated = self.folder.statement()
        except RootnoiseError as reason:
            yield Check("seal", False, "privacy.json is sealed", str(reason))
            return
        found = "matches" if self.seal in (None, stated["seal"]) else f"not {self.seal}"
        yield Check("seal", found == "matches", stated["seal"], found)
        try:
            yield from self._files(stated) if finished else self._bound()
            config = RunConfig(**as_of_today(self._json("config.json")))
            yield from self._settings(config)
            yield from self._finished(stated)
            result = self._json("result.json") if finished else {}
            if config.mechanism == "none":
                yield from self._without_privacy(stated, config)
                if finished:
                    yield _agrees(result, config, None, stated)
                yield from rebuilt.settings(config, stated, None, None)
                return
            mechanism = self.folder.mechanism()
            yield Check("mechanism.json", True, mechanism.fingerprint[:16], "recomputed")
            yield from self._claimed(stated, config, mechanism)
            yield from self._statement(stated, config, mechanism)
            ledger = self.folder.path / "ledger.bin" if finished else None
            yield from rebuilt.settings(config, stated, mechanism, ledger)
            yield from _numbers(mechanism, stated)
            if finished:
                yield _agrees(result, config, mechanism, stated)
                yield from self._ledger(stated, mechanism)
        except (RootnoiseError, KeyError, TypeError, OSError, AttributeError, ValueError) as reason:
            line = " ".join(str(reason).split())
            yield Check("readable", False, "every file is whole", f"{line:.200}")

    def _unfinished(self) -> Check:
        """Say that the run has not ended, and how to resume it."""
        try:
            found = f"unfinished, {self.folder.checkpoint()['optimizer']['t']} steps are saved"
        except (RootnoiseError, KeyError, TypeError):
            found = "unfinished"
        with suppress(RootnoiseError, OSError, ValueError):
            tuning = self._json("config.json").get("tuning") or {}
            if tuning.get("trials") is not None:  # it has no checkpoint, and no second half
                found = "a tuning that was stopped while its best trial was written"
                return Check("finished", False, "result.json", found)
        return Check("finished", False, "result.json", f"{found}; go on by {self.folder.resume}")

    def _bound(self) -> Iterator[Check]:
        """Check an unfinished run's files against its checkpoint."""
        problems = list(self.folder.changed())
        for problem in problems:
            yield Check(problem.split()[0], False, "as the run wrote it", problem)
        if not problems:
            yield Check("files", True, "as the run wrote them", "bound to checkpoint.pt")

    def _files(self, stated: Statement) -> Iterator[Check]:
        """Check that every file is present and unchanged, and that there are no others."""
        vouched: Mapping[str, str] = stated.get("files", {})
        for name in sorted({*vouched, *self.folder.evidence()}):
            path = self.folder.path / name
            found = "missing"
            if path.is_file():
                found = hashlib.sha256(path.read_bytes()).hexdigest()
            expected = vouched.get(name, "not of this run")
            yield Check(name, found == expected, expected[:16], found[:16])
        path = self.folder.path / "privacy.md"
        if not path.is_file():
            yield Check("privacy.md", False, "says the same", "missing")
            return
        same = path.read_bytes() == statement.as_markdown(stated)
        yield Check("privacy.md", same, "says the same", "compared")

    def _settings(self, config: RunConfig) -> Iterator[Check]:
        """Check that people read the same settings in run.toml as the run had."""
        path = self.folder.path / "run.toml"
        if path.exists():  # older runs left none
            said = settings_file.flat(vars(config))
            yield fields("run.toml agrees", settings_file.read(path, tuning=True), said)

    def _finished(self, stated: Statement) -> Iterator[Check]:
        made, n = stated["steps_made"], stated["sampler"]["n_steps"]
        yield same("steps made", made, n)
        left = [name for name in SECRETS if (self.folder.path / name).exists()]
        yield Check("secrets are gone", not left, "deleted", ", ".join(left) or "none left")

    def _claimed(
        self, stated: Statement, config: RunConfig, m: Mechanism | None
    ) -> Iterator[Check]:
        """Check that both files make the run's claim, and that nothing is said beside it."""
        yield same("claim", stated["claim"], claim(config, m))
        text = (self.folder.path / "claim.txt").read_text()
        yield same("claim.txt", text, claim(config, m) + "\n")
        private = m is not None and config.insecure_noise_seed is None
        yield same("private", stated["private"], private)
        others = statement.strange(stated, private=m is not None)
        found = ", ".join(others) or "none other"
        yield Check("entries of privacy.json", not others, "those of a statement", found)

    def _without_privacy(self, stated: Statement, config: RunConfig) -> Iterator[Check]:
        """Check that a run without privacy claims none."""
        yield from self._claimed(stated, config, None)
        names = ("mechanism.json", "ledger.bin")
        left = [name for name in names if (self.folder.path / name).exists()]
        yield Check("no mechanism", not left, "none", ", ".join(left) or "none")

    def _statement(self, stated: Statement, config: RunConfig, m: Mechanism) -> Iterator[Check]:
        """Check that the run's statement follows from its settings and its mechanism."""
        yield same("independence", stated["independence"], statement.INDEPENDENCE)
        error = {name: stated["mechanism"]["error"][name] for name in ERROR}
        said = statement.described(m, with_bound=False) | {"error": error}
        yield fields("privacy.json follows from mechanism.json", stated["mechanism"], said)
        sampler = stated["sampler"]
        chosen = {"delta": m.delta, "clip_norm": m.clip_norm, "batch_size": sampler["batch_size"]}
        yield fields("config.json agrees", vars(config), vars(config) | chosen)
        tried = None if config.tuning is None else config.tuning.number
        if (tried, m.trials) != (None, None):
            yield Check("number of trials", m.trials == tried, f"{m.trials}", f"{tried}")
        yield same("n_steps", sampler["n_steps"], m.n_steps)

    def _ledger(self, stated: Statement, m: Mechanism) -> Iterator[Check]:
        path = self.folder.path / "ledger.bin"
        found: Replay = replay(path, m.participation)
        theirs = {
            "participation": stated["mechanism"]["participation"],
            "n_examples": stated["sampler"]["n_examples"],
            "steps": stated["steps_made"],
            "digest": stated["ledger"],
        }
        ours = {name: found.header[name] for name in ("participation", "n_examples")}
        ours |= {"steps": found.steps, "digest": found.digest}
        yield fields("ledger.bin is this run's", theirs, ours)
        detail = found.broken or f"{found.participations} participations, person by person"
        rule = str(m.participation)
        yield Check("ledger keeps the participation", found.broken is None, rule, detail)
        mode = path.stat().st_mode & 0o777
        yield Check("ledger's mode", mode == 0o600, "600", f"{mode:o}")

    def _json(self, name: str) -> dict[str, Any]:
        fields = json.loads((self.folder.path / name).read_text())
        if not isinstance(fields, dict):
            raise RootnoiseError(f"{name} must hold a JSON object")
        return fields


def _numbers(m: Mechanism, stated: Statement) -> Iterator[Check]:
    """Recompute sensitivity, epsilon, error and lower bound by a second route."""
    claimed = m.sensitivity.value
    sens = recompute.sensitivity_range(m)
    yield ranged("sensitivity", claimed, sens, ROUNDING)
    std = m.noise_multiplier * m.clip_norm * sens.low
    said = stated["mechanism"]
    enough = said["noise_std"] >= std * (1 - ROUNDING)
    yield Check("noise_std", enough, f"{said['noise_std']:.9g}", f">= {std:.9g}")
    costs = {cost["delta"]: cost["epsilon"] for cost in said["privacy"]}
    for delta, found in zip(costs, recompute.epsilon_ranges(m, costs), strict=True):
        yield ranged(f"epsilon at delta {delta:g}", costs[delta], found, ROUNDING)
    error = said["error"]
    dense = m.n_steps <= recompute.DENSE
    found_rmse, how = (recompute.rmse(m), "dense") if dense else (m.rmse, "streamed")
    close = math.isclose(error["rmse"], found_rmse, rel_tol=ROUNDING)
    yield Check("rmse", close, f"{error['rmse']:.9g}", f"{found_rmse:.9g} ({how})")
    bound = error["lower_bound"]
    if m.n_steps > statement.MOST_STEPS:
        yield same("lower bound", bound, None)
    else:
        witness = certificate.lower_bound(m.workload, m.participation)
        proved = certificate.check(witness, m.workload, m.participation)
        # Another machine may stop the ascent at another point, so an equally good bound passes.
        close = bound is not None and math.isclose(bound, proved, rel_tol=1e-6)
        yield Check("lower bound", close, f"{bound}", f"{proved:.9g} (witness)")
    yield same("gap", error["gap"], error["rmse"] / bound - 1 if bound else None)
    known = vars(m).get("optimality")  # the fingerprint leaves it out
    if known is not None:
        yield fields("optimality in mechanism.json", known.to_dict(), error)


def _agrees(
    result: Mapping[str, Any], config: RunConfig, m: Mechanism | None, stated: Statement
) -> Check:
    """Hold what `result.json` says, and no more, to the other files."""
    said = {name: result.get(name) for name in MEASURED}
    said |= {name: getattr(config, name) for name in REPEATED}
    said |= {name: stated[name] for name in ("private", "claim")}
    said |= {
        "epsilon": None if m is None else m.epsilon,
        "delta": None if m is None else m.delta,
        "noise_multiplier": None if m is None else m.noise_multiplier,
        "clip_norm": None if m is None else m.clip_norm,
        "sensitivity": None if m is None else m.sensitivity.value,
        "rmse": None if m is None else m.rmse,
        "bands": None if m is None else m.strategy.bands,
        "n_steps": stated["sampler"]["n_steps"],
    }
    return fields("result.json agrees", result, said)

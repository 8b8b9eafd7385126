"""Runs tests against a changed package, in a forked process that has all else imported already.

A process like this one, with torch, pytest and the like loaded, forks for each run; the child
imports the package anew from a folder that holds the change, so one run costs half a second. What
each test executes is recorded once, by coverage, and kept until the sources or the tests change.
"""

from __future__ import annotations

import compileall
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
RECORDS = ROOT / ".mutations"
HEAVY = (  # what takes long to import and is not of this project
    "cryptography.hazmat.primitives.ciphers",
    "dp_accounting",
    "dp_accounting.pld",
    "hypothesis",
    "lightning.pytorch",
    "matplotlib.pyplot",
    "mpmath",
    "numpy",
    "opacus",
    "rich.progress",
    "scipy.integrate",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.special",
    "scipy.stats",
    "sklearn.datasets",
    "threadpoolctl",
    "torch",
    "torch.distributed.fsdp",
    "transformers",
    "typer",
    "typer.testing",
)
# A processor that others use too, or a run that sleeps, may take this many times its limit.
PATIENCE = 10
CRASH = 99  # exit code of a child in which pytest itself failed
NO_VERDICT = (0, CRASH, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR)
MEMORY = 8 << 30  # bytes: a bug may ask for all there are
_OPTIONS = [
    # Plugins that no test here uses take a third of a run to import.
    *("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio"),
    *("-o", "addopts=--import-mode=importlib"),
    # pytest and hypothesis are imported before it starts.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
]


@dataclass(frozen=True)
class Run:
    """Tests to run on the package with one file changed.

    `done` hears how it ended, and may answer with another run.
    """

    tests: Sequence[str]
    limit: float  # seconds of a processor
    done: Callable[[Outcome], Run | None]
    file: str = ""
    source: str = ""
    record: bool = False


@dataclass(frozen=True)
class Outcome:
    """`failed` names the first test that failed; `code` is that of pytest, or of the signal."""

    code: int
    failed: str
    seconds: float
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def killed(self) -> bool:
        """Whether a test failed, hung or crashed, or could not be imported."""
        return bool(self.failed) and self.code not in NO_VERDICT


def run_all(runs: Iterable[Run], folder: Path, workers: int) -> None:
    """Run each, `workers` at a time, in copies of the package below `folder`."""
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pytest collects garbage five times a run: not all of torch
    free = [_Slot(folder / str(number)) for number in range(workers)]
    busy: list[_Slot] = []
    waiting = iter(runs)
    while True:
        while free and (run := next(waiting, None)) is not None:
            free[-1].start(run)
            busy.append(free.pop())
        if not busy:
            return
        time.sleep(0.005)
        for slot in [slot for slot in busy if slot.ended()]:
            busy.remove(slot)
            free.append(slot)


class _Slot:
    """A copy of the package, and at most one process that tests it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sources = folder, folder / "src"
        shutil.copytree(SOURCES, self._sources, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self._sources, quiet=1)
        self._answer = folder / "answer.json"

    def start(self, run: Run) -> None:
        self._run, self._began = run, time.monotonic()
        self._answer.unlink(missing_ok=True)
        self._write(run.source)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _child(run, self._sources, self._folder)
            finally:
                traceback.print_exc()
                os._exit(CRASH)

    def ended(self) -> bool:
        late = time.monotonic() - self._began > PATIENCE * self._run.limit
        if late:
            self._kill()
        pid, status = os.waitpid(self._pid, 0 if late else os.WNOHANG)
        if pid == 0:
            return False
        self._kill()  # what it started
        if self._run.file:
            self._write((SOURCES / "rootnoise" / self._run.file).read_text())
        seconds = time.monotonic() - self._began
        code = os.waitstatus_to_exitcode(status)
        try:
            answer = json.loads(self._answer.read_text())
        except (OSError, ValueError):
            late = late or code == -signal.SIGXCPU
            answer = {"failed": "time limit" if late else "crash"}
        if not answer["failed"] and code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            answer["failed"] = f"pytest ended with {code}"
        outcome = Outcome(code, answer["failed"], seconds, answer.get("record", {}))
        if following := self._run.done(outcome):
            self.start(following)
        return following is None

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def _write(self, source: str) -> None:
        """Write the file; what is compiled of it goes by seconds and size, which may not change."""
        if self._run.file:
            path = self._sources / "rootnoise" / self._run.file
            path.write_text(source)
            for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
                stale.unlink()


def _child(run: Run, sources: Path, folder: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    # Of a processor, not of the clock: a busy machine must not pass for a test that fails.
    seconds = math.ceil(run.limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with (folder / "log").open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    os.chdir(ROOT)
    sys.path.insert(0, str(sources))
    os.environ |= {"PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1"}
    if run.file:  # a later run must not read what is compiled of this one
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    watcher = _Watcher(sources / "rootnoise", run)
    files = dict.fromkeys(test.split("::")[0] for test in run.tests)
    code = pytest.main([*_OPTIONS, *([] if run.record else ["-x"]), *files], plugins=[watcher])
    (folder / "answer.json").write_text(json.dumps(watcher.answer()))
    sys.stdout.flush()
    os._exit(int(code))


class _Watcher:
    """A plugin: which test failed first and, when it records, what each runs and how long."""

    def __init__(self, package: Path, run: Run) -> None:
        self._order = {test: place for place, test in enumerate(run.tests)}
        self._failed: list[str] = []
        self._seconds: dict[str, float] = {}
        self._package, self._coverage = package, None
        if run.record:
            import coverage

            self._coverage = coverage.Coverage(
                data_file=None, config_file=False, include=[f"{package}/*"], messages=False
            )
            self._coverage.start()

    def _context(self, name: str) -> None:
        if self._coverage is not None:
            self._coverage.switch_context(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._now = item.nodeid
        self._context(self._now)
        try:
            return (yield)
        finally:
            self._context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        """Count what is set up once to every test of the file."""
        if fixturedef.scope != "function":
            self._context("")
        try:
            return (yield)
        finally:
            self._context(self._now)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests chosen, in order. A bug may rename some, which then are not run."""
        if self._coverage is None:
            items[:] = [item for item in items if item.nodeid in self._order]
            items.sort(key=lambda item: self._order[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        took = self._seconds.get(report.nodeid, 0.0) + report.duration
        self._seconds[report.nodeid] = took
        if report.failed:
            self._failed.append(report.nodeid)

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"failed": self._failed[0] if self._failed else ""}
        if self._coverage is not None:
            self._coverage.stop()
            data = self._coverage.get_data()
            good = {t: s for t, s in self._seconds.items() if t not in self._failed}
            number = {test: place for place, test in enumerate(good)}
            lines: dict[str, dict[int, list[int]]] = {}
            for file in data.measured_files():
                runs = {
                    line: sorted({number.get(c, -1) for c in contexts if not c or c in number})
                    for line, contexts in data.contexts_by_lineno(file).items()
                }
                lines[str(Path(file).relative_to(self._package))] = runs
            answer["record"] = {
                "tests": list(good.items()),
                "failed": sorted(set(self._failed)),
                "lines": lines,
            }
        return answer


# ------------------------------------------------------------------------------- what tests execute


class Coverage:
    """Which tests run which lines: one record a file of tests, renewed when it is out of date."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._runs: dict[str, dict[int, set[str]]] = {}
        self._files: dict[str, list[str]] = {}

    def out_of_date(self, files: Iterable[Path]) -> list[Path]:
        return [file for file in files if not _record(file).exists()]

    def renewal(self, file: Path, done: Callable[[Outcome], None]) -> Run:
        """Return the run that records this file of tests."""

        def keep(outcome: Outcome) -> None:
            if outcome.record:
                RECORDS.mkdir(exist_ok=True)
                for old in RECORDS.glob(f"{file.stem}-*"):
                    old.unlink()
                _record(file).write_text(json.dumps(outcome.record))
            done(outcome)

        return Run([str(file.relative_to(ROOT))], 900, keep, record=True)

    def read(self, file: Path) -> None:
        record = json.loads(_record(file).read_text())
        self.failed += record["failed"]
        tests = [test for test, _ in record["tests"]]
        self._files[file.stem] = tests
        self.seconds |= dict(record["tests"])
        for source, lines in record["lines"].items():
            runs = self._runs.setdefault(source, {})
            for line, numbers in lines.items():
                # -1: at import, or in a fixture that its tests share.
                found = tests if -1 in numbers else [tests[number] for number in numbers]
                runs.setdefault(int(line), set()).update(found)

    def tests(self, file: str, lines: Iterable[int]) -> set[str]:
        runs = self._runs.get(file, {})
        return set().union(*(runs.get(line, ()) for line in lines))

    def of(self, names: Iterable[str]) -> set[str]:
        return {test for name in names for test in self._files.get(f"test_{name}", ())}


def _record(file: Path) -> Path:
    digest = hashlib.blake2b(_sources_digest() + file.read_bytes(), digest_size=8).hexdigest()
    return RECORDS / f"{file.stem}-{digest}.json"


@cache
def _sources_digest() -> bytes:
    helpers = [f for f in (ROOT / "tests").glob("*.py") if not f.name.startswith(("test_", "muta"))]
    whole = hashlib.blake2b()
    for file in sorted([*SOURCES.rglob("*.py"), *helpers]):
        whole.update(f"{file.relative_to(ROOT)} ".encode() + file.read_bytes())
    return whole.digest()

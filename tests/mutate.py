"""`make mutations`: plants privacy bugs, one at a time; a test must kill each.

All that were thought of (`mutations.py`), and a seeded sample of those that the grammar gives
(`mutants.py`) in the files on which privacy depends. A bug that lives must be killed by a new
test, or be listed in `equivalent.toml` with the reason why it may live, and is not planted then;
else the command fails.

    python tests/mutate.py                            # the sample: under 30 minutes on two cores
    python tests/mutate.py --all                      # everything, in every file: about an hour
    python tests/mutate.py --all --file noise.py      # all of one file
    python tests/mutate.py --planted --bug "the noise"    # of the list, by words of the description
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mutants import Mutant, mutants
from mutation_runs import ROOT, Coverage, Outcome, Run, run_all
from mutations import MUTATIONS, PACKAGE, Mutation

# The files on which privacy depends: patterns below the package.
PRIVACY = [
    "_check.py",
    "accounting/*.py",
    "auditing/recompute.py",
    "causal/base.py",
    "causal/elementary.py",
    "causal/product.py",
    "training/clip/*.py",
    "federated/clients.py",
    "federated/cohorts.py",
    "federated/server.py",
    "federated/store.py",
    "federated/updates.py",
    "front_door/evaluation.py",
    "front_door/loop.py",
    "front_door/making.py",
    "front_door/saved.py",
    "front_door/several.py",
    "integrations/hugging_face/*.py",
    "integrations/lightning.py",
    "integrations/opacus/*.py",
    "integrations/per_example.py",
    "keys.py",
    "mechanism.py",
    "noise/blockplan.py",
    "noise/engine.py",
    "noise/sources.py",
    "noise/stream.py",
    "participation/kinds.py",
    "participation/ledger.py",
    "participation/ledger_file.py",
    "participation/loader.py",
    "participation/overlaps.py",
    "participation/samplers.py",
    "participation/sensitivity.py",
    "planner/job.py",
    "runs/config.py",
    "runs/folder.py",
    "runs/micro_batches.py",
    "runs/processes.py",
    "runs/rebuilt.py",
    "runs/statement.py",
    "runs/trials.py",
    "training/clipping.py",
    "training/guards.py",
    "training/optimizer.py",
    "training/probe.py",
    "training/ranks.py",
    "training/replicated.py",
    "training/resume.py",
    "training/reuse.py",
    "training/sharded.py",
    "training/tape.py",
    "training/whole.py",
]
SAMPLE = 6  # mutants a file: the first of the same order as in a larger sample
BUDGET = 10.0  # seconds of tests for one mutant: what takes longer to see is not seen
# What several processes run is not recorded: these files of tests are tried last, whole.
PROCESSES = {
    "front_door/saved.py": "front_door_ranks",
    "front_door/several.py": "front_door_ranks",
    "runs/processes.py": "runs_torchrun",
    "training/optimizer.py": "training_parallel",
    "training/ranks.py": "training_parallel front_door_ranks",
    "training/sharded.py": "sharded runs_torchrun",
    "training/whole.py": "front_door_ranks",
}
EQUIVALENT = ROOT / "tests" / "equivalent.toml"


def privacy_files() -> list[str]:
    """Return the files of `PRIVACY`, each pattern fitting at least one."""
    found = []
    for pattern in PRIVACY:
        fits = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.glob(pattern))
        if not fits:
            raise ValueError(f"PRIVACY: no file fits {pattern}")
        found += fits
    return found


def allowed() -> dict[tuple[str, ...], str]:
    """Return why each listed mutant may live, by its identity; (file, function) for all of one."""
    reasons: dict[tuple[str, ...], str] = {}
    for entry in tomllib.loads(EQUIVALENT.read_text())["equivalent"]:
        function = (entry["file"], entry["function"])
        if "mutants" not in entry:
            reasons[function] = entry["reason"]
        for place in entry.get("mutants", []):
            reasons[*function, place["line"], place["change"]] = entry["reason"]
    return reasons


class Campaign:
    """Chooses tests for each bug, runs them, and counts what was killed."""

    def __init__(self, coverage: Coverage, log: TextIO | None, budget: float) -> None:
        self._coverage, self._log, self._budget = coverage, log, budget
        self._allowed = allowed()
        self.counts: dict[str, Counter[str]] = {}
        self.survivors: list[str] = []

    def runs(self, bugs: Sequence[Mutant | Mutation], progress: Progress) -> Iterator[Run]:
        task = progress.add_task("mutants", total=len(bugs))
        for bug in bugs:
            if self._may_live(bug):  # no test need look for what none can find
                self._count(bug, None, progress)
                progress.advance(task)
                continue
            if first := self._judge(bug, progress)(Outcome(0, "no test runs it", 0.0)):
                yield first

    def _judge(self, bug: Mutant | Mutation, progress: Progress) -> Callable[[Outcome], Run | None]:
        """Return what hears how each run of a bug's tests ended, and answers with the next run.

        One for each bug: several are being judged at a time.
        """
        stages = [stage for stage in self._tests(bug) if stage]

        def following(outcome: Outcome) -> Run | None:
            if stages and not outcome.killed:
                tests = stages.pop(0)
                seconds = sum(self._coverage.seconds[test] for test in tests)
                return Run(tests, 4 + 2 * seconds, following, bug.file, _source(bug))
            self._count(bug, outcome, progress)
            progress.advance(progress.task_ids[-1])
            return None

        return following

    def _tests(self, bug: Mutant | Mutation) -> list[list[str]]:
        """Return the tests that may see it, the fastest of all: of one file, then the others.

        The one is the file's own or, failing that, the one with the most of these tests: to import
        all others takes longer than most bugs live.
        """
        seconds = self._coverage.seconds
        if isinstance(bug, Mutation):
            named = self._coverage.of(bug.tests.split())
            text = (PACKAGE / bug.file).read_text()
            line = text[: text.index(bug.old)].count("\n") + 1
            seeing = self._coverage.tests(bug.file, range(line, line + bug.old.count("\n") + 1))
            return [sorted(named, key=lambda test: (test not in seeing, seconds[test]))]
        found = sorted(self._coverage.tests(bug.file, bug.lines), key=lambda test: seconds[test])
        files = Counter(test.split("::")[0] for test in found)
        own = f"tests/test_{Path(bug.file).stem}.py"
        first = own if own in files else max(files, key=lambda file: files[file], default="")
        within: list[str] = []
        left = self._budget
        for test in found:
            if left > 0:
                within.append(test)
                left -= seconds[test]
        near = [test for test in within if test.startswith(f"{first}::")]
        far = [test for test in within if not test.startswith(f"{first}::")]
        others = self._coverage.of(PROCESSES.get(bug.file, "").split()) - set(within)
        return [near, far, sorted(others, key=lambda test: seconds[test])]

    def _may_live(self, bug: Mutant | Mutation) -> bool:
        return isinstance(bug, Mutant) and bool(
            self._allowed.keys() & {bug.identity, bug.identity[:2]}
        )

    def _count(self, bug: Mutant | Mutation, outcome: Outcome | None, progress: Progress) -> None:
        listed = isinstance(bug, Mutation)
        counts = self.counts.setdefault("the list" if listed else bug.file, Counter())
        counts["planted"] += 1
        if outcome is None:
            counts["allowed"] += 1
            how = "allowed"
        elif outcome.killed:
            counts["killed"] += 1
            how = outcome.failed
        else:
            counts["survived"] += 1
            self.survivors.append(str(bug))
            how = "SURVIVED " + outcome.failed
            progress.console.print(f"survived: {bug} {outcome.failed}", markup=False)
        if self._log is not None:
            seconds = outcome.seconds if outcome else 0.0
            self._log.write(f"{seconds:.1f}\t{bug}\t{how}\n")
            self._log.flush()


def _source(bug: Mutant | Mutation) -> str:
    if isinstance(bug, Mutant):
        return bug.source
    return bug.apply((PACKAGE / bug.file).read_text())


def choose(options: argparse.Namespace) -> list[Mutant | Mutation]:
    """Return the bugs to plant, as the options say."""
    bugs: list[Mutant | Mutation] = []
    if options.planted or not options.file:
        bugs += [m for m in MUTATIONS if options.bug in m.bug]
    if options.planted:
        return bugs
    files = privacy_files()
    for file in files:
        named = any(file == name or Path(file).name == name for name in options.file or ())
        if options.file and not named:
            continue
        found = mutants(file, (PACKAGE / file).read_text())
        found.sort(key=lambda mutant: mutant.order(options.seed))
        bugs += found if options.all else found[: options.sample]
    return bugs


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    result.add_argument("--all", action="store_true", help="every mutant, not a sample")
    result.add_argument(
        "--file", action="append", help="only this file of the package (repeatable)"
    )
    result.add_argument("--planted", action="store_true", help="only the list of mutations.py")
    result.add_argument("--bug", default="", help="only bugs of that list that hold these words")
    result.add_argument("--sample", type=int, default=SAMPLE, help="mutants a file")
    result.add_argument("--seed", type=int, default=0, help="which sample")
    result.add_argument("--budget", type=float, default=BUDGET, help="seconds of tests a mutant")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    result.add_argument("--log", type=argparse.FileType("w"), help="write each bug and its killer")
    result.add_argument("--tests", nargs="*", help="only these files of tests, like sensitivity")
    return result


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if any bug lives that may not."""
    options = parser().parse_args(words)
    console = Console()
    bars = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bugs = choose(options)
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    tests = [t for t in tests if t.stem != "test_mutations"]
    if options.tests:
        tests = [t for t in tests if t.stem[5:] in options.tests]
    coverage = Coverage()
    with Progress(*bars, console=console, auto_refresh=False) as progress:
        old = coverage.out_of_date(tests)
        task = progress.add_task("what each test runs", total=len(old))

        def recorded(outcome: Outcome) -> None:
            progress.advance(task)
            progress.refresh()

        with tempfile.TemporaryDirectory() as folder:
            run_all(
                (coverage.renewal(file, recorded) for file in old), Path(folder), options.workers
            )
        for file in tests:
            coverage.read(file)
        for name in coverage.failed:
            progress.console.print(f"fails without any bug, left out: {name}", markup=False)
        campaign = Campaign(coverage, options.log, options.budget)

        def refreshed() -> Iterator[Run]:
            for run in campaign.runs(bugs, progress):
                progress.refresh()
                yield run

        with tempfile.TemporaryDirectory() as folder:
            run_all(refreshed(), Path(folder), options.workers)
    console.print(table(campaign.counts))
    return 1 if campaign.survivors else 0


def table(counts: dict[str, Counter[str]]) -> Table:
    """Return what was planted, killed, allowed and survived, by file."""
    columns = ("planted", "killed", "allowed", "survived")
    result = Table(title="Planted bugs", show_footer=True)
    result.add_column("file", footer="all")
    for name in columns:
        total = sum(count[name] for count in counts.values())
        result.add_column(name, footer=str(total), justify="right")
    for file, count in counts.items():
        result.add_row(file, *(str(count[name]) for name in columns))
    return result


if __name__ == "__main__":
    sys.exit(main())

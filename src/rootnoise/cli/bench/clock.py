"""One clock for all sides, and how a side is asked: one JSON object a line. Standard library alone.

Time is that of the processor over all threads of the process, so that others on the machine do not
count; what they do to caches and to the speed of the clock stays, and is met by asking all sides in
turn, round after round.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "PYTHONWARNINGS": "ignore",
}


def seconds(call: Callable[[], object], least: float = 0.1) -> float:
    """Return the mean processor time of a call, over as many calls as take `least` seconds."""
    calls, start = 0, time.process_time()
    while True:
        call()
        calls += 1
        taken = time.process_time() - start
        if taken >= least:
            return taken / calls


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of one call, and what it returns."""
    start = time.process_time()
    value = call()
    return time.process_time() - start, value


def measured(call: Callable[[], float]) -> dict[str, float]:
    """Return the value of a call and the processor time of its first time: caches help none."""
    taken, value = timed(call)
    return {"value": float(value), "seconds": taken}


def paired(
    plain: Callable[[], object], private: Callable[[], object], steps: int, budget: float = 4.0
) -> dict[str, float]:
    """Return medians of rounds that time a plain call and then `steps` private ones.

    Rounds end with the budget of processor time: five of them, or as many as it has room for.
    """
    times: list[tuple[float, float]] = []
    start = time.process_time()
    while len(times) < 5 and (not times or time.process_time() - start < budget):
        before = seconds(plain)
        since = time.process_time()
        for _ in range(steps):
            private()
        times.append((before, (time.process_time() - since) / steps))
    return {
        "plain": median(a for a, _ in times),
        "seconds": median(b for _, b in times),
        "ratio": median(b / a for a, b in times),
        "rounds": len(times),
    }


def quickest(
    makes: Mapping[str, Callable[[], Callable[[], object]]],
) -> tuple[str, Callable[[], object]]:
    """Return the way of the quickest call and that call, each made and warmed up by two calls."""
    found: dict[str, tuple[float, Callable[[], object]]] = {}
    for way, make in makes.items():
        call = make()
        call()
        call()
        found[way] = timed(call)[0], call
    best = min(found, key=lambda way: found[way][0])
    return best, found[best][1]


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in kB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def growth(make: Callable[[], Callable[[], object]], calls: int = 3) -> float:
    """Return by how many MB this process grows at most while it makes and calls."""
    with contextlib.suppress(OSError):  # a kernel that does not forget: the peak of the imports
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call = make()
    for _ in range(calls):
        call()
    return (resident("VmHWM") - before) / 1024


def serve(measures: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Say what can be asked, then answer questions from standard input until it closes.

    What a library prints of its own goes to standard error. An answer comes with the processor
    time that it took.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    out.write(json.dumps(list(measures)) + "\n")
    out.flush()
    before = 0.0  # so that the first answer bears the imports
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = measures[question.pop("what")](**question)
        except Exception as reason:  # noqa: BLE001 - whatever a library raises is its answer
            answer = {"refused": f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"}
        now = time.process_time()
        out.write(json.dumps([answer, now - before]) + "\n")
        out.flush()
        before = now


class Side:
    """A library that is measured, in a process that is started at the first question.

    Args:
        name: heads its column.
        command: starts the process; None when it is not installed.
        limit: seconds that it has for an answer, or to start; then its process is ended.
    """

    def __init__(self, name: str, command: Sequence[str] | None, limit: float = 60.0) -> None:
        self.name, self.command, self.limit = name, command, limit
        self.spent = 0.0  # seconds of processor time, of all answers
        self._process: subprocess.Popen[str] | None = None
        self._measures: list[str] | None = None  # unknown until it has started once

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer, or why there is none."""
        known = self._measures is None or question["what"] in self._measures
        if self.command is None or not known:
            return {"missing": True}
        try:
            if self._process is None:
                self._start(self.command)
            if question["what"] not in (self._measures or ()):
                return {"missing": True}
            answer: dict[str, Any]
            answer, taken = self._line(json.dumps(dict(question)))
        except TimeoutError:
            self.close()
            self.spent += self.limit
            return {"stopped": self.limit}
        except (BrokenPipeError, EOFError):
            self.close()
            return {"refused": "its process ended"}
        self.spent += taken
        return answer

    def _start(self, command: Sequence[str]) -> None:
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(  # noqa: S603 - commands that this project wrote
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
            text=True,
        )
        self._measures = self._line()

    def _line(self, question: str = "") -> Any:
        """Return the next line of the process, after this question if there is one."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError
        if question:
            process.stdin.write(question + "\n")
            process.stdin.flush()
        # Each line answers one question, so that none is left in the buffer behind `stdout`.
        if not select.select([process.stdout], [], [], self.limit)[0]:
            raise TimeoutError
        line = process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

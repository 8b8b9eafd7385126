"""One clock for all sides, and how a side is asked: one JSON object a line. Standard library alone.

Time is that of the processor over all threads of the process, so that others on the machine do not
count; what they do to caches and to the speed of the clock stays, and is met by asking all sides in
turn, round after round.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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
    plain: Callable[[], object], private: Callable[[], object], steps: int
) -> dict[str, float]:
    """Return the seconds of two calls timed in turn; a private one is the mean over `steps`."""
    found: dict[str, float] = {"plain": 0.0, "seconds": 0.0}
    for _ in range(3):
        found["plain"] += seconds(plain) / 3
        start = time.process_time()
        for _ in range(steps):
            private()
        found["seconds"] += (time.process_time() - start) / steps / 3
    return found


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
    """Answer questions from standard input until it closes; other output goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        measure = measures.get(question.pop("what"))
        try:
            answer = {"missing": True} if measure is None else measure(**question)
        except Exception as reason:  # noqa: BLE001 - whatever a library raises is its answer
            answer = {"refused": f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


class Side:
    """A library that is measured, in a process that is started at the first question.

    Args:
        name: heads its column.
        command: starts the process; None when it is not installed.
    """

    def __init__(self, name: str, command: Sequence[str] | None) -> None:
        self.name, self.command = name, command
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer, or why there is none."""
        if self.command is None:
            return {"missing": True}
        if self._process is None:
            paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            self._process = subprocess.Popen(  # noqa: S603 - commands that this project wrote
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
                text=True,
            )
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a side has no pipes")
        try:
            process.stdin.write(json.dumps(dict(question)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            return {"refused": "its process ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

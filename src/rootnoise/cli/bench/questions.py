"""What is asked of every side, and in which order: all sides in turn, round after round."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import RootnoiseError
from rootnoise.cli.bench.clock import Side

Question = dict[str, Any]
Result = dict[str, Any]

DELTA = 1e-5
NONE = ("missing", "refused", "stopped")  # keys of an answer that is none
SECTIONS = ("account", "noise", "step", "memory", "factors", "growth", "accuracy")


def own_sides(limit: float = 60.0) -> list[Side]:
    """Return the sides that every installation has: rootnoise, and Opacus, which it needs."""
    names = (("rootnoise", "ours"), ("Opacus", "with_opacus"))
    return [
        Side(name, [sys.executable, "-m", f"rootnoise.cli.bench.{file}"]) for name, file in names
    ]


def questions(section: str, quick: bool) -> list[Question]:
    """Return the questions of a section."""
    run = {"q": 0.01, "n": 2000, "delta": DELTA, "groups": 1}
    cyclic = {"q": 0.16, "n": 2000, "delta": DELTA, "groups": 16}
    models = (("perceptron", 64), ("cnn", 64), ("transformer", 16 if quick else 64))
    lengths = (10**3, 10**4, 10**5, 10**6)
    if section == "account":
        return [
            {"what": "epsilon", "sigma": 1.0, **run},
            {"what": "epsilon", "sigma": 1.0, **cyclic},
            {"what": "calibrate", "target": 4.0, **run},
            {"what": "calibrate", "target": 4.0, **cyclic},
        ]
    if section == "noise":
        sizes = (10**6,) if quick else (10**6, 10**7)
        return [{"what": "noise", "d": d, "bands": p} for d in sizes for p in (1, 4, 16, 64)]
    if section == "step":
        whats = ("step", "ghost")
        return [{"what": what, "model": m, "n": n} for m, n in models for what in whats]
    if section == "memory":
        ways = ("plain_memory", "memory", "ghost_memory")
        return [{"what": what, "model": m, "n": n} for m, n in models for what in ways]
    if section == "factors":
        n, k = (256, 4) if quick else (512, 4)
        banded = [(name, n // k, 0.0) for name in ("bsr", "banded", "bandmf")]
        cases = [*banded, ("blt", None, 0.0), ("dense", None, 0.0), ("bsr", n // k, 0.9)]
        names = ("mechanism", "bands", "momentum")
        split = {"what": "factors", "n": n, "k": k}
        return [{**split, **dict(zip(names, case, strict=True))} for case in cases]
    if section == "growth":
        plans = [{"what": "plan_time", "n": n, "k": 10, "bands": 64} for n in lengths]
        plans += [{"what": "plan_time", "n": 10**5, "k": k, "bands": 64} for k in (1, 100, 1000)]
        noise = [{"what": "noise", "d": d, "bands": 16} for d in (250_000, 4_000_000)]
        return [*plans, *noise, *({"what": "draw", "n_examples": n} for n in lengths[1:])]
    rates, seeds = (
        ((0.0125, 0.025, 0.05, 0.1), 5) if quick else ((0.0125, 0.025, 0.05, 0.1, 0.2), 5)
    )
    common = {"what": "accuracy", "delta": DELTA, "epochs": 20, "n": 128}
    return [
        {**common, "target": target, "lr": lr, "seed": seed, "noise": noise}
        for target in ((1.0,) if quick else (1.0, 8.0))
        for noise in ("default", "independent")
        for lr in rates
        for seed in range(seeds)
    ]


def ask(
    sides: Sequence[Side],
    quick: bool = True,
    sections: Iterable[str] = SECTIONS,
    on_row: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Put the questions to all sides, and return what they answered.

    Args:
        sides: who is asked; one without a command counts as not installed.
        quick: fewer sizes, rates and seeds.
        sections: of `SECTIONS`.
        on_row: called with all that is known after each question.

    Raises:
        RootnoiseError: a section that there is not.
    """
    chosen = list(sections)
    for section in chosen:
        if section not in SECTIONS:
            raise RootnoiseError(f"section must be one of {', '.join(SECTIONS)}, got {section}")
    start = time.monotonic()
    result: Result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": 1,
        "load": [load()],
        "quick": quick,
        "limit": max((side.limit for side in sides), default=0.0),
        "versions": {side.name: side.ask({"what": "versions"}) for side in sides},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits.npz"
        if "accuracy" in chosen:
            _digits(data)
        for section in chosen:
            rounds = 3 if section in ("noise", "step", "growth") and not quick else 1
            for question in questions(section, quick):
                put = {**question, "data": str(data)} if section == "accuracy" else question
                before = {side.name: side.spent for side in sides}
                answers = _rounds(sides, put, rounds, fresh=section == "memory")
                if section == "factors":
                    _judge(question, answers)
                spent = {side.name: round(side.spent - before[side.name], 2) for side in sides}
                row = {"section": section, "question": question, "answers": answers}
                result["rows"].append({**row, "spent": spent})
                result["seconds"] = round(time.monotonic() - start)
                on_row(result)
    result["load"].append(load())
    for side in sides:
        side.close()
    return result


def _rounds(
    sides: Sequence[Side], question: Question, rounds: int, fresh: bool
) -> dict[str, dict[str, Any]]:
    """Ask all sides in turn; an answer's numbers are medians over the rounds."""
    given: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            if fresh:
                side.close()
            if not given[side.name] or given[side.name][0].keys().isdisjoint(NONE):
                given[side.name].append(side.ask(question))
    return {name: _median(answers) for name, answers in given.items()}


def _median(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for answer in answers:
        if not answer.keys().isdisjoint(NONE):
            return dict(answer)
    found = dict(answers[0])  # a single one may hold a strategy
    for name, value in answers[0].items():
        if isinstance(value, (int, float)):
            found[name] = median(answer[name] for answer in answers)
    return found


def _judge(question: Question, answers: dict[str, dict[str, Any]]) -> None:
    """Replace each strategy by its error, computed here and the same way for all."""
    for answer in answers.values():
        if "strategy" in answer:
            c = np.asarray(answer.pop("strategy"))
            answer["rmse"] = rmse(c, question["n"], question["k"], question["momentum"])


def rmse(strategy: NDArray[np.float64], n: int, k: int, momentum: float) -> float:
    """Return the error of C, or of its first coefficients, for k passes over n / k steps.

    The sensitivity is sqrt(max_j sum over pairs of one person's steps of |C^T C|): exact for
    C^T C >= 0, as all are here, and never too small (Choquette-Choo et al. 2023).
    """
    if strategy.ndim == 1:
        first = np.zeros(n)
        first[: strategy.size] = strategy[:n]
        strategy = _toeplitz(first)
    period = n // k
    gram = np.abs(strategy.T @ strategy)
    largest = max(gram[j::period, j::period].sum() for j in range(period))
    response = np.convolve(np.ones(n), momentum ** np.arange(n))[:n] if momentum else np.ones(n)
    decoder = np.linalg.solve(strategy.T, _toeplitz(response).T).T
    return float(np.sqrt(largest / n) * np.linalg.norm(decoder))


def _toeplitz(first: NDArray[np.float64]) -> NDArray[np.float64]:
    i, j = np.indices((first.size, first.size))
    made: NDArray[np.float64] = np.where(i >= j, first[i - j], 0.0)
    return made


def _digits(path: Path) -> None:
    from rootnoise.runs.data import load

    data = load("digits")
    np.savez(
        path,
        x=data.train_inputs.flatten(1).numpy(),
        y=data.train_labels.numpy(),
        test_x=data.test_inputs.flatten(1).numpy(),
        test_y=data.test_labels.numpy(),
    )


def load() -> float | None:
    """Return how many processes ran at once over the last minute; None where it is not known."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """Return the model of the processor (Linux), or what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()

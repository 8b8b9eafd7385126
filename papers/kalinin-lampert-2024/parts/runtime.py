"""Runtime of factorizations over n: closed form, optimisation and dense linear algebra."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits

from parts.figures import Panels, line
from parts.part import Claim, Report, Settings, counted, judged
from parts.tables import Row, Tables, column, where
from rootnoise import SGD, SingleParticipation, factorize

TITLE = "Runtime"
INTRO = (
    "Time to factorize the workload of SGD (alpha = 0.999, beta = 0.9), all methods in one run. "
    "The workload is triangular and Toeplitz with a single eigenvalue, so that it has no "
    "eigendecomposition of its own: what is timed is that of its Gram matrix, and a generic matrix "
    "square root."
)
CAPTIONS = {"runtime.png": "Seconds over n, with the fitted exponents."}

BSR, AOF = "BSR", "AOF (dense)"
GRAM, SQRTM = "eigendecomposition of AᵀA", "scipy.linalg.sqrtm(A)"
WHO = SingleParticipation()


def _gram(workload: SGD) -> None:
    a = workload.matrix.dense()
    np.linalg.eigh(a.T @ a)


METHODS: dict[str, Callable[[SGD], object]] = {
    BSR: lambda workload: factorize(workload, WHO, "bsr"),
    AOF: lambda workload: factorize(workload, WHO, "dense"),
    GRAM: _gram,
    SQRTM: lambda workload: sqrtm(workload.matrix.dense()),
}


def compute(settings: Settings, report: Report) -> Tables:
    """Return "runtime": CPU seconds on one BLAS thread, the best of three if below a second."""
    limit, steps = settings.size.seconds, settings.size.runtime
    cases = [(f"runtime, {label}, {n:,} steps", (label, n)) for label in METHODS for n in steps]
    rows: list[Row] = []
    with threadpool_limits(limits=1):
        for label, n in counted(cases, report):
            before = where(rows, method=label)
            dense = label != BSR
            # Dense methods take n^3 operations: do not start one that would take too long.
            if dense and before and before[-1]["seconds"] * (n / before[-1]["n"]) ** 3 > 3 * limit:
                continue
            rows.append({"method": label, "n": n, "seconds": _seconds(METHODS[label], n)})
    return {"runtime": rows}


def _seconds(method: Callable[[SGD], object], n: int) -> float:
    """Return the least CPU time of at most three calls, each on a fresh workload."""
    best = np.inf
    method(SGD(n, 0.8, 0.99))  # warm-up: imports, plans, caches
    for _ in range(3):
        workload = SGD(n, 0.9, 0.999)
        start = time.thread_time()
        method(workload)
        best = min(best, time.thread_time() - start)
        if best > 1:
            break
    return float(best)


def slope(rows: list[Row]) -> float:
    """Return the exponent of n in a least-squares fit of the seconds for n >= 200."""
    fitted = [row for row in rows if row["n"] >= 200]
    x, y = np.log(column(fitted, "n")), np.log(column(fitted, "seconds"))
    return float(np.polyfit(x, y, 1)[0])


def ratios(tables: Tables) -> list[Row]:
    """Return each method's time divided by that of BSR, at every n that both reached."""
    of_bsr = {row["n"]: row["seconds"] for row in where(tables["runtime"], method=BSR)}
    return [
        {"method": row["method"], "n": row["n"], "ratio": row["seconds"] / of_bsr[row["n"]]}
        for row in tables["runtime"]
        if row["method"] != BSR
    ]


def claims(tables: Tables) -> list[Claim]:
    """Judge the orders of magnitude."""
    largest = [where(ratios(tables), method=m)[-1] for m in METHODS if m != BSR]
    ratio = where(largest, method=AOF)[0]["ratio"]
    reached = ", ".join(f"{r['method']} {r['ratio']:,.0f} times (n = {r['n']:,})" for r in largest)
    slopes = {m: slope(where(tables["runtime"], method=m)) for m in METHODS}
    return [
        judged(
            "BSR's factorization is orders of magnitude faster than the optimal one (AOF).",
            ratio >= 100,
            f"Over BSR in the same run: {reached}.",
        ),
        judged(
            "It scales to many steps, where the others are cubic.",
            slopes[BSR] < 1.3 and slopes[AOF] > 2,
            "Exponents of n: " + ", ".join(f"{m} {s:.2f}" for m, s in slopes.items()) + ".",
        ),
    ]


def views(tables: Tables) -> dict[str, list[Row]]:
    """Return the seconds of each method by n."""
    table: list[Row] = []
    for n in sorted({row["n"] for row in tables["runtime"]}):
        found = {row["method"]: row["seconds"] for row in where(tables["runtime"], n=n)}
        table.append({"n": n} | {method: found.get(method) for method in METHODS})
    return {"CPU seconds, one thread, all n bands": table}


def draw(tables: Tables) -> dict[str, Figure]:
    """Return runtime.png."""
    panels = Panels(1, 1, "steps n", "CPU seconds")
    axes = panels.panels[0]
    for method, colour in zip(METHODS, (0, 2, 1, 3), strict=True):
        rows = where(tables["runtime"], method=method)
        label = f"{method}: n^{slope(rows):.1f}"
        line(axes, column(rows, "n"), column(rows, "seconds"), label, colour)
    axes.set(xscale="log", yscale="log")
    return {"runtime.png": panels.done()}

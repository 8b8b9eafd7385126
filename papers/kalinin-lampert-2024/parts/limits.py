"""Where BSR loses: other workloads, narrow bands, tight budgets, and later methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from parts.figures import Panels, line, plain
from parts.methods import AMPLIFIED
from parts.part import FULL, Claim, Report, Settings, counted, gap, judged
from parts.tables import Row, Tables, column, percent, where
from rootnoise import (
    SGD,
    CyclicPoisson,
    Factorization,
    FixedCycle,
    MatrixWorkload,
    ScheduledSGD,
    Workload,
    factorize,
    lower_bound,
    noise_multiplier,
)

TITLE = "Limits"
INTRO = (
    "What happens where the paper's assumptions end, and against the methods that came later. "
    "Training at these limits is in the section on accuracy."
)
CAPTIONS = {
    "narrow.png": "Bands of the strategy (BSR, BandMF) or of its inverse (BISR, BandInvMF).",
    "budgets.png": "Error over that of BSR by budget: below 1 is better than BSR.",
}

# 60,000 examples, 600 per step.
EXAMPLES, BATCH = 60_000, 600
DELTA = 1e-5
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "BSR": ("bsr", {}),
    "epoch-scaled bsr-gamma": ("epoch-scaled", {"base": "bsr-gamma"}),
    "BandMF (Toeplitz)": ("banded", {}),
    "BLT": ("blt", {}),
    "tree": ("tree", {}),
    "A·Id": ("identity", {}),
}
NARROW = {
    "BSR": "bsr",
    "BandMF (Toeplitz)": "banded",
    "BISR": "bisr",
    "BandInvMF": "banded-inverse",
}


def workloads(n: int) -> dict[str, Workload]:
    """Return the workloads of n steps, from the assumed structure to none."""
    t = np.arange(n) / n
    generator = np.random.default_rng(0)
    shuffled = np.tril(generator.uniform(0, 1, (n, n))) + np.eye(n)
    return {
        "SGD, momentum 0.9 (as assumed)": SGD(n, 0.9),
        "cosine schedule to zero": ScheduledSGD((1 + np.cos(np.pi * t)) / 2, 0.9),
        "warm-up, then linear to zero": ScheduledSGD(np.minimum(10 * t + 0.02, 1 - t), 0.9),
        "random learning rate each step": ScheduledSGD(generator.uniform(0.05, 1, n), 0.9),
        "random triangular matrix": MatrixWorkload(shuffled),
    }


def compute(settings: Settings, report: Report) -> Tables:
    """Return "structure", "mismatch", "narrow" and "budgets"."""
    size = settings.size
    who = size.structure
    work: dict[str, dict[str, Callable[[], list[Row]]]] = {
        "structure": {
            f"workload: {label}": partial(_structure, label, workload, who)
            for label, workload in workloads(who.period * who.epochs).items()
        },
        "mismatch": {
            f"momentum {beta:g} unknown": partial(_mismatch, beta, who) for beta in (0.5, 0.9, 0.99)
        },
        "narrow": {"narrow bands": partial(_narrow, size.narrow, size.narrow_bands)},
        "budgets": {
            f"budgets, {k} epochs": partial(_budgets, k, size.epsilons) for k in size.epochs
        },
    }
    cases = [(label, (title, made)) for title in work for label, made in work[title].items()]
    tables: Tables = {title: [] for title in work}
    for title, made in counted(cases, report):
        tables[title] += made()
    return tables


def _structure(label: str, workload: Workload, who: FixedCycle) -> list[Row]:
    bound = lower_bound(workload, who, "tight").value
    rows: list[Row] = []
    for method in ("BSR", "epoch-scaled bsr-gamma", "A·Id"):
        name, options = METHODS[method]
        if name == "epoch-scaled" and isinstance(workload, MatrixWorkload):
            options = {"base": "bsr"}
        above = gap(workload, who, bound, name, **options)
        rows.append({"workload": label, "method": method, "gap": above})
    dense = gap(workload, who, bound, "dense", tolerance=1e-3)
    return [*rows, {"workload": label, "method": "AOF", "gap": dense}]


def _mismatch(beta: float, who: FixedCycle) -> list[Row]:
    """Return what it costs to factorize prefix sums, but to train with momentum."""
    n = who.period * who.epochs
    truth = SGD(n, beta)
    matched = factorize(truth, who, "bsr").rmse(who)
    rmse = Factorization("bsr", truth, factorize(SGD(n), who, "bsr").strategy).rmse(who)
    same = {"momentum": beta, "matched": matched}
    return [same | {"for momentum 0": rmse, "loss": rmse / matched - 1}]


def _narrow(who: FixedCycle, bands: tuple[int, ...]) -> list[Row]:
    workload = SGD(who.period * who.epochs, 0.9)
    bound = lower_bound(workload, who).value
    return [
        {"method": label, "bands": p, "gap": gap(workload, who, bound, name, bands=p)}
        for p in bands
        for label, name in NARROW.items()
    ]


def _budgets(epochs: int, epsilons: tuple[float, ...]) -> list[Row]:
    """Return noise_multiplier * rmse / batch size: the error of the iterates at learning rate 1."""
    period = EXAMPLES // BATCH
    n = epochs * period
    workload, cycle = SGD(n, 0.9), FixedCycle(period, epochs)
    poisson = CyclicPoisson(1, BATCH / EXAMPLES)
    rmse = {
        label: factorize(workload, cycle, name, **options).rmse(cycle)
        for label, (name, options) in METHODS.items()
    }
    single = factorize(workload, poisson, "identity").rmse(poisson)
    rows: list[Row] = []
    for epsilon in epsilons:
        sigma = noise_multiplier(cycle, n, epsilon, DELTA)
        errors = {label: sigma * value for label, value in rmse.items()}
        errors[AMPLIFIED] = noise_multiplier(poisson, n, epsilon, DELTA) * single
        same = {"epochs": epochs, "epsilon": epsilon}
        rows += [same | {"method": m, "error": value / BATCH} for m, value in errors.items()]
    return rows


def claims(tables: Tables) -> list[Claim]:
    """Judge each limit that the paper names."""
    gaps = {(r["workload"], r["method"]): r["gap"] for r in tables["structure"]}
    labels = list(dict.fromkeys(row["workload"] for row in tables["structure"]))
    foreign = {label: gaps[label, "BSR"] for label in labels}
    worse = all(foreign[label] > foreign[labels[0]] for label in labels[1:])
    narrow = where(tables["narrow"], method="BSR")
    first, last = narrow[0], narrow[-1]
    four = {r["method"]: r["gap"] for r in where(tables["narrow"], bands=4)}
    budgets = tables["budgets"]
    wins = [
        (row["epsilon"], row["epochs"])
        for row in where(budgets, method="BSR")
        if row["error"]
        > where(budgets, method=AMPLIFIED, epsilon=row["epsilon"], epochs=row["epochs"])[0]["error"]
    ]
    longest = max(r["epochs"] for r in budgets)
    eps = where(budgets, epochs=longest)[0]["epsilon"]
    at = {r["method"]: r["error"] for r in where(budgets, epochs=longest, epsilon=eps)}
    order = sorted((m for m in at if m != AMPLIFIED), key=at.__getitem__)
    ladder = ", ".join(f"{m} {at[m] / at['BSR']:.2f}" for m in order)
    total = len(where(budgets, method="BSR"))
    lost = "; ".join(f"{label} {value:.1%}" for label, value in foreign.items())
    return [
        judged(
            "BSR is less good where the workload is not of the assumed structure.",
            worse,
            f"Above the bound: {lost}. Epoch-scaled, a cosine schedule costs "
            f"{gaps[labels[1], 'epoch-scaled bsr-gamma']:.1%}; AOF fits any workload.",
        ),
        judged(
            "Too narrow a band costs much.",
            first["gap"] > 3 * last["gap"],
            f"From {first['gap']:.0%} above the bound at p = 1 to {last['gap']:.1%} at p = b. At "
            f"p = 4 it is {four['BSR']:.0%}; bands in the inverse do better there, "
            f"{four['BandInvMF']:.0%} when optimised.",
        ),
        judged(
            "At a tight budget correlation is not enough: amplified DP-SGD wins.",
            bool(wins),
            f"Amplified DP-SGD (batches drawn at random, in secret) has the smaller error in "
            f"{len(wins)} of {total} settings (epsilon, epochs): "
            f"{', '.join(f'({e:g}, {k})' for e, k in wins) or 'none'}.",
        ),
        judged(
            "Many epochs: against tree aggregation, BLT and BandMF.",
            at["BSR"] < min(at["tree"], at["A·Id"]),
            f"Error over that of BSR after {longest} epochs: {ladder}. BSR beats the tree and "
            "independent noise; what is optimised, or scaled, beats BSR.",
        ),
    ]


def views(tables: Tables) -> dict[str, list[Row]]:
    """Return the four tables as shown in README.md."""
    structure: list[Row] = [
        {"workload": label}
        | {r["method"]: percent(r["gap"]) for r in where(tables["structure"], workload=label)}
        for label in dict.fromkeys(row["workload"] for row in tables["structure"])
    ]
    budgets: list[Row] = []
    for row in where(tables["budgets"], method="BSR"):
        same = {"epochs": row["epochs"], "epsilon": row["epsilon"]}
        rows = where(tables["budgets"], **same)
        budgets.append(same | {r["method"]: r["error"] for r in rows})
    narrow: list[Row] = [
        {"bands": p} | {r["method"]: percent(r["gap"]) for r in where(tables["narrow"], bands=p)}
        for p in dict.fromkeys(row["bands"] for row in tables["narrow"])
    ]
    return {
        "Workloads, 5 epochs of 50 steps: error above the certified bound": structure,
        "Momentum unknown to the factorization: error": tables["mismatch"],
        "Bands, 10 epochs of 100 steps, momentum 0.9: error above the certified bound": narrow,
        "Error of the iterates at learning rate 1 (60,000 examples, 600 a step)": budgets,
    }


def draw(tables: Tables) -> dict[str, Figure]:
    """Return narrow.png and budgets.png."""
    bands = Panels(1, 1, "bands p", "per cent above the bound")
    axes = bands.panels[0]
    for label in NARROW:
        rows = where(tables["narrow"], method=label)
        line(axes, column(rows, "bands"), 100 * column(rows, "gap"), label)
    axes.set(xscale="log", yscale="log")
    plain(axes.yaxis, (5, 10, 20, 50, 100, 200, 500))
    epochs = list(dict.fromkeys(r["epochs"] for r in tables["budgets"]))
    panels = Panels(1, len(epochs), "epsilon", "error over that of BSR")
    for axes, k in zip(panels.panels, epochs, strict=True):
        base = column(where(tables["budgets"], epochs=k, method="BSR"), "error")
        for label in [*METHODS, AMPLIFIED]:
            rows = where(tables["budgets"], epochs=k, method=label)
            line(axes, column(rows, "epsilon"), column(rows, "error") / base, label)
        axes.set(xscale="log", yscale="log", title=f"{k} epoch" + "s" * (k > 1))
        plain(axes.xaxis, FULL.epsilons)
        plain(axes.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10))
    return {"narrow.png": bands.done(), "budgets.png": panels.done()}

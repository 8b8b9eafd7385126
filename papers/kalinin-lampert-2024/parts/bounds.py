"""The theorems' bounds with the measured errors between them, and the gap as n grows."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from parts.figures import Panels, line, plain
from parts.part import (
    SEPARATION,
    Claim,
    Report,
    Settings,
    counted,
    judged,
    participation,
)
from parts.tables import Row, Tables, column, where, workloads
from rootnoise import SGD, factorize, lower_bound
from rootnoise.bounds.theorems import (
    any_lower,
    bsr_growth,
    repeated_lower,
    square_root_limit,
    square_root_lower,
    square_root_upper,
)
from rootnoise.runs.palette import AMBER, BLACK, BROWN, GREEN, ORANGE, PURPLE, SKY

TITLE = "The theorems' bounds"
INTRO = (
    "Each bound of `rootnoise.bounds.theorems`, which has their proofs, with the measured error "
    "between them. The certified lower bound is ours, and tighter."
)
CAPTIONS = {
    "bounds.png": "Bounds and measured errors.",
    "gap.png": "How far the measured error is above the certified lower bound.",
}

METHODS = {"single": "square-root", "repeated": "bsr"}
TITLES = {"single": "square root, one participation", "repeated": "BSR, p = b = 100, k = n / 100"}


def compute(settings: Settings, report: Report) -> Tables:
    """Return "single": the square root between its bounds; "repeated": BSR with p = b."""
    size = settings.size
    work = [("single", n) for n in size.single] + [("repeated", n) for n in size.repeated]
    cases = [
        (f"bounds, alpha {a:g}, beta {b:g}, {kind}, {n:,} steps", (SGD(n, b, a), kind))
        for a, b in size.workloads
        for kind, n in work
    ]
    tables: Tables = {"single": [], "repeated": []}
    for workload, kind in counted(cases, report):
        who = participation(kind, workload.n_steps)
        bands = {"bands": SEPARATION} if kind == "repeated" else {}
        measured = factorize(workload, who, METHODS[kind], **bands).rmse(who)
        bound = lower_bound(workload, who).value
        row = {"alpha": workload.decay, "beta": workload.momentum, "n": workload.n_steps}
        if kind == "single":
            row |= {
                "any_lower": any_lower(workload),
                "certified_lower": bound,
                "square_root_lower": square_root_lower(workload),
                "measured": measured,
                "limit": None if workload.decay == 1 else square_root_limit(workload),
                "square_root_upper": square_root_upper(workload),
            }
        else:
            k = workload.n_steps // SEPARATION
            growth = bsr_growth(workload, SEPARATION, k) if workload.decay == 1 else None
            row |= {
                "repeated_lower": repeated_lower(workload, who),
                "certified_lower": bound,
                "measured": measured,
                "growth": growth,
            }
        tables[kind].append(row | {"gap": measured / bound - 1})
    return tables


def claims(tables: Tables) -> list[Claim]:
    """Judge the theorems on every point computed."""
    single, repeated = tables["single"], tables["repeated"]
    inside = all(
        r["any_lower"] <= r["measured"] * (1 + 1e-12)
        and r["square_root_lower"] <= r["measured"] <= r["square_root_upper"]
        for r in single
        if r["n"] > 1
    )
    ends = {
        (a, b): [where(single, alpha=a, beta=b)[i]["gap"] for i in (0, -1)]
        for a, b in workloads(single)
    }
    largest = max(r["n"] for r in single)
    closing = ", ".join(f"{first:.1%} to {last:.2%}" for first, last in ends.values())
    growth = [r for r in repeated if r["growth"] is not None and r["n"] >= 100_000]
    off = max(abs(r["growth"] / r["measured"] - 1) for r in growth)
    above = all(r["repeated_lower"] <= r["measured"] for r in repeated)
    slope = _slope(where(single, alpha=1.0, beta=0.0))
    return [
        judged(
            "The error of the square root lies between the theorems' bounds, single participation.",
            inside,
            f"So it does at each of the {len(single)} points.",
        ),
        judged(
            "It is asymptotically optimal: its gap to the optimum closes as n grows.",
            all(last < 0.05 for _, last in ends.values()),
            f"From the fewest steps to n = {largest:,} the gap to the certified bound goes from "
            f"{closing}. Without decay it closes as 0.2 / (ln(n) / pi), no faster.",
        ),
        judged(
            "Without decay the error grows as ln n, for any factorization.",
            abs(slope * math.pi - 1) < 0.05,
            f"Slope of the error against ln(n) / pi (prefix sums): {slope * math.pi:.4f}.",
        ),
        judged(
            "Repeated participation, no decay: BSR's error is of order sqrt(n k ln p / p).",
            off < 0.01 and above,
            f"With its constant, derived here, the law is within {off:.2%} from n = 100,000 on.",
        ),
    ]


def _slope(rows: list[Row]) -> float:
    """Return the growth of the error with ln n from 100 steps on."""
    first, last = next(r for r in rows if r["n"] >= 100), rows[-1]
    return float((last["measured"] - first["measured"]) / math.log(last["n"] / first["n"]))


def views(tables: Tables) -> dict[str, list[Row]]:
    """Return the bounds by workload."""
    return {
        f"{title[0].upper()}{title[1:]}, alpha = {a:g}, beta = {b:g}": [
            {name: value for name, value in row.items() if name not in ("alpha", "beta")}
            for row in where(tables[kind], alpha=a, beta=b)
        ]
        for kind, title in TITLES.items()
        for a, b in workloads(tables["single"])
    }


# Column: label, dashes, colour.
LINES = {
    "square_root_upper": ("upper bound of the paper", "--", ORANGE),
    "limit": ("limit and upper bound, sharp (ours)", "-.", PURPLE),
    "growth": ("law sqrt(k n Σc²/2) b∞", ":", AMBER),
    "certified_lower": ("certified lower bound, any factorization (ours)", "-", GREEN),
    "any_lower": ("lower bound of the paper, any factorization", "--", BLACK),
    "repeated_lower": ("closed lower bound, any factorization", "-.", BROWN),
    "square_root_lower": ("lower bound of the paper, square root", ":", SKY),
}


def draw(tables: Tables) -> dict[str, Figure]:
    """Return bounds.png and gap.png."""
    pairs = workloads(tables["single"])
    bounds = Panels(2, len(pairs), "steps n", "expected error")
    gap = Panels(1, 2, "steps n", "per cent above the certified bound")
    cases = [(kind, index) for kind in TITLES for index in range(len(pairs))]
    for axes, (kind, index) in zip(bounds.panels, cases, strict=True):
        alpha, beta = pairs[index]
        workload = f"α = {alpha:g}, β = {beta:g}"
        rows = where(tables[kind], alpha=alpha, beta=beta)
        n = column(rows, "n")
        for name, (label, dashes, colour) in LINES.items():
            if rows[0].get(name) is not None:
                axes.plot(
                    n, column(rows, name), dashes,
                    color=colour, linewidth=1.3, label=label,
                )  # fmt: skip
        line(axes, n, column(rows, "measured"), "measured", 0)
        who = TITLES[kind].removeprefix("square root, ").removeprefix("BSR, ")
        axes.set(xscale="log", yscale="log", title=f"{workload}\n{who}")
        if axes.get_ylim()[1] < 20:
            plain(axes.yaxis, (1, 2, 3, 5, 10, 20))
        beside = gap.panels[list(TITLES).index(kind)]
        line(beside, n, 100 * column(rows, "gap"), workload, index)
        beside.set(xscale="log", ylim=(0, None), title=TITLES[kind])
    return {"bounds.png": bounds.done(), "gap.png": gap.done()}

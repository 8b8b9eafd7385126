"""Accuracy of private training: the studies, and what they say about the methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from parts import figures
from parts.compared import Rivals, beyond, chance, compare, gain, latest, rivals, settings_of
from parts.methods import (
    AMPLIFIED,
    AOF,
    BINS,
    BSR,
    CYCLIC,
    FIRST,
    METHODS,
    OUTPUT,
    PAPER,
    PLAIN,
)
from parts.part import BEYOND, NOT, NOT_OURS, PARTLY, PARTLY_OURS, SMALLER, Claim, Report, Settings
from parts.tables import Row, Tables, column, where
from rootnoise.runs.config import RunConfig
from rootnoise.runs.palette import GREY

TITLE = "Accuracy of private training"
INTRO = (
    "Test accuracy at delta = 1e-5, clip norm 1, alpha = 0.9999, beta = 0.9: mean and standard "
    "deviation over seeds. Learning rates are powers of two, found for each method and setting by "
    "doubling and halving on a seed that no table reports, or on the mean of three where ten "
    "judge (but for the CNN on Fashion-MNIST at epsilon 1); that may miss the best by a factor of "
    "two, which is more than BSR and AOF differ by. Beside the methods of the paper are those of "
    "rootnoise's planner, which knows neither data nor model, with at most 64 noise vectors: its "
    "choice, as `train --mechanism auto` took "
    "it when the runs were made; cyclic Poisson sampling in its groups; balls in bins with its "
    "strategy; and b-min-sep Poisson sampling, with the strategy of cyclic Poisson, and its number "
    "of groups as separation. Methods that are the same one in a setting share their runs. All of "
    "it ran on two busy CPU cores: the models are small, the seeds few, and cells without a number "
    "were not run. The page on the command line has ten epochs of the CNN on Fashion-MNIST. Noise "
    "comes from the seed, so that each number can be made again; so no privacy is claimed for "
    "these models."
)
CAPTIONS = {
    "accuracy.png": "Mean and one standard deviation.",
    "planned.png": "Points above amplified DP-SGD, and one standard deviation of the difference.",
}

# Methods of equal accuracy stand side by side, each a little further along the axis.
APART = 1.03
# If no method gets above this accuracy, nothing was learned and no method counts as better.
LEARNED = 0.2
LARGER = ("cnn", "resnet18", "transformer")
PLANNED = tuple(method for method in METHODS if method not in PAPER)
# Drawn beside amplified DP-SGD; b-min-sep Poisson is near cyclic Poisson, and left to the tables.
NEAR = (BSR, AOF, CYCLIC, BINS, FIRST)
CHOICE = "What the planner chose: gains in points, and in standard deviations of the difference"


def check(settings: Settings) -> None:
    """Load each data set of the studies once, to refuse missing ones before any work."""
    from parts.grid import find_data

    for name in {study.dataset: None for study in settings.studies}:
        find_data(name, settings.data_dir)


def compute(settings: Settings, report: Report) -> Tables:
    """Carry out the runs missing in runs.jsonl; return "accuracy", all reported cells."""
    from parts.grid import Grid, read

    path = settings.out / "runs.jsonl"
    grid = Grid(path, settings.data_dir, report, settings.device)
    for study in settings.studies:
        grid.run(study)
    return {"accuracy": summarise(read(path))}


def summarise(runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return mean and sample standard deviation of each cell over the reported seeds.

    Of a setting and method that were tuned again, the last row counts.
    """
    from parts.grid import TUNING_SEED

    groups: dict[tuple[str, str, RunConfig], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["config"]["seed"] < TUNING_SEED:
            cell = replace(RunConfig(**run["config"]), seed=0, insecure_noise_seed=None)
            key = run["study"], run["method"], cell
            groups[key] = [*groups.pop(key, []), run]  # what was trained last comes last
    rows: list[Row] = []
    names = ("dataset", "model", "epsilon", "epochs", "batch_size", "lr", "mechanism")
    for (study, method, cell), members in groups.items():
        accuracy = np.array([run["accuracy"] for run in members])
        rows.append(
            {"study": study, "method": method}
            | {name: getattr(cell, name) for name in names}
            | {
                "sampling": _sampling(cell),
                "n_steps": members[0]["n_steps"],
                "rmse": members[0]["rmse"],
                "mean": float(accuracy.mean()),
                "std": float(accuracy.std(ddof=1)) if accuracy.size > 1 else None,
                "seeds": int(accuracy.size),
            }
        )
    return rows


def _sampling(cell: RunConfig) -> str:
    size = max(cell.groups, cell.separation)
    return cell.sampling if size == 1 else f"{cell.sampling} {size}"


def claims(tables: Tables) -> list[Claim]:
    """Judge the order of the methods: beyond one deviation, within it, or reversed."""
    rows: list[Row] = []
    idle: list[Row] = []
    for setting in settings_of(tables["accuracy"]):
        own = where(tables["accuracy"], **setting)
        (rows if max(row["mean"] for row in own) > LEARNED else idle).extend(own)
    found = [
        _claim("BSR beats independent noise, A·Id, at the same sampling.", rows, BSR, PLAIN),
        _claim("BSR beats output perturbation, Id·A.", rows, BSR, OUTPUT),
        _claim("BSR beats amplified DP-SGD, A·Id with Poisson sampling.", rows, BSR, AMPLIFIED),
        _claim("BSR is on par with AOF.", rows, BSR, AOF),
    ]
    large = [row for row in rows if row["model"] in LARGER]
    found.append(_claim("The gain over A·Id carries over to larger models.", large, BSR, PLAIN))
    found += [_level(rows), _better(rows)]
    if idle:
        names = ", ".join(sorted({f"{r['model']} ({r['n_steps']} steps)" for r in idle}))
        best = f"{max(row['mean'] for row in idle):.1%}"
        evidence = f"No method learns here: {names}, at most {best}. Left out of the counts above."
        found.append(Claim("BSR trains every model.", NOT, evidence))
    return [claim for claim in found if claim is not None]


def _claim(text: str, rows: Sequence[Row], left: str, right: str) -> Claim | None:
    gains = compare(rows, left, right)
    if not gains:
        return None
    above, below = beyond(gains)
    mean = 100 * float(np.mean([gain for gain, _ in gains]))
    budgets = {
        epsilon: compare(where(rows, epsilon=epsilon), left, right)
        for epsilon in sorted({row["epsilon"] for row in rows})
    }
    by_budget = ", ".join(
        f"{beyond(own)[0]} of {len(own)} at epsilon {epsilon:g}"
        for epsilon, own in budgets.items()
        if own
    )
    evidence = (
        f"{left} is better by more than one standard deviation of the difference in {above} of "
        f"{len(gains)} settings ({by_budget}), worse in {below}, within it in "
        f"{len(gains) - above - below}; on average by {mean:+.1f} points of accuracy."
    )
    if right == AOF:  # on par: not worse in two settings of three
        holds, partly = below <= len(gains) // 3, False
    else:
        holds, partly = above == len(gains), above > below
    return Claim(text, SMALLER if holds else PARTLY if partly else NOT, evidence)


def _ours(text: str, held: int, count: int, evidence: str) -> Claim:
    verdict = BEYOND if held == count else PARTLY_OURS if 2 * held > count else NOT_OURS
    return Claim(text, verdict, evidence)


def _level(rows: Sequence[Row]) -> Claim | None:
    """Judge the planner's choice against whatever is best in each setting."""
    pairs = rivals(rows, FIRST)
    if not pairs:
        return None
    worse = [pair for pair in pairs if not pair.level]
    above = sum(pair.gain[0] > pair.gain[1] for pair in pairs)
    mean = 100 * float(np.mean([pair.gain[0] for pair in pairs]))
    held = len(pairs) - len(worse)
    named = ", ".join(_named(pair) for pair in worse)
    lucky = sum(chance(pair.own["seeds"], pair.others) for pair in pairs)
    evidence = (
        f"{held} of {len(pairs)} settings; it is better than each of the others by more than one "
        f"standard deviation of the difference in {above}, and on average {mean:+.1f} points from "
        f"the best of them. That is chosen by the same seeds that judge it: were all methods "
        f"equally good, chance would leave the choice behind in {lucky:.0f}."
    ) + (f" Behind: {named}." if worse else "")
    text = "The planner's choice is level with the best other method."
    return _ours(text, held, len(pairs), evidence)


def _named(pair: Rivals) -> str:
    row, points = pair.own, -100 * pair.gain[0]
    where_ = f"{row['study']} ({row['n_steps']} steps, epsilon {row['epsilon']:g})"
    return f"{where_} {points:.1f} points behind {pair.best['method']}"


def _better(rows: Sequence[Row]) -> Claim | None:
    """Judge the planner's choice against the usual one."""
    found = _claim("The planner's choice beats amplified DP-SGD.", rows, FIRST, AMPLIFIED)
    if found is None:
        return None
    gains = compare(rows, FIRST, AMPLIFIED)
    evidence = found.evidence[0].upper() + found.evidence[1:]
    return _ours(found.text, beyond(gains)[0], len(gains), evidence)


def views(tables: Tables) -> dict[str, list[Row]]:
    """Return the planner's choice by setting, and each study: accuracies and learning rates."""
    rows = latest(tables["accuracy"])
    shown: dict[str, list[Row]] = {CHOICE: [_chosen(rows, pair) for pair in rivals(rows, FIRST)]}
    for setting in settings_of(rows):
        own = where(rows, **setting)
        seeds = min(row["seeds"] for row in own)
        caption = "{study}: {dataset}, {model}".format(**setting) + f", {seeds} seeds"
        line = {name: setting[name] for name in ("epochs", "batch_size", "n_steps", "epsilon")}
        cells = {method: where(own, method=method) for method in METHODS}
        texts = {method: _text(cell[0]) if cell else None for method, cell in cells.items()}
        for methods, title in ((PAPER, caption), (PLANNED, f"{caption}, planned")):
            if any(texts[method] for method in methods):
                own_line = line | {method: texts[method] for method in methods}
                shown.setdefault(title, []).append(own_line)
    return shown


def _chosen(rows: Sequence[Row], pair: Rivals) -> Row:
    own, best = pair.own, pair.best
    setting = settings_of([own])[0]
    usual = where(rows, method=AMPLIFIED, **setting)
    return {
        "study": own["study"],
        "n_steps": own["n_steps"],
        "epsilon": own["epsilon"],
        "choice": f"{own['mechanism']}, {own['sampling']}",
        "accuracy": _text(own),
        "best other": f"{best['method']} {_text(best)}",
        "gain": _in_deviations(pair.gain),
        "gain over A·Id amplified": _in_deviations(gain(own, usual[0])) if usual else None,
    }


def _in_deviations(found: tuple[float, float]) -> str:
    difference, deviation = found
    return f"{100 * difference:+.1f} ({difference / deviation:+.1f})" if deviation else "-"


def _text(row: Row) -> str:
    deviation = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return f"{100 * row['mean']:.1f}{deviation} (lr {row['lr']:g})"


def draw(tables: Tables) -> dict[str, Figure]:
    """Return accuracy.png, the paper's methods, and planned.png, gains over amplified DP-SGD."""
    rows = latest(tables["accuracy"])
    gains = []
    for row in where(rows, method=FIRST):
        (setting,) = settings_of([row])
        usual = where(rows, method=AMPLIFIED, **setting)
        for own in (where(rows, method=method, **setting) for method in NEAR if usual):
            if own:
                mean, std = gain(own[0], usual[0])
                gains.append({**own[0], "mean": mean, "std": std})
    drawn = {"accuracy.png": _panels(rows, PAPER, "test accuracy (%)")}
    if gains:
        drawn["planned.png"] = _panels(gains, NEAR, f"points above {AMPLIFIED}")
    return drawn


def _panels(rows: Sequence[Row], methods: Sequence[str], y: str) -> Figure:
    """Draw by budget, or by steps where a study varies them; else every study."""
    panels = []
    for study in dict.fromkeys(row["study"] for row in rows):
        own = where(rows, study=study)
        if len({row["n_steps"] for row in own}) > 1:
            panels += [(study, "n_steps", eps) for eps in sorted({r["epsilon"] for r in own})]
        elif len({row["epsilon"] for row in own}) > 1:  # a single point is left to the table
            panels.append((study, "epsilon", None))
    if not panels:
        panels = [(study, "epsilon", None) for study in {row["study"]: None for row in rows}]
    columns = min(3, len(panels))
    grid = figures.Panels(-(-len(panels) // columns), columns, "", y)
    for axes in grid.panels[len(panels) :]:
        axes.set_axis_off()
    for axes, (study, along, epsilon) in zip(grid.panels, panels, strict=False):
        own = where(rows, study=study, **({} if epsilon is None else {"epsilon": epsilon}))
        first = own[0]
        for place, method in enumerate(methods):
            line = sorted(where(own, method=method), key=lambda row: row[along])
            if line:
                axes.errorbar(
                    column(line, along) * APART ** (place - len(methods) // 2),
                    100 * column(line, "mean"),
                    100 * np.nan_to_num(column(line, "std")),
                    capsize=3, markersize=5, linewidth=1.4, **figures.style(method),
                )  # fmt: skip
        if AMPLIFIED not in methods:
            axes.axhline(0, color=GREY, linewidth=1)
        axes.set(xscale="log", xlabel="epsilon" if epsilon is None else "steps in one epoch")
        figures.plain(axes.xaxis, sorted({row[along] for row in own}))
        budget = f"{first['epochs']} epochs" if epsilon is None else f"epsilon {epsilon:g}"
        axes.set_title(f"{first['dataset']}, {first['model']}, {budget}", fontsize=10)
    return grid.done()

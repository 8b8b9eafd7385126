"""One self-contained page of HTML about one or several runs: it loads nothing from elsewhere.

It shows what the run has released, and the mechanism. It never uses the training set, nor the
ledger, which must stay secret under random sampling.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise.accounting.rounding import round_up
from rootnoise.diagnostics import diagnose
from rootnoise.mechanism import Mechanism
from rootnoise.runs import pages, pictures, settings_file, statement
from rootnoise.runs.config import RunConfig, n_averaged
from rootnoise.runs.settings import as_of_today

# Most steps for which `diagnose` takes only seconds.
DIAGNOSED = 2048

TRUST = (
    (
        "Rests on the code",
        "that epsilon and delta hold for the mechanism, which rootnoise audit recomputes by "
        "second routes from the files of this folder.",
    ),
    (
        "Rests on whoever ran it",
        "that the training set was this one and one person is one record; that choices made by "
        "looking at the data, such as tuning, are paid for elsewhere; that the key is secret.",
    ),
    (
        "Is not in the claim",
        "the test accuracy, which is computed on other people's data; the pictures, which are "
        "drawn from the plan; and this page, which proves nothing by itself.",
    ),
)

TRUST_TUNED = (
    *TRUST,
    (
        "Rests on whoever tuned it",
        "that nobody saw how long the tuning took; that it was not started again because of "
        "anything seen; that no record of the test part is in the training set.",
    ),
)


@dataclass(frozen=True)
class Run:
    """The contents of a report.

    Attributes:
        name: the run's name.
        config: its settings.
        stated: its privacy statement.
        mechanism: its mechanism, None without privacy.
        history: its evaluations.
        result: its result, None until it has ended.
    """

    name: str
    config: RunConfig
    stated: Mapping[str, Any]
    mechanism: Mechanism | None
    history: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None


def read(folder: Path) -> Run:
    """Read the run in a folder.

    Raises:
        RootnoiseError: no run, or a file that has changed since it was sealed.
    """
    try:
        config = RunConfig(**as_of_today(json.loads((folder / "config.json").read_bytes())))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        last = folder / "result.json"
        result = json.loads(last.read_bytes()) if last.exists() else None
    except (OSError, TypeError, ValueError) as reason:
        line = " ".join(str(reason).split())
        if isinstance(reason, OSError):
            line = f"{Path(reason.filename or '').name}: {reason.strerror}"
        raise RootnoiseError(f"run must be readable, got {folder}: {line:.100}") from None
    stated = statement.read(folder / "privacy.json")
    private = config.mechanism != "none"
    mechanism = Mechanism.load(folder / "mechanism.json") if private else None
    if mechanism is not None and stated["mechanism"]["fingerprint"] != mechanism.fingerprint:
        raise RootnoiseError(f"privacy.json must describe mechanism.json, got others in {folder}")
    return Run(folder.resolve().name, config, stated, mechanism, history, result)


def page(run: Run) -> str:
    """Return the page about one run."""
    c = run.config
    parts = [
        f"<h1>{escape(f'{c.mechanism} on {c.dataset}')}</h1>",
        _claim(run),
        f'<ul class="big">{"".join(_numbers(run))}</ul>',
        f'<div class="pictures">{"".join(_pictures(run))}</div>',
        "<h2>What could be better</h2>",
        _findings(run),
        "<h2>What to trust</h2>",
        pages.definitions(TRUST if c.tuning is None or c.tuning.number is None else TRUST_TUNED),
        "<h2>In numbers</h2>",
        pages.table(("what", "value"), _rows(run)),
        "<h2>Make it again</h2>",
        f"<pre>{escape(command(c))}</pre>",
        f"<p>Or, with the run.toml of its folder, <code>rootnoise {_program(c)} --config run.toml "
        "--out again</code>. Noise is drawn anew, and so the accuracy will not be quite the same."
        "</p>",
    ]
    return pages.document(f"{c.mechanism} on {c.dataset}: a private run", parts)


def comparison(runs: Sequence[Run]) -> str:
    """Return one page about several runs: their curves together, and a table."""
    labels = _labels(runs)
    rows = [
        (
            label,
            run.config.mechanism,
            "-" if run.mechanism is None else round_up(run.mechanism.epsilon, 5),
            _number(None if run.mechanism is None else run.mechanism.delta),
            _percent(run),
            _number(None if run.mechanism is None else run.mechanism.rmse),
        )
        for label, run in zip(labels, runs, strict=True)
    ]
    curves = {label: run.history for label, run in zip(labels, runs, strict=True)}
    heads = ("run", "mechanism", "epsilon", "delta", "test accuracy", "rmse at noise 1")
    claims = [(label, run.stated["claim"]) for label, run in zip(labels, runs, strict=True)]
    title = "1 run" if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [
        f"<h1>{title}</h1>",
        f'<div class="pictures">{pages.figure(pictures.accuracy(curves), "Test accuracy.")}</div>',
        "<h2>In numbers</h2>",
        pages.table(heads, rows),
        "<h2>What each claims</h2>",
        pages.definitions(claims),
    ]
    return pages.document(title, parts)


def command(config: RunConfig) -> str:
    """Return the command for a run with these settings, leaving out those at their defaults."""
    words = ["rootnoise", _program(config)]
    usual = {field.name: field.default for field in fields(config)}
    usual |= {"sampling": _sampling(config)}
    for name, value in settings_file.flat(vars(config)).items():
        if value != usual.get(name):
            said = ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
            words += [f"--{name.replace('_', '-')}", said]
    return shlex.join([*words, "--out", "again"])


def _program(config: RunConfig) -> str:
    return "train" if config.tuning is None else "tune"


def _sampling(config: RunConfig) -> str:
    return "poisson" if config.mechanism == "dpsgd" else "fixed-cycle"


def _labels(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _claim(run: Run) -> str:
    kind = "claim" if run.stated["private"] else "claim none"
    said = [run.stated["claim"], run.stated.get("independence", ""), _averaged(run)]
    text = "</p><p>".join(escape(sentence) for sentence in said if sentence)
    return f'<div class="{kind}"><p>{text}</p></div>'


def _averaged(run: Run) -> str:
    """Return which iterates the released model is the mean of, if it is one."""
    if run.config.average is None:
        return ""
    n = run.stated["sampler"]["n_steps"]
    said = f"The model is the mean of the last {n_averaged(run.config, n)} of {n} iterates."
    return said if run.mechanism is None else f"{said} The claim is about all of them."


def _numbers(run: Run) -> Iterator[str]:
    values = {"test accuracy": _percent(run)}
    if run.mechanism is not None:
        m = run.mechanism
        values |= {"epsilon": round_up(m.epsilon, 4), "delta": f"{m.delta:g}"}
        values["noise multiplier"] = f"{m.noise_multiplier:.4g}"
    made, n = run.history[-1]["step"] if run.history else 0, run.stated["sampler"]["n_steps"]
    values["steps"] = f"{made} of {n}"
    for name, value in values.items():
        yield f"<li><b>{escape(value)}</b>{name}</li>"


def _percent(run: Run) -> str:
    return f"{100 * run.history[-1]['test_accuracy']:.1f} %" if run.history else "none yet"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _pictures(run: Run) -> Iterator[str]:
    if run.history:
        yield pages.figure(pictures.accuracy({run.name: run.history}), "Accuracy on the test set.")
    m = run.mechanism
    if m is None:
        return
    described = run.stated["mechanism"]
    yield pages.figure(
        pictures.privacy(m, described["privacy"]),
        "The same noise at other deltas: epsilon and delta are two readings of one guarantee.",
    )
    bound = (described.get("error") or {}).get("lower_bound")
    gap = (described.get("error") or {}).get("gap")
    more = "" if gap is None else f" No factorization is better by more than {100 * gap:.1f} %."
    yield pages.figure(
        pictures.errors(m, bound),
        f"How far the noise is expected to move the iterate of each step.{more}",
    )
    yield pages.figure(
        pictures.heatmap(m),
        "C inverse, which turns independent draws into the noise of the steps.",
    )
    yield pages.figure(
        pictures.autocorrelation(m),
        "Neighbouring steps' noise is opposed, and partly cancels."
        if m.strategy.bands > 1
        else "Independent noise: no step takes back what another added.",
    )
    yield pages.figure(
        pictures.participation(m),
        "When a record may take part, by the plan; who did is for the auditor alone.",
    )


def _findings(run: Run) -> str:
    if run.mechanism is None:
        return "<p>Without a mechanism there is nothing to diagnose.</p>"
    if run.mechanism.n_steps > DIAGNOSED:
        return "<p>More steps than are diagnosed here: see <code>rootnoise diagnose</code>.</p>"
    sampler = run.stated["sampler"]
    found = diagnose(
        run.mechanism, batch_size=sampler["batch_size"], n_examples=sampler["n_examples"]
    )
    if not found:
        return "<p>Nothing was found.</p>"
    return pages.definitions([(f"{each.message}", each.remedy) for each in found])


def _rows(run: Run) -> Iterator[tuple[str, str]]:
    for field in fields(run.config):
        value = getattr(run.config, field.name)
        if field.name == "tuning" and value is not None:
            value = value.claim(run.config.dataset)
        if value is not None:
            yield field.name.replace("_", " "), f"{value}"
    if run.mechanism is not None:
        m, sens = run.mechanism, run.mechanism.sensitivity
        yield "sensitivity", f"{sens.value:.9g} ({'exact' if sens.exact else 'upper bound'})"
        yield "standard deviation of Z", f"{m.noise_std:.9g}"
        yield "fingerprint", m.fingerprint
        yield "memory", f"{m.noising.state_size} noise vectors of the model's size"
    if run.result is not None and run.result["seconds"] is not None:
        yield "seconds of training", f"{run.result['seconds']:.1f}"
    if "files" in run.stated:  # the page in the folder is under the seal, and cannot tell it
        yield "seal of the folder", str(run.stated["seal"])
    yield "computed by", ", ".join(f"{k} {v}" for k, v in run.stated["versions"].items())

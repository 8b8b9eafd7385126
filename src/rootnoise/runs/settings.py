"""Every setting of a run, defined once: its type, default and text in `rootnoise train --help`.

Imports nothing heavy, so that help is quick. `runs.config.RunConfig` checks the values.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The rate without privacy: there is no noise to choose one by.
LR_WITHOUT_NOISE = 0.5


def setting(default: Any, text: str, **how: Any) -> Any:
    """Return a field; `how` goes to `typer.Option`, except the following.

    `flags` are its names, `kind` its input type, and `tuned` says that `rootnoise tune` takes
    several values.
    """
    return field(default=default, metadata={"help": text, **how})


def completing(*names: str) -> dict[str, Any]:
    """Return how a shell completes a setting's value: by these names."""
    return {"autocompletion": lambda: list(names)}


def known_mechanisms() -> list[str]:
    """Return the names of mechanisms, for a shell to complete."""
    from rootnoise.factorization import mechanisms

    return ["auto", "dpsgd", "none", *mechanisms()]


def _own(text: str, **how: Any) -> Any:
    return setting(None, text, rich_help_panel="Of some mechanisms", **how)


@dataclass(frozen=True)
class Options:
    """The options of all mechanisms together; each mechanism takes some and refuses the others."""

    bands: int | str | None = _own(
        "Diagonals p of a banded strategy (auto: the best, for bsr and bisr) "
        "[default: the separation b, else n].",
        metavar="<int|auto>",
        kind=str | None,
    )
    buffers: int | None = _own("Buffers of blt [default: as long as each gains 0.1 %].")
    gamma: float | None = _own("Power of bsr-gamma, in [0, 1] [default: the best].")
    lam: float | None = _own("Coefficient of lambda-cgd [default: the best].")
    base: str | None = _own(
        "Strategy to scale, for epoch-scaled and column-normalised [default: bsr]."
    )
    estimator: str | None = _own("Estimator of tree: full, online or naive [default: full].")
    tolerance: float | None = _own("Gap at which dense stops [default: 1e-6].")
    contraction: float | None = _own(
        "Optimise for a loss that pulls the parameters back by exp(-c) over the run [default: 0; "
        "what `plan` and auto optimise for has its own]."
    )


@dataclass(frozen=True)
class Settings(Options):
    """The settings of a run."""

    dataset: str = setting(
        "fashion-mnist",
        "digits, fashion-mnist, mnist, mnist-5k, cifar10, or your own module:function.",
        **completing("digits", "fashion-mnist", "mnist", "mnist-5k", "cifar10"),
    )
    model: str = setting(
        "cnn",
        "logistic, mlp, cnn, resnet18 or transformer.",
        **completing("logistic", "mlp", "cnn", "resnet18", "transformer"),
    )
    mechanism: str = setting(
        "bsr",
        "Any of `factorize`, such as bsr or identity (independent noise); dpsgd "
        "(independent noise, Poisson sampling); none (no privacy); auto (the best of `plan`).",
        autocompletion=known_mechanisms,
    )
    epsilon: float | None = setting(
        None, "Privacy loss to spend; needed unless the mechanism is none."
    )
    delta: float = setting(1e-5, "Failure probability, in (0, 1).")
    epochs: int = setting(4, "Passes over the training set.")
    batch_size: int = setting(500, "Examples per step (on average under Poisson sampling).")
    micro_batch_size: int | None = setting(
        None, "Examples processed at a time [default: as many as fit into the free memory]."
    )
    lr: float | str = setting(
        "auto",
        "Learning rate of SGD, or auto: the one that `plan` advises, which looks at no data; 0.5 "
        "without noise.",
        metavar="<float|auto>",
        kind=str,
        tuned=True,
    )
    momentum: float = setting(0.9, "Momentum beta of SGD, in [0, 1).", tuned=True)
    decay: float = setting(
        1.0, "Factor alpha on the parameters at each step; 1 is no decay.", tuned=True
    )
    clip_norm: float = setting(
        1.0, "Largest l2 norm of one gradient.", flags=("--clip-norm", "--clip"), tuned=True
    )
    weight_decay: float = setting(
        0.0, "Multiple of the parameters added to the gradient (L2).", tuned=True
    )
    schedule: str | None = setting(
        None,
        "cosine, linear, exponential or step [default: constant].",
        **completing("cosine", "linear", "exponential", "step"),
    )
    warmup: int = setting(0, "Steps of linear warm-up before the schedule.")
    final: float | None = setting(
        None,
        "Where the schedule ends, relative to --lr [default: 0; 0.01 for exponential and step].",
    )
    average: float | None = setting(
        None,
        "Release the mean of the iterates of this last part of the steps, such as 0.25: it costs "
        "no privacy [default: 0, the last iterate].",
    )
    sampling: str = setting(
        "auto",
        "fixed-cycle, balls-in-bins, poisson (with --groups, where more than one band), "
        "min-sep-poisson (with --separation) or auto: poisson for dpsgd, else fixed-cycle.",
        **completing("auto", "fixed-cycle", "balls-in-bins", "poisson", "min-sep-poisson"),
    )
    groups: int = setting(1, "Groups of cyclic Poisson sampling; the mechanism has as many bands.")
    separation: int = setting(
        1,
        "Least steps between two of one example in min-sep-poisson; the mechanism has as many "
        "bands.",
        flags=("--separation", "--min-sep"),
    )
    memory_rows: int | None = setting(
        None, "Most noise vectors of the model's size that auto may keep [default: 64]."
    )
    seed: int = setting(0, "Fixes the order of the data and the initial weights.")
    insecure_noise_seed: int | None = setting(
        None, "Makes the noise repeatable. Then no privacy is claimed: experiments only."
    )
    device: str = setting(
        "cpu", "Where models train: cpu, cuda, or cuda:N. The noise is drawn there too."
    )
    data_dir: str | None = setting(
        None, "Folder of the data set's files; --resume remembers it.", metavar="<path>"
    )


def resuming(out: Path) -> str:
    """Return the command that continues the run in a folder, by the program that is running now.

    >>> resuming(Path("runs/my digits"))
    "rootnoise train --resume --out 'runs/my digits'"
    """
    called = Path(sys.argv[0])  # such as .venv/bin/rootnoise, where that is not on the PATH
    hidden = called.name == "rootnoise" and shutil.which("rootnoise") is None
    program = shlex.quote(str(called)) if hidden else "rootnoise"
    return f"{program} train --resume --out {shlex.quote(str(out))}"


def as_of_today(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a config.json; older ones have the separation under `groups`."""
    if "separation" in saved or "groups" not in saved:
        return saved
    own = "separation" if saved.get("sampling") == "min-sep-poisson" else "groups"
    return saved | {"groups": 1, "separation": 1, own: saved["groups"]}

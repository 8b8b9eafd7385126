"""`rootnoise account`: (epsilon, delta) to noise multiplier, and back."""

from __future__ import annotations

from typing import Annotated

import typer

from rootnoise._check import RootnoiseError
from rootnoise.cli import _options
from rootnoise.cli._report import show


def account(
    delta: Annotated[float, typer.Option(help="Failure probability, in (0, 1).")],
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy loss to spend; prints the noise multiplier.")
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise multiplier sigma; prints the epsilon.")
    ] = None,
    sampling_probability: Annotated[
        float | None,
        typer.Option(help="Poisson sampling with this probability q (DP-SGD); needs --steps."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps n; without sampling they do not matter.")
    ] = None,
    groups: Annotated[
        int, typer.Option(help="Groups of cyclic Poisson sampling; 1 is DP-SGD.")
    ] = 1,
    json: _options.Json = False,
) -> None:
    """Convert between epsilon and the noise multiplier.

    Without --sampling-probability the whole run is one Gaussian mechanism, for every factorization
    and participation: their difference is in the sensitivity, which scales the noise. With it, the
    steps are composed, and epsilon is an upper bound.
    """
    from rootnoise import accounting
    from rootnoise.participation import CyclicPoisson, Participation, SingleParticipation

    if (epsilon is None) == (noise_multiplier is None):
        raise RootnoiseError(
            "give exactly one of --epsilon and --noise-multiplier, "
            f"got epsilon={epsilon}, noise-multiplier={noise_multiplier}"
        )
    who: Participation = SingleParticipation()
    if sampling_probability is not None:
        if steps is None:
            raise RootnoiseError("steps must be given with --sampling-probability, got none")
        who = CyclicPoisson(groups, sampling_probability)
    elif groups != 1:
        raise RootnoiseError(f"groups must be 1 without --sampling-probability, got {groups}")
    n = 1 if steps is None else steps
    if noise_multiplier is None:
        assert epsilon is not None  # noqa: S101 - for the type checker
        noise_multiplier = accounting.noise_multiplier(who, n, epsilon, delta)
    cost = accounting.privacy_cost(who, n, noise_multiplier, delta)
    bound = "exact" if cost.exact else "an upper bound"
    claim = (
        f"({cost.epsilon:.6g}, {delta:g})-differential privacy for one record added, removed or "
        f"zeroed out; noise multiplier {noise_multiplier:.9g} times clip norm times sensitivity; "
        f"epsilon is {bound} ({cost.method})."
    )
    values = {
        "epsilon": cost.epsilon,
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "epsilon_exact": cost.exact,
        "method": cost.method,
        "claim": claim,
    }
    show("privacy account", values, json)

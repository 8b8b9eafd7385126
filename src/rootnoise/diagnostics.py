"""What could be better about a mechanism, in numbers, and how to improve it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rootnoise import accounting
from rootnoise._check import Array, RootnoiseError, integer, real
from rootnoise.bounds.certificate import Effort
from rootnoise.factorization import Factorization, default_bands, error, factorize
from rootnoise.mechanism import Mechanism
from rootnoise.participation import CyclicPoisson, FixedCycle, MinSeparation
from rootnoise.participation.sensitivity import sensitivity
from rootnoise.workload import SGD, MatrixWorkload, Workload, from_optimizer

# Strategies of p bands whose error falls with p up to the separation b.
BANDED = ("bsr", "bsr-gamma", "banded")
# Mechanisms that fit any workload, or do not depend on it.
ANY_WORKLOAD = ("bandmf", "dense", "epoch-scaled", "identity", "workload")
# A smaller relative gain is not worth a change, and may be an effect of rounding or of PLD grids.
SLIGHT = 0.01
# A workload farther than this from Toeplitz is reported.
FAR = 0.1
# Up to this many steps workloads are compared by entries, in 0.2 GB; beyond by norms.
ENTRIES = 2048
# Sine of the angle between what two workloads make of one sequence, where they count as the same.
ALIKE = 1e-6
# Beyond so many steps the error of another optimizer is not computed: it takes over a second.
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Finding:
    """One thing that could be better.

    Attributes:
        name: what kind of finding, as listed under `diagnose`.
        numbers: what was measured, by name; see `diagnose`.
        message: what is wrong, in one line.
        remedy: what to do about it, in one line.
    """

    name: str
    numbers: Mapping[str, float]
    message: str
    remedy: str


def diagnose(
    mechanism: Mechanism,
    *,
    batch_size: int | None = None,
    n_examples: int | None = None,
    n_parameters: int | None = None,
    gradient_norm: float | None = None,
    allowed_gap: float = 0.25,
    effort: Effort | str = Effort.FAST,
) -> list[Finding]:
    """Return what could be better about a mechanism; an empty list means that nothing was found.

    bands-too-few: the `gap` to the certified lower bound is above `allowed_gap`, and there are
    fewer `bands` than the separation. `remedy_bands` is the smallest p found that closes the gap,
    or the separation if none does; `remedy_gap` is the gap with that p. Toeplitz workloads only.

    sensitivity-is-a-bound: the sensitivity is not exact. `ratio` is the upper bound divided by a
    lower bound, so the noise is too large by at most that factor.

    workload-structure: a strategy made for a Toeplitz workload is used for one that is not.
    `distance` is min_c |A - c T|_F / |A|_F, where T is the neighbour that the strategy is made for;
    for a matrix, c T is the nearest Toeplitz matrix. Beyond 2048 steps it is a lower bound.

    noise-swamps-gradient (needs `batch_size` and `n_parameters`): `run_ratio` is the displacement
    of the iterates by n equal mean gradients of norm `gradient_norm`, divided by that by the noise,
    both as root mean square over the steps. If A has no negative entries, no other gradients of
    that norm give a larger displacement, so that below 1 noise dominates. `step_ratio` is the same
    for a single step; it may be small in a run that works, because noise averages out.

    amplification-would-win (needs `batch_size` and `n_examples`): `ratio` is the rmse of this
    mechanism divided by that of DP-SGD with Poisson batches of that mean size, at the same epsilon,
    delta, clip norm and number of steps.

    Args:
        mechanism: the mechanism to examine.
        batch_size: examples in a batch, the divisor of the mean.
        n_examples: examples in the data set.
        n_parameters: trainable parameters d.
        gradient_norm: typical l2 norm of the mean of the clipped gradients (default: its largest
            value, the clip norm).
        allowed_gap: largest gap to the optimum that is not reported.
        effort: effort for the lower bound, as in `lower_bound`.

    Raises:
        RootnoiseError: a value out of range, or one that needs another which is missing.

    >>> from rootnoise.workload import prefix_sum
    >>> cycle = FixedCycle(period=16, epochs=4)
    >>> split = factorize(prefix_sum(64), cycle, "bsr", bands=2)
    >>> [found] = diagnose(Mechanism.calibrate(split, cycle, epsilon=8, delta=1e-5))
    >>> found.name, found.numbers["remedy_bands"]
    ('bands-too-few', 8)
    """
    real("allowed_gap", allowed_gap, above=0)
    _check_data(mechanism, batch_size, n_examples, n_parameters, gradient_norm)
    findings = [
        _bands_too_few(mechanism, allowed_gap, effort),
        _sensitivity_is_a_bound(mechanism),
        _workload_structure(mechanism),
    ]
    if batch_size is not None and n_parameters is not None:
        norm = mechanism.clip_norm if gradient_norm is None else gradient_norm
        findings.append(_noise_swamps_gradient(mechanism, batch_size, n_parameters, norm))
    if batch_size is not None and n_examples is not None:
        findings.append(_amplification_would_win(mechanism, batch_size / n_examples))
    return [finding for finding in findings if finding is not None]


def _check_data(
    mechanism: Mechanism,
    batch_size: int | None,
    n_examples: int | None,
    n_parameters: int | None,
    gradient_norm: float | None,
) -> None:
    if n_examples is not None:
        integer("n_examples", n_examples, 1)
    if n_parameters is not None:
        integer("n_parameters", n_parameters, 1)
    if batch_size is not None:
        integer("batch_size", batch_size, 1, n_examples, high_name="n_examples")
    elif n_examples is not None or n_parameters is not None:
        raise RootnoiseError("batch_size must be given with n_examples or n_parameters, got None")
    if gradient_norm is not None:
        # A mean of clipped gradients cannot be longer.
        real("gradient_norm", gradient_norm, above=0, at_most=mechanism.clip_norm)
        if n_parameters is None:
            raise RootnoiseError("n_parameters must be given with gradient_norm, got None")


def _bands_too_few(m: Mechanism, allowed: float, effort: Effort | str) -> Finding | None:
    p, b = m.strategy.bands, default_bands(m.n_steps, m.participation)
    if m.name not in BANDED or p >= b or not m.workload.matrix.is_toeplitz:
        return None
    bound = m.certificate(effort)
    before = bound.gap(m.rmse)
    if before <= allowed:
        return None

    def gap(bands: int) -> float:
        split = factorize(m.workload, m.participation, m.name, bands=bands)
        return bound.gap(split.rmse(m.participation))

    low, high = p, min(2 * p, b)
    while (after := gap(high)) > allowed and high < b:
        low, high = high, min(2 * high, b)
    closed = after <= allowed
    while closed and high - low > 1:
        middle = (low + high) // 2
        if (found := gap(middle)) <= allowed:
            high, after = middle, found
        else:
            low = middle
    if not closed and before - after <= SLIGHT * (1 + before):
        return None
    left = "" if closed else ", the best that bands up to the separation do"
    return Finding(
        "bands-too-few",
        {"gap": before, "bands": p, "remedy_bands": high, "remedy_gap": after},
        f"{p} band(s) leave the error up to {before:.1%} above the optimum",
        f"--bands {high}: at most {after:.1%} above it{left}",
    )


def _sensitivity_is_a_bound(m: Mechanism) -> Finding | None:
    who = m.participation
    if m.sensitivity.exact or not isinstance(who, FixedCycle | MinSeparation):
        return None
    steps = np.arange(who.max_participations) * who.min_sep
    person = np.zeros(m.n_steps)
    person[steps] = 1.0
    # Averaged over random signs, |C u|^2 is the sum of the squared column norms: some u reach it.
    signed = float(np.linalg.norm(m.strategy.column_norms()[steps]))
    reached = max(float(np.linalg.norm(m.strategy.apply(person))), signed)
    ratio = m.sensitivity.value / reached
    if ratio <= 1 + SLIGHT:
        return None
    return Finding(
        "sensitivity-is-a-bound",
        {"ratio": ratio, "bound": m.sensitivity.value, "reached": reached},
        f"{_irregular(m)}, so the sensitivity is only a bound ({m.sensitivity.method}) "
        f"and the noise may be up to {ratio - 1:.1%} too large",
        f"--mechanism banded --bands {who.min_sep}: up to the separation it is exact for any "
        "coefficients",
    )


def _irregular(m: Mechanism) -> str:
    """Say why the theorems on exact sensitivity do not apply."""
    c = m.strategy.coefficients
    if c is None:
        return "the strategy is not Toeplitz and its columns overlap"
    if c.min() < 0:
        return f"the strategy's coefficients fall below 0 (to {c.min():.3g})"
    return f"the strategy's coefficients increase (by up to {np.diff(c).max():.3g} a step)"


def _workload_structure(m: Mechanism) -> Finding | None:
    if m.name in ANY_WORKLOAD or m.workload.matrix.is_toeplitz:
        return None
    distance, exact = _distance(m)
    if distance <= FAR:
        return None
    least = "" if exact else "at least "
    given = isinstance(m.workload, MatrixWorkload)
    nearest = "Toeplitz one" if given else "multiple of the one with mean settings"
    return Finding(
        "workload-structure",
        {"distance": distance},
        f"the workload is {least}{distance:.1%} of its norm away from any {nearest}",
        "--mechanism epoch-scaled, or dense up to 4096 steps, which fit the workload itself",
    )


def _distance(m: Mechanism) -> tuple[float, bool]:
    """Return the relative distance to Toeplitz, and whether it is exact, not only a lower bound."""
    matrix, n = m.workload.matrix, m.n_steps
    if isinstance(m.workload, MatrixWorkload):
        a = matrix.dense()
        square = sum(float(np.var(d)) * d.size for d in (np.diagonal(a, -j) for j in range(n)))
        return math.sqrt(square) / float(np.linalg.norm(a)), True
    near = m.workload.neighbour.matrix
    if n <= ENTRIES:
        return _sine(matrix.dense().ravel(), near.dense().ravel()), True
    # |a_i - c t_i| >= ||a_i| - |c t_i|| for every row, and for every column.
    rows = _sine(matrix.row_norms(), near.row_norms())
    return max(rows, _sine(matrix.column_norms(), near.column_norms())), False


def _sine(x: Array, y: Array) -> float:
    """Return min_c |x - c y| / |x|, however small or large x and y are."""
    x, y = (v / np.abs(v).max() for v in (x, y))
    cosine = float(x @ y) / float(np.linalg.norm(x) * np.linalg.norm(y))
    return math.sqrt(max(0.0, 1 - cosine**2))


def _noise_swamps_gradient(m: Mechanism, batch_size: int, d: int, norm: float) -> Finding | None:
    n = m.n_steps
    moved = norm * float(np.linalg.norm(m.workload.matrix.apply(np.ones(n)))) / math.sqrt(n)
    one = m.clip_norm * math.sqrt(d) / batch_size  # at noise multiplier and rmse 1
    run = moved / (m.noise_multiplier * m.rmse * one)
    if run >= 1:
        return None
    rows = error.rmse(m.noising, m.sensitivity.value)
    step = norm / (m.noise_multiplier * rows * one)
    return Finding(
        "noise-swamps-gradient",
        {"run_ratio": run, "step_ratio": step},
        f"equal gradients of norm {norm:g} move the iterates {run:.3g} times as far as the noise "
        f"({step:.3g} times in one step)",
        f"less noise, by a factor of {1 / run:.3g}: larger batches, fewer trainable parameters or "
        "a larger epsilon",
    )


def _amplification_would_win(m: Mechanism, probability: float) -> Finding | None:
    who = m.participation
    is_dpsgd = isinstance(who, CyclicPoisson) and who.groups == 1
    if is_dpsgd or m.epsilon == 0 or m.trials is not None:  # no trials of random steps
        return None
    poisson = CyclicPoisson(1, probability)
    sigma = accounting.noise_multiplier(poisson, m.n_steps, m.epsilon, m.delta, SLIGHT)
    # For independent noise C = Id, which has sensitivity 1 under Poisson sampling, and B = A.
    ratio = m.rmse * m.noise_multiplier / (error.rmse(m.workload.matrix, 1.0) * sigma)
    if ratio <= 1 + SLIGHT:
        return None
    return Finding(
        "amplification-would-win",
        {"ratio": ratio, "noise_multiplier": sigma},
        f"the error is {ratio:.3g} times that of DP-SGD at epsilon {m.epsilon:.4g}, where Poisson "
        f"sampling with probability {probability:.3g} gains more than correlation",
        f"--mechanism dpsgd, with noise multiplier {sigma:.4g}",
    )


def mismatch(mechanism: Mechanism, optimizer: Any, *, decay: float = 1.0) -> str:
    """Return a warning if the noise was planned for another optimizer, or an empty string.

    The loss compares the rmse, at the same noise multiplier, with that of a banded square root of
    the optimizer's own workload with as many bands; other mechanisms may gain more. Independent
    noise suits every optimizer equally. An optimizer that already has a scheduler is not judged,
    because its rates are not known.

    Args:
        mechanism: its workload is what the noise was planned for.
        optimizer: a torch optimizer of the model's parameters; it is not changed.
        decay: factor alpha on the parameters before each step, as in `PrivateOptimizer`.

    >>> import torch
    >>> from rootnoise.participation import FixedCycle
    >>> cycle = FixedCycle(period=20, epochs=3)
    >>> split = factorize(SGD(60, momentum=0.9), cycle, "bsr")
    >>> made = Mechanism.calibrate(split, cycle, epsilon=2.0, delta=1e-5)
    >>> weights = [torch.nn.Parameter(torch.zeros(2))]
    >>> mismatch(made, torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    ''
    >>> print(mismatch(made, torch.optim.SGD(weights, lr=0.1)))
    optimizer should be the one that the noise was planned for, got SGD: epsilon holds, but the
    error is ...% larger than with noise planned for it (from_optimizer, or make_private)
    """
    if mechanism.strategy.bands == 1 or any("initial_lr" in g for g in optimizer.param_groups):
        return ""
    kind = type(optimizer).__name__
    rule = f"optimizer should be the one that the noise was planned for, got {kind}: epsilon holds"
    cure = "(from_optimizer, or make_private)"
    try:
        actual = _of_optimizer(optimizer, mechanism.n_steps, decay)
    except RootnoiseError as reason:
        return f"{rule}, but how large the error is cannot be said ({reason})"
    if actual is None or _alike(mechanism.workload, actual):
        return ""
    if mechanism.n_steps > MOST_STEPS:
        return f"{rule}, but the error is larger than with noise planned for it {cure}"
    with np.errstate(all="ignore"):  # rates beyond float64's range have no rmse
        loss = _rmse_for(mechanism, mechanism.strategy, actual) / _best_rmse(mechanism, actual) - 1
    if not loss >= SLIGHT:
        return ""
    return f"{rule}, but the error is {loss:.0%} larger than with noise planned for it {cure}"


def _of_optimizer(optimizer: Any, n: int, decay: float) -> Workload | None:
    """Return the workload of optimizer and decay, or None if it is not known."""
    if decay == 1:
        return from_optimizer(optimizer, n)
    group: dict[str, Any] = optimizer.param_groups[0]
    if any(group.get(name) for name in ("weight_decay", "dampening", "nesterov")):
        return None
    return SGD(n, momentum=float(group.get("momentum", 0.0)), decay=decay)


def _alike(planned: Workload, actual: Workload) -> bool:
    """Whether two workloads agree up to a factor, judged by their outputs for one random input."""
    g = np.random.default_rng(0).standard_normal(planned.n_steps)
    return _sine(planned.matrix.apply(g), actual.matrix.apply(g)) < ALIKE


def _rmse_for(mechanism: Mechanism, strategy: Any, actual: Workload) -> float:
    split = Factorization(mechanism.name, actual, strategy)
    return error.rmse(split.decoder, sensitivity(strategy, mechanism.participation).value)


def _best_rmse(mechanism: Mechanism, actual: Workload) -> float:
    """Return the rmse of the strategy that a mechanism is compared with."""
    own = factorize(actual, mechanism.participation, "bsr", bands=mechanism.strategy.bands)
    return error.rmse(own.decoder, sensitivity(own.strategy, mechanism.participation).value)

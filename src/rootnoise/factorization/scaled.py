"""Column-scaled variants of a Toeplitz strategy: unit columns, and one scale an epoch.

C' = C diag(s_t / |c_t|), with c_t column t, costs a stream nothing: the noise of step t is
multiplied by |c_t| / s_t. Where C has at most b bands, columns b or more steps apart stay
orthogonal, so

    sens^2 = max over the patterns of one person of the sum of their s_t^2.

One scale s_e for each window of b steps makes that sum_e s_e^2 exactly, for the fixed cycle and for
the minimum separation alike: no person is twice in a window, and someone is once in every one. In a
fixed cycle a person is always in the same part of an epoch, so that each part may have scales of
its own: s_ei in part i of epoch e with sum_e s_ei^2 = 1 for every i.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rootnoise._check import Array, RootnoiseError
from rootnoise.causal import Diagonal, Product, chain, product_norms
from rootnoise.causal.product import decaying
from rootnoise.factorization.base import (
    Factorization,
    Progress,
    Search,
    default_bands,
    factorize,
    register,
)
from rootnoise.factorization.lbfgs import lbfgs
from rootnoise.participation import FixedCycle, MinSeparation, Participation
from rootnoise.workload import Workload

# The inverse of p bands dies out after some 32 p steps, and errors take their square in time: 10 s.
TRANSIENT, LONGEST = 32, 2**16
# Parts of an epoch in a fixed cycle, and scales in all: with a falling rate over 4 epochs, 1, 4, 16
# and 120 parts leave a gap of 6.8, 5.1, 3.6 and 2.3 %; a steady one gains 0.2 %.
PARTS, MOST_SCALES = 16, 1024


@register("column-normalised")
def column_normalised(
    workload: Workload,
    participation: Participation,
    base: str = "bsr",
    bands: int | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C of the mechanism `base` with columns of norm 1 (Choquette-Choo et al. 2023).

    The last columns of a Toeplitz map are shorter, though they may be a person's too: unit columns
    make use of that, at no cost in sensitivity where n is a multiple of b. With BSR and single
    participation this is the column-normalised square root, in O(n^2) time for its error.

    Raises:
        RootnoiseError: more bands than the separation, where one person takes part more than once,
            or so many that errors would take O(n^2) time beyond 65,536 steps.
    """
    _, search = _search("column-normalised", workload, participation, base, bands, progress)
    search(np.ones(workload.n_steps))
    return search.best


@register("epoch-scaled")
def epoch_scaled(
    workload: Workload,
    participation: Participation,
    base: str = "bsr",
    bands: int | None = None,
    progress: Progress | None = None,
) -> Factorization:
    """C of the mechanism `base` with unit columns times the best scale for each epoch.

    The noise of early steps stays in all later iterates, so that they deserve larger columns, that
    is, less noise. With H_ef the sum of (A^T A)_ij (C^-1 C^-T)_ij |c_i| |c_j| over the steps i of
    epoch e and j of epoch f, s minimises

        rmse^2 = sum_e s_e^2 * sum_ef H_ef / (s_e s_f) / n.

    A fixed cycle has a scale for each of 16 parts of an epoch, whose squares sum to 1 over epochs.
    Any `base` with a banded strategy will do: bsr, bsr-gamma, banded. For 5 to 20 epochs rmse falls
    by 2 to 5 %, and with a learning rate that falls to zero by a fifth.

    Raises:
        RootnoiseError: more bands than the separation, where one person takes part more than once,
            or so many that errors would take O(n^2) time beyond 65,536 steps.

    >>> from rootnoise.workload import prefix_sum
    >>> epoch_scaled(prefix_sum(6), MinSeparation(3, 2)).strategy.column_norms().round(3)
    array([1.081, 1.081, 1.081, 0.912, 0.912, 0.912])
    """
    n = workload.n_steps
    plain, search = _search("epoch-scaled", workload, participation, base, bands, progress)
    search(np.ones(n))
    match participation:
        case MinSeparation(b, k) | FixedCycle(b, k) if k > 1:
            fixed = isinstance(participation, FixedCycle)
            parts = max(1, min(PARTS, b, MOST_SCALES // k)) if fixed else 1
            steps = np.arange(n)
            # With more windows than participations the last ones share a scale: k of them count.
            labels = np.minimum(steps // b, k - 1) * parts + steps % b * parts // b
            search(_scales(_block_sums(plain, labels), parts)[labels])
    return search.best


def _search(
    name: str,
    workload: Workload,
    participation: Participation,
    base: str,
    bands: int | None,
    progress: Progress | None,
) -> tuple[Factorization, Search]:
    """Return the base and a search over the column norms s, where None keeps those of the base."""
    plain = factorize(workload, participation, base, bands=bands)
    n = workload.n_steps
    b = default_bands(n, participation)
    if plain.strategy.bands > b:
        raise RootnoiseError(
            f"bands must be in [1, {b}] for scaled columns, got {plain.strategy.bands} ({base})"
        )
    if min(n, TRANSIENT * plain.strategy.bands) > LONGEST:
        raise RootnoiseError(
            f"bands must be in [1, {LONGEST // TRANSIENT}] for scaled columns of n_steps={n}, "
            f"got {plain.strategy.bands} ({base})"
        )
    norms = plain.strategy.column_norms()

    def build(scales: Array | None) -> Factorization:
        if scales is None:
            return replace(plain, mechanism=name)
        strategy = Product(plain.strategy, Diagonal(scales / norms))
        return Factorization(name, workload, strategy)

    search = Search(build, participation, progress)
    search(None)
    return plain, search


def _block_sums(plain: Factorization, labels: NDArray[np.int64]) -> Array:
    """Return H, shape (k, k), by the cheapest way that the workload leaves."""
    work, noising, norms = plain.workload, plain.noising, plain.strategy.column_norms()
    parts = chain(Product(work.matrix, Product(Diagonal(norms), noising)))
    if (found := decaying(parts)) is not None:
        return product_norms.block_sums_after_decay(*found, labels)
    match parts:
        case [("toeplitz", a), ("diagonal", g), ("toeplitz", m)]:
            return product_norms.block_sums(a, g, m, labels)
    if noising.is_toeplitz and work.recurrence.state_size**2 <= work.n_steps:
        gram = product_norms.streamed_gram(work.recurrence)
        return product_norms.block_sums_by_lags(gram, norms, noising.column(0), labels)
    b, m = work.matrix.dense(), noising.dense()
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    rows = np.add.reduceat((b.T @ b) * (m @ m.T) * np.outer(norms, norms), first, axis=0)
    return np.add.reduceat(rows, first, axis=1)


def _scales(h: Array, parts: int) -> Array:
    """Return the s that minimise sum_ef H_ef / (s_e s_f) where a person has mean square 1.

    Entries e, e + parts, e + 2 parts, ... of s are one person's.
    """
    person = np.arange(len(h)) % parts

    def shares(u: Array) -> Array:
        squares = np.exp(2 * u)
        return np.asarray(squares / np.bincount(person, squares)[person])

    def objective(u: Array) -> tuple[float, Array]:
        share = shares(u)
        error = (h @ share**-0.5) * share**-0.5
        total = error.sum()
        slope = -2 * error / total
        return float(np.log(total)), slope - share * np.bincount(person, slope)[person]

    u = lbfgs(objective, np.zeros(len(h)), ftol=1e-15, gtol=1e-10, most=1000, memory=10)
    return np.asarray(np.sqrt(shares(u) * -(-len(h) // parts)))

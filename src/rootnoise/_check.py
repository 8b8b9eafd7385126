"""One-line argument checks; imports nothing of ours."""

from __future__ import annotations

import difflib
import math
import operator
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class RootnoiseError(ValueError):
    """The one exception of this package: one line that names the value, the rule and what came.

    It is raised before anything un-noised is released; the command line prints it and exits with 2.
    """


def extra(module: str, name: str, what: str) -> Any:
    """Import a module that the extra `name` installs, or say that `what` needs it.

    Every module of the package loads without its extras; what uses one asks here first.
    """
    try:
        return import_module(module)
    except ImportError:
        needed = module.split(".", maxsplit=1)[0]
        raise RootnoiseError(f"{what} needs {needed}: pip install 'rootnoise[{name}]'") from None


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither of this package nor of torch: the user's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("rootnoise.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_of_delta(delta: float, n_examples: int) -> None:
    """Warn of a delta that allows to publish one of the records whole.

    Whoever publishes a record drawn at random is (0, 1/n)-differentially private (Dwork and Roth,
    2014, section 2.3).

    >>> warn_of_delta(1e-5, 1000)
    """
    if n_examples and delta >= 1 / n_examples:
        warn(
            f"delta should be well below 1/{n_examples}={1 / n_examples:.2g}, one over the number "
            f"of records, got {delta:g}: it allows to publish a record whole, whatever epsilon is"
        )


def integer(
    name: str,
    value: SupportsIndex,
    low: int | None = None,
    high: int | None = None,
    *,
    high_name: str | None = None,
) -> int:
    """Return `value` as an int inside [low, high], or refuse it; NumPy integers pass, bools do not.

    >>> integer("bands", 0, 1, 100, high_name="n_steps")
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: bands must be in [1, n_steps=100], got 0
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise RootnoiseError(f"{name} must be an integer, got {value!r}") from None
    if (low is not None and result < low) or (high is not None and result > high):
        if high is None:
            rule = f">= {low}"
        else:
            top = f"{high_name}={high}" if high_name else f"{high}"
            rule = f"<= {top}" if low is None else f"in [{low}, {top}]"
        bits = result.bit_length()
        got = f"{result}" if bits < 1024 else f"one of {bits} bits"  # Python prints 4300 digits
        raise RootnoiseError(f"{name} must be {rule}, got {got}")
    return result


def real(
    name: str,
    value: SupportsFloat,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` as a finite float inside the stated interval, or refuse it.

    >>> real("delta", 1.0, above=0, below=1)
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: delta must be a finite number > 0 and < 1, got 1.0
    """
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        result = float(value)
    except OverflowError:
        raise RootnoiseError(f"{name} must be a finite number, got one beyond 1e308") from None
    except (TypeError, ValueError):
        raise RootnoiseError(f"{name} must be a number, got {value!r}") from None
    # Written so that NaN fails every comparison it takes part in.
    inside = (
        math.isfinite(result)
        and (above is None or result > above)
        and (at_least is None or result >= at_least)
        and (below is None or result < below)
        and (at_most is None or result <= at_most)
    )
    if not inside:
        bounds = [(">", above), (">=", at_least), ("<", below), ("<=", at_most)]
        rule = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise RootnoiseError(f"{name} must be a finite number {rule}".rstrip() + f", got {result}")
    return result


def one_of(name: str, value: object, known: Iterable[str], among: str = "") -> None:
    """Refuse a value that is none of the known names, and say which of them is near.

    >>> one_of("mechanism", "brs", ["bsr", "blt"])
    Traceback (most recent call last):
    rootnoise._check.RootnoiseError: mechanism must be one of bsr, blt, got 'brs': perhaps bsr
    """
    known = list(known)
    if value in known:
        return
    near = difflib.get_close_matches(f"{value}", known, 1)
    perhaps = f": perhaps {near[0]}" if near else ""
    raise RootnoiseError(f"{name} must be one of {', '.join(known)}{among}, got {value!r}{perhaps}")


def clip_range(clip_norm: float) -> float:
    """Return the clip norm if float32 can clip to it, or refuse it.

    Norms are taken of float32 squares. Below 1e-19 these vanish, and a gradient of 1e12 such
    numbers, of norm 1e-13 together, would pass for zero: what is lost must stay under 1e-6 of the
    clip norm squared. Above 1e10 the squares of what is clipped come near infinity.
    """
    return real("clip_norm", clip_norm, at_least=1e-10, at_most=1e10)


def vector(name: str, value: ArrayLike) -> Array:
    """Return a private, read-only, finite, non-empty 1-D float64 copy of `value`, or refuse it."""
    return _array(name, value, 1)


def matrix(name: str, value: ArrayLike, *, square: bool = True) -> Array:
    """Return a private, read-only, finite, non-empty 2-D float64 copy, or refuse it."""
    result = _array(name, value, 2)
    if square and result.shape[0] != result.shape[1]:
        raise RootnoiseError(f"{name} must be square, got shape {result.shape}")
    return result


def set_fields(value: object, **checked: Any) -> None:
    """Set fields of a frozen dataclass, from within its own `__post_init__`."""
    for name, field in checked.items():
        object.__setattr__(value, name, field)


def same(name: str, ours: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a saved state that lacks a field of ours, or holds another value there."""
    for field, value in ours.items():
        if field not in saved or saved[field] != value:
            raise RootnoiseError(
                f"saved {name}'s {field} must be {value!r}, got {saved.get(field)!r}"
            )


def _array(name: str, value: ArrayLike, ndim: int) -> Array:
    try:
        result = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise RootnoiseError(f"{name} must be an array of numbers, got {value!r:.60}") from None
    if result.ndim != ndim or result.size == 0:
        raise RootnoiseError(f"{name} must be a non-empty {ndim}-D array, got shape {result.shape}")
    bad = np.count_nonzero(~np.isfinite(result))
    if bad:
        raise RootnoiseError(f"{name} must be finite, got {bad} NaN or infinite entries")
    result.flags.writeable = False
    return result


def refuse_edits(expected: Any, found: Any, where: str = "") -> None:
    """Compare a recomputed tree with the stored one; machines may round floats differently.

    Args:
        expected: computed from the definition in `found`.
        found: as it was stored.
        where: the place of both in the file.

    Raises:
        RootnoiseError: something differs.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key, value in expected.items():
            refuse_edits(value, found[key], f"{where}.{key}" if where else key)
        return
    # The definition was read from this very file, so that it is compared with itself.
    same = found == expected and type(found) is type(expected)
    # Of the optimality only the gap is computed anew, by IEEE arithmetic that is the same anywhere.
    exact = where.startswith("optimality")
    if not same and not exact and isinstance(expected, float) and isinstance(found, int | float):
        same = math.isclose(expected, found, rel_tol=1e-9)
    if not same:
        raise RootnoiseError(
            f"{where or 'file'} must match what its definition gives, "
            f"{expected!r:.80}, got {found!r:.80}"
        )

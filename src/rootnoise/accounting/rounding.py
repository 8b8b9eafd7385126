"""Numbers as people read them, never below what was computed."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal


def round_up(value: float, digits: int = 6) -> str:
    """Return a decimal of `digits` significant digits that is at least the positive `value`.

    An epsilon or a noise multiplier that is shown must not be less than the one that was found.

    >>> round_up(2.0000001), round_up(0.1), round_up(1e-300)
    ('2.00001', '0.1', '1e-300')
    """
    up = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(value))))
    return f"{float(up):.{digits}g}"

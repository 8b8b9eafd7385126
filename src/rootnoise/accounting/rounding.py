"""Numbers as people read them, on the private side of what was computed."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


def round_up(value: float, digits: int = 6) -> str:
    """Return a decimal of `digits` significant digits that is at least the positive `value`.

    An epsilon or a noise multiplier that is shown must not be less than the one that was found.

    >>> round_up(2.0000001), round_up(0.1), round_up(1e-300)
    ('2.00001', '0.1', '1e-300')
    """
    up = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(value))))
    return f"{float(up):.{digits}g}"


def round_down(value: float, digits: int = 9) -> str:
    """Return a decimal of `digits` significant digits that is at most the positive `value`.

    Noise that is claimed must not be more than is there. A relative excess of 1e-12 is allowed:
    machines round the last digits of a product differently, and a claim is compared as text.

    >>> round_down(0.12345678999), round_down(0.3)
    ('0.123456789', '0.3')
    """
    number = Decimal(repr(float(value) * (1 + 1e-12)))
    down = Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(number)
    return f"{float(down):.{digits}g}"


def exactly(value: float) -> str:
    """Return the fewest digits that identify the number.

    >>> exactly(2.0), exactly(0.1), exactly(2.1234567890123)
    ('2', '0.1', '2.1234567890123')
    """
    return repr(float(value)).removesuffix(".0")

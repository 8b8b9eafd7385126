"""Command lines as the tests give them."""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[..., tuple[int, str, str]]


def refused(call: Call, *arguments: object) -> str:
    """Return the one line of a refusal; `call` is the fixture."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err

"""The examples of docstrings are shown as code: Markdown would take `>>>` for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt at the margin to the next empty line.
_EXAMPLE = re.compile(r"^>>> (?:.*\n)*?(?=\n|\Z)|^>>> .*\Z", re.MULTILINE)


def fenced(text: str) -> str:
    """Return a docstring with its examples in fences."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text + "\n")


class Doctests(griffe.Extension):
    """Changes the docstrings that the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the examples of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value).rstrip()

"""The page of the comparison: what stands between its marks is made of a result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rootnoise._check import RootnoiseError
from rootnoise.cli.bench.tables import tables
from rootnoise.cli.bench.words import words

MARK = re.compile(r"(<!-- (table|words) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(page: str, found: Mapping[str, Mapping[str, str]]) -> str:
    r"""Return the page with what stands between its marks written anew.

    Args:
        page: Markdown with marks.
        found: what there is, by kind ("table" or "words") and name.

    Raises:
        RootnoiseError: a mark that names none.

    >>> print(written("<!-- words a -->\nold\n<!-- end -->", {"words": {"a": "New.\n"}}))
    <!-- words a -->
    <BLANKLINE>
    New.
    <BLANKLINE>
    <!-- end -->
    """

    def write(mark: re.Match[str]) -> str:
        start, kind, name, end = mark.groups()
        if name not in found[kind]:
            raise RootnoiseError(f"{kind} must be one of {', '.join(found[kind])}, got {name}")
        # Markdown takes what follows a comment at once for a part of it.
        return f"{start}\n{found[kind][name]}\n{end}"

    return MARK.sub(write, page)


def fill(page: str, result: Mapping[str, Any]) -> str:
    """Return the page of the comparison with the tables and passages of this result."""
    made = {name: table.markdown() for name, table in tables(result).items()}
    return written(page, {"table": made, "words": words(result)})

"""The experiments of Kalinin & Lampert (2024), one part a file, behind `rootnoise reproduce`.

A part computes tables, writes them as CSV, draws them, and judges the paper's claims by them. The
page is made from the tables in the folder, so that parts can be run one by one.
"""

from __future__ import annotations

from importlib import import_module

from rootnoise._check import RootnoiseError
from rootnoise.lab.reproduce import part as _part
from rootnoise.lab.reproduce.page import write_page
from rootnoise.lab.reproduce.part import Part, Report, Settings

PARTS = ("errors", "bounds", "runtime", "limits", "accuracy")


def find(name: str) -> Part:
    """Return a part by name.

    Raises:
        RootnoiseError: there is none.
    """
    if name not in PARTS:
        raise RootnoiseError(f"part must be one of {', '.join(PARTS)}, got {name!r}")
    found = import_module(f"rootnoise.lab.reproduce.{name}").PART
    assert isinstance(found, Part)  # noqa: S101 - for the type checker
    return found


def reproduce(name: str, settings: Settings, report: Report) -> Part:
    """Run one part: its tables as CSV, its figures as PNG, and the page anew.

    Raises:
        RootnoiseError: an unknown part, or a folder that cannot be written.
    """
    part = find(name)
    if settings.out.exists() and not settings.out.is_dir():
        raise RootnoiseError(f"out must be a folder, got the file {settings.out}")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        tables = part.compute(settings, report)
        for title, rows in tables.items():
            _part.write(settings.out / f"{name}-{title}.csv", rows)
        for file, figure in part.figures(tables).items():
            figure.savefig(settings.out / file)
        write_page(settings.out, [find(each) for each in PARTS])
    except OSError as reason:
        raise RootnoiseError(
            f"out must be writable, got {settings.out}: {reason.strerror}"
        ) from None
    return part

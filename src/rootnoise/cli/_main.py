"""All commands as one program; errors and Ctrl-C become one line and a status."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import rootnoise
from rootnoise._check import RootnoiseError
from rootnoise.cli.account import account
from rootnoise.cli.audit import audit
from rootnoise.cli.bench.command import bench
from rootnoise.cli.demo import demo
from rootnoise.cli.diagnose import diagnose
from rootnoise.cli.factorize import factorize
from rootnoise.cli.plan import plan
from rootnoise.cli.predict import predict
from rootnoise.cli.report import compare, report
from rootnoise.cli.train import train
from rootnoise.cli.tune import tune

# Boxes need this many columns, or they cut the names of options short.
BOXES = 70


class _Readable:
    """Shows flags without a type in the help, since they take no value, and no boxes if narrow."""

    def format_help(self, context: Any, formatter: Any) -> None:
        if shutil.get_terminal_size().columns < BOXES:
            vars(self)["rich_markup_mode"] = None
        super().format_help(context, formatter)  # type: ignore[misc]

    def get_params(self, context: Any) -> list[Any]:
        found: list[Any] = super().get_params(context)  # type: ignore[misc]
        for option in found:
            if getattr(option, "is_flag", False) and option.metavar is None:
                option.metavar = ""
        return found


class _Command(_Readable, TyperCommand):
    pass


class _Group(_Readable, TyperGroup):
    pass


app = typer.Typer(
    cls=_Group,
    name="rootnoise",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(plan, factorize, account, diagnose, train, tune),
    *(predict, report, compare, audit, bench, demo),
)
for command in COMMANDS:
    first = " ".join((command.__doc__ or "").split("\n\n")[0].split())
    app.command(cls=_Command, short_help=first)(command)  # given, it is not cut short


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rootnoise {rootnoise.__version__}")
        raise typer.Exit


@app.callback()
def _rootnoise(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Differentially private training for PyTorch with correlated noise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 after one line on standard error.

    >>> main(["account", "--epsilon", "1", "--delta", "2"])
    2
    """
    usual, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        status = app(arguments, prog_name="rootnoise", standalone_mode=False)
        sys.stdout.flush()
    except RootnoiseError as refusal:
        return _refuse(str(refusal))
    except (typer.Abort, KeyboardInterrupt):  # some releases of typer return 130 instead
        return 130
    except MemoryError as reason:
        return _refuse(f"memory must suffice (a shorter run needs less), got {reason}")
    except OSError as reason:  # a full disk, a closed pipe
        _drop_output()
        return _refuse(f"output must be writable, got {reason.filename or ''} {reason.strerror}")
    except Exception as usage:  # click's error, whose place in typer differs between releases
        if not hasattr(usage, "format_message"):
            raise
        return _refuse(usage.format_message())
    finally:
        warnings.formatwarning = usual
    return int(status or 0)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a warning as people read it, without the line of code that gave it."""
    return "warning: " + " ".join(str(message).split()) + "\n"


def _drop_output() -> None:
    """Drop unwritten output, since Python would report a second error when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    if message:
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2

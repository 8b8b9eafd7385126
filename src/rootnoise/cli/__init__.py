"""The command line: `rootnoise COMMAND --help`. Importing it imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from rootnoise._check import RootnoiseError
from rootnoise.cli.account import account
from rootnoise.cli.audit import audit
from rootnoise.cli.demo import demo
from rootnoise.cli.diagnose import diagnose
from rootnoise.cli.factorize import factorize
from rootnoise.cli.plan import plan
from rootnoise.cli.report import compare, report
from rootnoise.cli.train import train

# The base of every usage error; typer names it differently from one release to the next.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="rootnoise",
    help="Differentially private training for PyTorch with correlated noise.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (plan, factorize, account, diagnose, train, report, compare, audit, demo):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 after one line on standard error.

    >>> main(["account", "--epsilon", "1", "--delta", "2"])
    2
    """
    try:
        status = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except RootnoiseError as refusal:
        return _refuse(str(refusal))
    except _UsageError as usage:
        return _refuse(usage.format_message())  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):  # some releases of typer return 130 themselves
        return 130
    except MemoryError as reason:
        return _refuse(f"memory must suffice (a shorter run needs less), got {reason}")
    except OSError as reason:  # a full disk, a closed pipe
        _drop_output()
        return _refuse(f"output must be writable, got {reason.filename or ''} {reason.strerror}")
    return int(status or 0)


def _drop_output() -> None:
    """Let nothing be written at exit to an output that cannot be: Python would say so once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    if message:
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2

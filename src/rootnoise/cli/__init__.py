"""The command line: `rootnoise COMMAND --help`. Importing it imports no torch."""

from rootnoise.cli._main import app, main

__all__ = ["app", "main"]

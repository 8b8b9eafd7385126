"""The configuration of a run as options of federated_loop.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from federated_loop import parser

from rootnoise import RootnoiseError


def options_of(context) -> argparse.Namespace:
    """Return the options: those of [tool.flwr.app.config] and of --run-config."""
    found = parser().parse_args([])
    for name, value in context.run_config.items():
        setattr(found, name.replace("-", "_"), None if value == "" else value)
    for name in ("data_dir", "out"):
        folder = getattr(found, name)
        if folder is not None and not Path(folder).is_absolute():
            rule = "must be an absolute path, since Flower runs apps in a folder of its own"
            raise RootnoiseError(f"{name.replace('_', '-')} {rule}, got {folder!r}")
    return found

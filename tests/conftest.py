"""What every test shares: one thread a process, and the same hypothesis cases in every run."""

import os
from importlib.util import find_spec

# Set before NumPy or torch load: `make test` runs several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# Seeded, so that a pass is a pass everywhere; and no result depends on a machine's speed.
settings.register_profile(
    "rootnoise",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("rootnoise")

# What runs beside Flower needs it at import; see `make flower`.
collect_ignore = [] if find_spec("flwr") else ["flower_runs.py"]


@pytest.fixture
def call(capsys):
    """Run a command line; return its status, standard output and standard error."""
    from rootnoise.cli import main

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def call_in_folder(call, tmp_path, monkeypatch):
    """Run command lines as `call` does, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return call

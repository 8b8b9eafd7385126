"""What every test shares: one thread a process, and the same hypothesis cases in every run."""

import os
from importlib.util import find_spec

# Set before NumPy or torch load: `make test` runs several processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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

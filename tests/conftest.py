"""What every test shares: one thread a process, and the same hypothesis cases in every run."""

import os

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

"""rootnoise: differentially private training for PyTorch with correlated noise.

One flow: Workload -> Factorization -> Mechanism -> NoiseStream -> training. Names are imported on
first use, so `import rootnoise` needs neither torch nor the accountant, nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rootnoise._check import RootnoiseError
    from rootnoise.accounting import (
        MonteCarlo,
        PrivacyCost,
        Trials,
        noise_multiplier,
        privacy_cost,
        tuned_noise_multiplier,
        tuned_privacy_cost,
    )
    from rootnoise.bounds.certificate import Certificate, check, lower_bound
    from rootnoise.causal import CausalMatrix, Dense, Diagonal, Inverse, Product, Toeplitz
    from rootnoise.causal.banded import Banded
    from rootnoise.causal.buffered import BufferedToeplitz
    from rootnoise.diagnostics import Finding, diagnose
    from rootnoise.factorization import Factorization, default_bands, factorize, mechanisms
    from rootnoise.front_door import evaluate, make_private
    from rootnoise.keys import Key
    from rootnoise.mechanism import Mechanism
    from rootnoise.noise import NoiseStream
    from rootnoise.participation import (
        BallsInBins,
        CyclicPoisson,
        FixedCycle,
        MinSeparation,
        MinSepPoisson,
        Participation,
        SingleParticipation,
    )
    from rootnoise.participation.ledger import Ledger
    from rootnoise.participation.loader import data_loader
    from rootnoise.participation.samplers import (
        BallsInBinsSampler,
        CyclicPoissonSampler,
        FixedCycleSampler,
        MinSeparationSampler,
        MinSepPoissonSampler,
        OwnBatches,
    )
    from rootnoise.participation.sensitivity import Sensitivity
    from rootnoise.planner import Job, plan
    from rootnoise.training import PrivateOptimizer, privatize
    from rootnoise.workload import (
        SGD,
        MatrixWorkload,
        ScheduledSGD,
        ToeplitzWorkload,
        Workload,
        from_optimizer,
        prefix_sum,
    )

# No public name may be that of a submodule: importing the submodule would silently replace it.
_MODULES = {
    "_check": ("RootnoiseError",),
    # what is computed, and who takes part when
    "workload": (
        "SGD",
        "MatrixWorkload",
        "ScheduledSGD",
        "ToeplitzWorkload",
        "Workload",
        "from_optimizer",
        "prefix_sum",
    ),
    "participation": (
        "BallsInBins",
        "CyclicPoisson",
        "FixedCycle",
        "MinSepPoisson",
        "MinSeparation",
        "Participation",
        "SingleParticipation",
    ),
    # how to split it, and how good the split is
    "causal": ("CausalMatrix", "Dense", "Diagonal", "Inverse", "Product", "Toeplitz"),
    "factorization": ("Factorization", "default_bands", "factorize", "mechanisms"),
    "participation.sensitivity": ("Sensitivity",),
    "causal.buffered": ("BufferedToeplitz",),
    "causal.banded": ("Banded",),
    "bounds.certificate": ("Certificate", "check", "lower_bound"),
    # privacy
    "accounting": (
        "MonteCarlo",
        "PrivacyCost",
        "Trials",
        "noise_multiplier",
        "privacy_cost",
        "tuned_noise_multiplier",
        "tuned_privacy_cost",
    ),
    "mechanism": ("Mechanism",),
    "diagnostics": ("Finding", "diagnose"),
    "planner": ("Job", "plan"),
    # running
    "front_door": ("evaluate", "make_private"),
    "keys": ("Key",),
    "noise": ("NoiseStream",),
    "participation.ledger": ("Ledger",),
    "participation.samplers": (
        "BallsInBinsSampler",
        "CyclicPoissonSampler",
        "FixedCycleSampler",
        "MinSepPoissonSampler",
        "MinSeparationSampler",
        "OwnBatches",
    ),
    "participation.loader": ("data_loader",),
    "training": ("PrivateOptimizer", "privatize"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0.dev0"
# Spelt out: type checkers take a name as exported only where they can read it here.
__all__ = [
    "SGD",
    "BallsInBins",
    "BallsInBinsSampler",
    "Banded",
    "BufferedToeplitz",
    "CausalMatrix",
    "Certificate",
    "CyclicPoisson",
    "CyclicPoissonSampler",
    "Dense",
    "Diagonal",
    "Factorization",
    "Finding",
    "FixedCycle",
    "FixedCycleSampler",
    "Inverse",
    "Job",
    "Key",
    "Ledger",
    "MatrixWorkload",
    "Mechanism",
    "MinSepPoisson",
    "MinSepPoissonSampler",
    "MinSeparation",
    "MinSeparationSampler",
    "MonteCarlo",
    "NoiseStream",
    "OwnBatches",
    "Participation",
    "PrivacyCost",
    "PrivateOptimizer",
    "Product",
    "RootnoiseError",
    "ScheduledSGD",
    "Sensitivity",
    "SingleParticipation",
    "Toeplitz",
    "ToeplitzWorkload",
    "Trials",
    "Workload",
    "__version__",
    "check",
    "data_loader",
    "default_bands",
    "diagnose",
    "evaluate",
    "factorize",
    "from_optimizer",
    "lower_bound",
    "make_private",
    "mechanisms",
    "noise_multiplier",
    "plan",
    "prefix_sum",
    "privacy_cost",
    "privatize",
    "tuned_noise_multiplier",
    "tuned_privacy_cost",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rootnoise' has no attribute {name!r}")
    value = getattr(import_module(f"rootnoise.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

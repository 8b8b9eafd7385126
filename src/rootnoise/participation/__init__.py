"""Who takes part when, and how far does one person move C X?"""

from rootnoise.participation.kinds import (
    BallsInBins,
    CyclicPoisson,
    FixedCycle,
    MinSeparation,
    MinSepPoisson,
    Participation,
    PoissonSampling,
    SingleParticipation,
    first_steps,
    from_dict,
    to_dict,
)

__all__ = [
    "BallsInBins",
    "CyclicPoisson",
    "FixedCycle",
    "MinSepPoisson",
    "MinSeparation",
    "Participation",
    "PoissonSampling",
    "SingleParticipation",
    "first_steps",
    "from_dict",
    "to_dict",
]

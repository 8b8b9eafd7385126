"""Opacus's interface with rootnoise's noise: an Opacus script only changes its import.

    from rootnoise.integrations.opacus import PrivacyEngine    # was: from opacus import ...

Written against Opacus 1.6.
"""

from rootnoise.integrations.opacus.engine import OPEN_EPOCHS, OPEN_STEPS, PrivacyEngine
from rootnoise.integrations.opacus.loop import (
    BatchMemoryManager,
    EngineLoader,
    EngineOptimizer,
    Hooks,
)

__all__ = [
    "OPEN_EPOCHS",
    "OPEN_STEPS",
    "BatchMemoryManager",
    "EngineLoader",
    "EngineOptimizer",
    "Hooks",
    "PrivacyEngine",
]

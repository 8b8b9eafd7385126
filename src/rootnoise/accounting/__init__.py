"""(epsilon, delta) <-> noise multiplier, for a whole run; every number on the private side."""

from rootnoise.accounting.cost import MonteCarlo, PrivacyCost
from rootnoise.accounting.rounding import exactly, round_down, round_up
from rootnoise.accounting.run import forecast, noise_multiplier, noise_multiplier_for, privacy_cost
from rootnoise.accounting.selection import Trials, tuned_noise_multiplier, tuned_privacy_cost

__all__ = [
    "MonteCarlo",
    "PrivacyCost",
    "Trials",
    "exactly",
    "forecast",
    "noise_multiplier",
    "noise_multiplier_for",
    "privacy_cost",
    "round_down",
    "round_up",
    "tuned_noise_multiplier",
    "tuned_privacy_cost",
]

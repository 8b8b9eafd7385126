"""Private training with the Trainer of Hugging Face transformers: `PrivateTrainer`.

Written against the internals of transformers 5.24 and accelerate 1.15.
"""

from rootnoise.integrations.hugging_face.arguments import PrivacyArguments, UnnoisedWarning
from rootnoise.integrations.hugging_face.checkpoint import STATE
from rootnoise.integrations.hugging_face.trainer import PrivateTrainer

__all__ = ["STATE", "PrivacyArguments", "PrivateTrainer", "UnnoisedWarning"]

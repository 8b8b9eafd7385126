"""What is the noise of step t?"""

from rootnoise.noise.stream import NoiseStream

__all__ = ["NoiseStream"]

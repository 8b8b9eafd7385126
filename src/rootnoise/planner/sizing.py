"""What a step of a row takes on each rank: bytes held, bytes sent, and seconds for the noise.

Bytes are counted, not measured; `tests/test_sizing.py` holds the counts to what `NoiseStream` and
`PrivateOptimizer` hold for small models. Activations, gradients and sums of one layer, and the
work space of the libraries are not in them: they depend on the model and the micro-batch.

Seconds are a model of two measured speeds, for the noise alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rootnoise._check import integer, one_of, real

DTYPES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
# Noise is float32, the clipped sum float64, whatever the parameters are.
NOISE, SUM = 4, 8


@dataclass(frozen=True)
class Fleet:
    """The model and the ranks that train it.

    Args:
        n_params: trainable parameters of the whole model.
        ranks: processes, each with one device.
        sharded: parameters cut by FSDP2; otherwise each rank holds all of them (DDP).
        dtype: of the parameters: float32, bfloat16, float16 or float64.
        device_memory: bytes of one device; None for no limit.
        momentum: whether the inner optimizer keeps a buffer of the parameters' size.

    Raises:
        RootnoiseError: a value out of range.

    >>> Fleet(n_params=10**9, ranks=8).columns
    125000000
    """

    n_params: int
    ranks: int = 1
    sharded: bool = False
    dtype: str = "float32"
    device_memory: float | None = None
    momentum: bool = True

    def __post_init__(self) -> None:
        integer("n_params", self.n_params, 1)
        integer("ranks", self.ranks, 1)
        one_of("dtype", self.dtype, DTYPES)
        if self.device_memory is not None:
            real("device_memory", self.device_memory, above=0)

    @property
    def columns(self) -> int:
        """Parameters whose noise one rank draws: under DDP too, each draws its own part.

        The largest part. FSDP2 cuts a tensor by its rows, so that a rank may hold up to one more
        row of each tensor.
        """
        return -(-self.n_params // self.ranks)

    @property
    def held(self) -> int:
        """Parameters that one rank holds between steps."""
        return self.columns if self.sharded else self.n_params

    def size(self, n_steps: int, state: int, shared: bool, speed: Speed | None = None) -> Size:
        """Return what a mechanism takes.

        Args:
            n_steps: of the run.
            state: noise vectors that a step must remember, s.
            shared: see `held_rows`.
            speed: of the ranks' device; seconds are None without.

        >>> size = Fleet(n_params=10**9, ranks=8).size(1000, state=15, shared=True)
        >>> size.noise_rows, size.noise_bytes, size.total
        (16, 8000000000, 28000000000)
        """
        from rootnoise.noise.blockplan import default_steps

        unit = DTYPES[self.dtype]
        steps = default_steps(state, n_steps, self.n_params)
        rows = held_rows(state, steps, shared=shared)
        seconds = None
        if speed is not None:
            width = state + steps if state else 0  # independent noise is not multiplied
            seconds = self.columns * (speed.draw + width * speed.multiply)
        return Size(
            noise_rows=rows + 1,
            noise_bytes=NOISE * (rows + 1) * self.columns,
            sum_bytes=self._sums(),
            gradient_bytes=self._gradients(unit),
            parameter_bytes=unit * self.held * (2 if self.momentum else 1),
            traffic=self._traffic(unit),
            seconds=seconds,
            device_memory=self.device_memory,
        )

    def _sums(self) -> int:
        """Return the bytes of the float64 sum; noise is added to it part by part.

        FSDP2 has one layer's whole sum at a time, which is not counted, and adds it to the shards.
        """
        return SUM * self.held

    def _gradients(self, unit: int) -> int:
        """Return the bytes of the noised mean and of the gradients, beyond the row of noise.

        The mean is float32, or float64 as the parameters are; gradients lie in its memory unless
        their dtype is narrower. A float32 mean takes that of the noise, but not where several ranks
        hold copies: there it is as long as the model, and the noise a part.
        """
        wide = max(unit, NOISE)
        in_noise = wide == NOISE and (self.sharded or self.ranks == 1)
        return (wide * (not in_noise) + unit * (unit < wide)) * self.held

    def _traffic(self, unit: int) -> int:
        """Return bytes that one rank sends in a step, by ring algorithms.

        DDP: one all-reduce of the float64 sum, 2 (R - 1) / R of it. FSDP2: the float64 sum is
        reduced to shards, (R - 1) / R of it; and FSDP2's own two gathers of the parameters. Batch
        indices are not counted.
        """
        most = self.n_params - self.n_params // self.ranks  # ceil of (R - 1) / R of them
        return most * (SUM + 2 * unit) if self.sharded else 2 * SUM * most


@dataclass(frozen=True)
class Speed:
    """How fast a device makes noise, on one rank.

    Attributes:
        draw: seconds a normal, with its way through memory.
        multiply: seconds for each row of [state; z] that a noise value is a sum of; 0 where it is
            not known, and seconds are those of drawing alone.
        source: where the numbers come from, for whoever reads them.
    """

    draw: float
    multiply: float
    source: str

    @classmethod
    def given(cls, normals_per_second: float) -> Speed:
        """Return the speed of a device that draws so many normals a second.

        Raises:
            RootnoiseError: not a positive number.
        """
        rate = real("normals_per_second", normals_per_second, above=0)
        return cls(1 / rate, 0.0, f"{rate:.3g} normals a second as given, drawing alone")


@dataclass(frozen=True)
class Size:
    """What one step takes on one rank, the largest rank's; bytes, unless it says otherwise.

    Attributes:
        noise_rows: float32 rows of the rank's part of the parameters: what the noise stream holds,
            and the noise of the step.
        noise_bytes: of these.
        sum_bytes: float64 sum of clipped gradients, whole on each rank or in shards.
        gradient_bytes: the noised mean, and what the inner optimizer reads, where they do not take
            the memory of the noise.
        parameter_bytes: parameters, and the inner optimizer's momentum.
        traffic: sent a step.
        seconds: modelled seconds a step for the noise; None without a speed.
        device_memory: what the device has; None for no limit.
    """

    noise_rows: int
    noise_bytes: int
    sum_bytes: int
    gradient_bytes: int
    parameter_bytes: int
    traffic: int
    seconds: float | None
    device_memory: float | None

    @property
    def total(self) -> int:
        """Bytes of a rank, without activations and per-sample gradients."""
        return self.noise_bytes + self.sum_bytes + self.gradient_bytes + self.parameter_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits the device; necessary, not sufficient: see `total`."""
        return self.device_memory is None or self.total <= self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, with total and fits."""
        return asdict(self) | {"total": self.total, "fits": self.fits}


def held_rows(state: int, steps: int, *, shared: bool) -> int:
    """Return the rows that a look-ahead noise stream holds.

    Args:
        state: rows of the mechanism's memory, s.
        steps: of a block, m.
        shared: memory is the noise of the last steps (banded strategies): the next block is the
            next memory, and the rows are stored once.

    >>> held_rows(99, 64, shared=True), held_rows(99, 64, shared=False)
    (99, 163)
    """
    return max(state, steps) if shared else state + steps

"""The one streaming engine: noise_std * (C^-1 Z)_t, step by step, for every mechanism.

Z is a pure function of (key, t, parameter position): the flattened parameters are cut into fixed
chunks, and a chunk's normals at step t come from the source at (t, chunk). The noising map turns Z
into correlated noise through its block (t, m): chunk by chunk, m rows of z are drawn and multiplied
once, which replaces m passes over all buffers by one matrix product (THEORY section 2, Algorithm 1,
after the optimizer of Kalinin and Lampert, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.randomness import Float32, GaussianSource, Key, NoiseSource

if TYPE_CHECKING:
    from rootnoise.mechanism import Mechanism

# Part of the definition of the noise: another value is another Z. A chunk is drawn and multiplied
# whole or not at all, so that no bit depends on where a process's share of it begins or ends.
CHUNK = 4096

# Most steps of a default block: the matrix product gains no speed beyond, and memory stays bounded.
MOST_STEPS = 64


class NoiseStream:
    """The noise of one training run, a float32 vector a step, and it only moves forward.

    A pair (key, t) protects one gradient. Two runs must never share a key, unless one is the
    bit-exact repeat of the other: the difference of their releases would hold no noise at all.
    Runs of different mechanisms are safe, for the mechanism's fingerprint goes into Z.

    Args:
        mechanism: what to run; read are n_steps, noise_std, noising and fingerprint.
        n_parameters: length of the flattened parameter vector.
        key: fixes all noise; `Key.fresh()` when None. `key.save(path)` it to be able to resume.
        spans: the parts of the flattened vector that this process holds: ascending, disjoint
            half-open intervals (start, stop). State, output and memory cover these alone, and a
            position's noise is the same, bit by bit, whatever they are. None is the whole vector.
        block_steps: steps m made at once: speed and memory depend on it, Z does not, and the noise
            only in its float32 rounding. The default is half the state's s rows, at most 64: one
            value costs 2 (s + m) flops and 2 s / m copies, and measured, m = s was no faster.
        source: where Z comes from, built as source(key).

    Raises:
        RootnoiseError: n_parameters < 1, block_steps not in [1, n_steps], a key of another type, or
            spans that overlap, descend, or leave the vector.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        n_parameters: int,
        key: Key | None = None,
        *,
        spans: Sequence[tuple[int, int]] | None = None,
        block_steps: int | None = None,
        source: Callable[[Key], NoiseSource] = GaussianSource,
    ) -> None:
        self._mechanism = mechanism
        self.n_steps = mechanism.n_steps
        self.n_parameters = integer("n_parameters", n_parameters, 1)
        self.key = Key.fresh() if key is None else key
        if not isinstance(self.key, Key):
            raise RootnoiseError(f"key must be a Key, got {type(key).__name__}")
        self._source = source(self.key.derive(f"noise {mechanism.fingerprint}"))
        rows = mechanism.noising.state_size
        if block_steps is None:
            block_steps = min(max(1, (rows + 1) // 2), MOST_STEPS, self.n_steps)
        self.block_steps = integer("block_steps", block_steps, 1, self.n_steps, high_name="n_steps")
        self._plans: dict[int, _Plan] = {}
        self._columns = _Columns(self.n_parameters, spans)
        n_chunks = len(self._columns.chunks)
        self._state = np.zeros((rows, n_chunks, CHUNK), dtype=np.float32)
        # Unscaled noise of the steps _made - len(_ready) .. _made - 1; rows from t on are unread.
        self._ready = np.empty((self.block_steps, n_chunks, CHUNK), dtype=np.float32)
        self._made = 0
        self._broken = False
        self.t = 0

    @property
    def memory_rows(self) -> int:
        """Float32 rows held, each as long as the spans: the state and one block of noise."""
        return self._state.shape[0] + self.block_steps

    def next(self) -> torch.Tensor:
        """Return the noise of step `t` and move one step on.

        It is a float32 vector as long as the spans together: (n_parameters,) for the whole vector.
        It is to be added to the *sum* of the clipped gradients. The tensor is the caller's own.

        Raises:
            RootnoiseError: the mechanism's n_steps are used up, or an exception (an interrupt, say)
                once broke off the making of a block, which leaves the state half advanced.
        """
        if self.t >= self.n_steps:
            raise RootnoiseError(
                f"step {self.t} is past the mechanism's n_steps={self.n_steps}: "
                "its privacy claim covers no further release"
            )
        self._check_whole()
        if self.t == self._made:
            self._make(min(self.block_steps, self.n_steps - self.t))
        row = self._ready[self.t - self._made] * np.float32(self._mechanism.noise_std)
        self.t += 1
        return torch.from_numpy(self._columns.gather(row))

    def _make(self, m: int) -> None:
        """Advance the state by m steps from `t` and put their unscaled noise into `_ready`."""
        plan = self._plan(m)
        s = len(self._state)
        ready = self._ready[-m:]
        self._broken = True
        # Rows of the work space: [state; z; computed rows], which the next state is gathered from.
        work = np.empty((s + m + len(plan.rows), CHUNK), dtype=np.float32)
        # On one BLAS thread, for a matrix product rounds differently on two.
        with _blas().limit(limits=1, user_api="blas"):
            for i, chunk in enumerate(self._columns.chunks):
                work[:s] = self._state[:, i]
                for j in range(m):
                    self._source.fill(self.t + j, chunk, work[s + j])
                np.matmul(plan.rows, work[: s + m], out=work[s + m :])
                ready[:, i] = work[s + m : s + 2 * m]
                for j, row in enumerate(plan.next_state):
                    self._state[j, i] = work[row]
        self._made = self.t + m
        self._broken = False

    def _plan(self, m: int) -> _Plan:
        """Return the block of the next m steps; for Toeplitz maps it is the same at every step."""
        if not self._mechanism.noising.is_toeplitz:
            return _Plan(self._mechanism.noising.block(self.t, m), m)
        if m not in self._plans:
            self._plans[m] = _Plan(self._mechanism.noising.block(self.t, m), m)
        return self._plans[m]

    def _check_whole(self) -> None:
        if self._broken:
            raise RootnoiseError(
                f"noise must not go on after an exception broke off the block of step {self.t}: "
                "resume from a saved state"
            )

    def _identity(self) -> dict[str, Any]:
        """What a saved stream must agree on to be continued by this one."""
        return {
            "version": 1,
            "fingerprint": self._mechanism.fingerprint,
            "n_steps": self.n_steps,
            "noise_std": float(self._mechanism.noise_std),
            "n_parameters": self.n_parameters,
            "key_id": self.key.id,
            "source": self._source.name,
            "chunk": CHUNK,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives that `torch.load(weights_only=True)` reads.

        `state` (s rows) and `ready` (made - t rows) have a column for each position of the spans,
        in their order, and nothing else depends on the spans: to go on with others, cut and join
        columns.

        The key is not in it, only its public id: keep the key apart (`Key.save`) and give the same
        one to the stream that resumes. The tensors are still as secret as the key: they hold noise,
        some of it of steps to come, and a published checkpoint must not contain them.
        """
        self._check_whole()
        unread = len(self._ready) - (self._made - self.t)
        rows = {"state": self._state, "ready": self._ready[unread:]}
        tensors = {name: self._columns.gather_rows(array) for name, array in rows.items()}
        return self._identity() | {"t": self.t, "made": self._made} | tensors

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved stream: the same bits as without the stop.

        Another `block_steps`, BLAS or processor rounds the matrix product differently; the number
        of threads and the spans do not matter.

        Only a fresh stream can: going back would use a (key, t) again. Whoever resumes from an old
        state repeats steps that may have run already, and must not release both.

        Raises:
            RootnoiseError: this stream has moved; the saved one had another mechanism, key, source
                or number of parameters; or its tensors are damaged or of another width.
        """
        if self.t:
            raise RootnoiseError(
                f"noise stream must be at step 0 to load a state, got step {self.t}"
            )
        same("noise", self._identity(), state)
        t = integer("saved noise's t", state.get("t", -1), 0, self.n_steps, high_name="n_steps")
        made = integer("saved noise's made", state.get("made", -1), t, self.n_steps)
        memory = self._columns.scatter_rows("state", state.get("state"), len(self._state))
        ready = self._columns.scatter_rows("ready", state.get("ready"), made - t)
        if len(ready) < self.block_steps:  # right-aligned, as `_make` leaves them
            self._ready[self.block_steps - len(ready) :] = ready
        else:
            self._ready = ready
        self.t, self._made, self._state, self._broken = t, made, memory, False


class _Plan:
    """A block, split into rows to compute and the place of each row of the next state.

    For the usual maps every state row is a copy of an old state row, an input or an output: banded
    inverses remember inputs, banded strategies outputs. Copying them halves the product.
    """

    def __init__(self, block: NDArray[np.float64], m: int) -> None:
        rows = block.astype(np.float32)
        rows += 0.0  # -0 becomes 0, so that equal rows have equal bytes
        width = block.shape[1]
        found = {row.tobytes(): i for i, row in enumerate(np.eye(width, dtype=np.float32))}
        compute = list(rows[:m])
        found |= {
            row.tobytes(): width + i for i, row in enumerate(compute) if row.tobytes() not in found
        }
        for row in rows[m:]:
            if row.tobytes() not in found:
                found[row.tobytes()] = width + len(compute)
                compute.append(row)
        self.rows = np.array(compute)
        self.next_state = [found[row.tobytes()] for row in rows[m:]]


@cache
def _blas() -> ThreadpoolController:
    """Return the one controller: to look for the libraries takes 2 ms, to limit them 20 us."""
    return ThreadpoolController()


class _Columns:
    """Which chunks of the vector this process makes, and where its spans lie in them."""

    def __init__(self, n_parameters: int, spans: Sequence[tuple[int, int]] | None) -> None:
        held = _checked([(0, n_parameters)] if spans is None else spans, n_parameters)
        chunks = {c for low, high in held for c in range(low // CHUNK, (high - 1) // CHUNK + 1)}
        self.chunks = sorted(chunks)
        place = {chunk: i * CHUNK for i, chunk in enumerate(self.chunks)}
        starts = [place[low // CHUNK] + low % CHUNK for low, _ in held]
        sizes = [high - low for low, high in held]
        self._slices = [slice(i, i + size) for i, size in zip(starts, sizes, strict=True)]
        self.size = sum(sizes)

    def gather(self, row: Float32) -> Float32:
        """Return the positions held, shape (size,), of a row of shape (chunks, CHUNK)."""
        flat = row.reshape(-1)
        if len(self._slices) == 1:
            return np.asarray(flat[self._slices[0]])
        return np.concatenate([flat[:0], *(flat[part] for part in self._slices)])

    def gather_rows(self, rows: Float32) -> torch.Tensor:
        """Return a (rows, size) copy of an array of shape (rows, chunks, CHUNK)."""
        result = np.empty((len(rows), self.size), dtype=np.float32)
        for row, out in zip(rows, result, strict=True):
            out[:] = self.gather(row)
        return torch.from_numpy(result)

    def scatter_rows(self, name: str, saved: torch.Tensor | None, n_rows: int) -> Float32:
        """Return the (n_rows, chunks, CHUNK) array of a saved (n_rows, size) tensor, or refuse."""
        shape = (n_rows, self.size)
        if saved is None or saved.dtype != torch.float32 or tuple(saved.shape) != shape:
            got = "nothing" if saved is None else f"{saved.dtype} of shape {tuple(saved.shape)}"
            raise RootnoiseError(
                f"saved noise's {name} must be float32 of shape {shape}, got {got}"
            )
        if not saved.isfinite().all():
            raise RootnoiseError(f"saved noise's {name} must be finite, got NaN or infinite values")
        # Positions of the chunks that are not held may hold anything: no column meets another.
        result = np.zeros((n_rows, len(self.chunks) * CHUNK), dtype=np.float32)
        stop = 0
        for part in self._slices:
            start, stop = stop, stop + part.stop - part.start
            result[:, part] = saved[:, start:stop].numpy(force=True)
        return result.reshape(n_rows, len(self.chunks), CHUNK)


def _checked(spans: Sequence[tuple[int, int]], n_parameters: int) -> list[tuple[int, int]]:
    """Return the spans that hold anything, or refuse what is not ascending and disjoint."""
    held, last = [], 0
    for start, stop in spans:
        low = integer("span's start", start, last, n_parameters, high_name="n_parameters")
        last = integer("span's stop", stop, low, n_parameters, high_name="n_parameters")
        if low < last:
            held.append((low, last))
    return held

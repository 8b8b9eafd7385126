"""The one streaming engine: noise_std * (C^-1 Z)_t, step by step, for every mechanism.

Z is a pure function of (key, t, parameter position): the flattened parameters are cut into fixed
chunks, and a chunk's normals at step t come from the source at (t, chunk). The noising map turns Z
into correlated noise through its block (t, m): chunk by chunk, m rows of z are drawn and multiplied
once, where Algorithm 1 of Kalinin and Lampert (2024) passes over all buffers in each of m steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from rootnoise._check import RootnoiseError, integer, same
from rootnoise.keys import Key
from rootnoise.noise.blockplan import BlockPlan, default_steps, moves
from rootnoise.noise.engine import Engine
from rootnoise.noise.sources import AesSource, CudaSource, NoiseSource

if TYPE_CHECKING:
    from rootnoise.mechanism import Mechanism

Memory = Literal["look-ahead", "ring", "regenerate", "offload"]

# Rows of state from which a second thread gains more than handing Python's lock over costs: a
# million values took 2.8 and 2.9 ms on one and two threads at 3 rows, 3.3 and 2.8 ms at 15, 3.8 and
# 2.6 ms at 63.
PARALLEL = 15


class NoiseStream:
    """The noise of one training run, a float32 vector a step, and it only moves forward.

    A pair (key, t) protects one gradient. Two runs must never share a key, unless one is the
    bit-exact repeat of the other: the difference of their releases would hold no noise at all.
    Runs of different mechanisms are safe, for the mechanism's fingerprint goes into Z.

    Mechanism, key and source say what the noise is; the rest sets speed and memory. Its bits depend
    on `block_steps`, which rounds differently, and on nothing else.

    Args:
        mechanism: what to run; read are n_steps, noise_std, noising and fingerprint.
        n_parameters: length of the flattened parameter vector.
        key: fixes all noise; `Key.fresh()` when None. `key.save(path)` it to be able to resume.
        spans: the parts of the flattened vector that this process holds: ascending, disjoint
            half-open intervals (start, stop). State, output and memory cover these alone; a
            position's noise is the same whatever they are. None is the whole vector.
        memory: "look-ahead" makes as many steps at once as the state has rows (s, at most 64), for
            up to 2^22 parameters rounded up to a multiple of 8; "ring" makes single steps from the
            least state; "regenerate" keeps no state and draws the past z again, for mechanisms that
            remember nothing else (banded inverses); "offload" is "look-ahead" on the CPU for a
            `device` that is short of memory.
        block_steps: steps m made at once, if not those of `memory`.
        device: where `next` delivers; the state is there too, except with "offload".
        threads: of the CPU; when None, torch.get_num_threads() for states of 15 rows or more, else
            one: smaller products are so short that threads wait for each other (measured).
        source: where Z comes from, built as source(key, device): `AesSource` on the CPU and
            `CudaSource` on a GPU when None.

    Raises:
        RootnoiseError: n_parameters < 1, block_steps not in [1, n_steps], threads < 1, a key of
            another type, spans that overlap, descend, or leave the vector, an unknown memory or one
            that the mechanism does not allow, or a source that does not run there.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        n_parameters: int,
        key: Key | None = None,
        *,
        spans: Sequence[tuple[int, int]] | None = None,
        memory: Memory = "look-ahead",
        block_steps: int | None = None,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        source: Callable[[Key, torch.device], NoiseSource] | None = None,
    ) -> None:
        self._mechanism = mechanism
        self.n_steps = mechanism.n_steps
        self.n_parameters = integer("n_parameters", n_parameters, 1)
        self.key = Key.fresh() if key is None else key
        if not isinstance(self.key, Key):
            raise RootnoiseError(f"key must be a Key, got {type(key).__name__}")
        if memory not in get_args(Memory):
            raise RootnoiseError(f"memory must be in {list(get_args(Memory))}, got {memory!r}")
        self.device = torch.device(device)
        place = torch.device("cpu") if memory == "offload" else self.device
        on_cpu = place.type == "cpu"
        s = mechanism.noising.state_size
        if threads is None:
            threads = torch.get_num_threads() if s >= PARALLEL else 1
        n_threads = integer("threads", threads, 1)
        make = source or (AesSource if on_cpu else CudaSource)
        keyed = self.key.derive(f"noise {mechanism.fingerprint}")
        sources = [make(keyed, place) for _ in range(n_threads if on_cpu else 1)]
        self._source = sources[0]
        held = [(0, self.n_parameters)] if spans is None else spans
        self._engine = Engine(sources, held, self.n_parameters, place)

        if block_steps is None:
            ahead = 0 if memory == "ring" else s
            rounded = memory != "regenerate"
            block_steps = default_steps(ahead, self.n_steps, self.n_parameters, rounded=rounded)
        self.block_steps = integer("block_steps", block_steps, 1, self.n_steps, high_name="n_steps")
        self._regenerates = memory == "regenerate"
        self._plans: dict[int, BlockPlan] = {}
        plan = self._plan(0, self.block_steps)
        n_rows = plan.memory_rows if mechanism.noising.is_toeplitz else s + self.block_steps
        self._memory = torch.zeros((n_rows, self._engine.size), dtype=torch.float32, device=place)
        # Rows of memory: the state before step _made, and the unscaled noise of the steps up to it.
        self._state = [0] * (0 if self._regenerates else s)
        self._ready: list[int] = []
        self._made = 0
        self._broken = False
        self.t = 0

    @property
    def memory_rows(self) -> int:
        """Float32 rows held, each as long as the spans: state and look-ahead, each noise once."""
        return len(self._memory)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: two streams would give one noise to two gradients."""
        raise RootnoiseError(
            "noise stream must not be copied or pickled, got an attempt: save its state_dict"
        )

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
            self._make()
        self._engine.wait()
        row = self._memory[self._ready[self.t - self._made]]
        noise = torch.mul(row, float(self._mechanism.noise_std))
        self.t += 1
        if self._engine.stream is not None and self.t == self._made < self.n_steps:
            self._make()  # beside the forward and backward of the next step
        return noise.to(self.device)

    def _make(self) -> None:
        """Make the noise of the next block, from step `_made` on."""
        m = min(self.block_steps, self.n_steps - self._made)
        plan = self._plan(self._made, m)
        block = moves(plan, self._state, len(self._memory))
        self._broken = True
        self._engine.run(self._memory, plan, block, self._made)
        self._state, self._ready, self._made = block.state, block.ready, self._made + m
        self._broken = False

    def _plan(self, t: int, m: int) -> BlockPlan:
        """Return the block of the m steps from t on: of a Toeplitz map, the same everywhere."""
        noising = self._mechanism.noising
        if not noising.is_toeplitz:
            return BlockPlan(noising.block(t, m), m, self._regenerates)
        if m not in self._plans:
            self._plans[m] = BlockPlan(noising.block(t, m), m, self._regenerates)
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
            "chunk": self._source.chunk,
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
        self._engine.wait()
        unread = self._ready[len(self._ready) - (self._made - self.t) :]
        tensors = {"state": self._memory[self._state], "ready": self._memory[unread]}
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
        n_rows = {"state": len(self._state), "ready": made - t}
        # A row that is in the state and is noise to come is stored once, as `moves` leaves it.
        rows: list[torch.Tensor] = []
        places: dict[str, list[int]] = {}
        for name, n in n_rows.items():
            saved = _checked(name, state.get(name), (n, self._engine.size))
            places[name] = [_place(row, rows) for row in saved]
        memory = torch.zeros_like(self._memory)
        if len(rows) > len(memory):
            memory = memory.new_zeros((len(rows), self._engine.size))
        for place, row in zip(memory, rows, strict=False):
            place.copy_(row)
        self.t, self._made, self._memory = t, made, memory
        self._state, self._ready, self._broken = places["state"], places["ready"], False


def _checked(name: str, saved: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """Return a saved tensor, or refuse it."""
    if saved is None or saved.dtype != torch.float32 or tuple(saved.shape) != shape:
        got = "nothing" if saved is None else f"{saved.dtype} of shape {tuple(saved.shape)}"
        raise RootnoiseError(f"saved noise's {name} must be float32 of shape {shape}, got {got}")
    if not saved.isfinite().all():
        raise RootnoiseError(f"saved noise's {name} must be finite, got NaN or infinite values")
    return saved


def _place(row: torch.Tensor, rows: list[torch.Tensor]) -> int:
    """Return the position of an equal row in `rows`, appending this one if there is none."""
    for i, other in enumerate(rows):
        if torch.equal(row, other):
            return i
    rows.append(row)
    return len(rows) - 1

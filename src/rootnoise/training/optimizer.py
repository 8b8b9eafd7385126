"""Clipped, summed and noised gradients for a torch optimizer.

Backward leaves what clipped sums are computed from (`training.clip`). Everything that epsilon
depends on happens in `PrivateOptimizer.step`, in a fixed order: check the batch, clip, sum, add the
step's noise, divide by the expected batch size. What the inner optimizer does with that gradient is
post-processing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike

from rootnoise._check import RootnoiseError, integer, real, warn
from rootnoise.diagnostics import mismatch
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.participation.ledger import Ledger
from rootnoise.participation.samplers import OwnBatches, Sampler, check_sampler
from rootnoise.training import resume
from rootnoise.training.clip import PrivateModule
from rootnoise.training.clipping import Clip
from rootnoise.training.place import Place
from rootnoise.training.probe import Probe
from rootnoise.training.ranks import Indices, Ranks
from rootnoise.training.replicated import Copies
from rootnoise.training.reuse import Releases
from rootnoise.training.sharded import ShardedModule, Shards
from rootnoise.training.wrapping import Held, check_layers, watched


class UnplannedOptimizerWarning(UserWarning):
    """The noise was planned for another optimizer: privacy holds, but the error is larger."""


class IgnoredPenaltyWarning(UserWarning):
    """A term of the loss depends on parameters alone: no gradient of it reaches the optimizer."""


class PrivateOptimizer:
    """A torch optimizer that sees only clipped, summed and noised gradients.

    A step sets every gradient to (sum of the batch's clipped gradients + noise_std (C^-1 Z)_t) /
    sampler.batch_size: the divisor is the expected batch size, never the actual one.

    The noise is optimised for torch.optim.SGD with the workload's momentum. Any other optimizer has
    the same guarantee (it is post-processing), but the workload, and so the error that the
    mechanism reports, does not describe it.

    Args:
        optimizer: holds each trainable parameter of `module` exactly once.
        module: from `privatize`.
        mechanism: calibrated for sampler.participation and sampler.n_steps.
        sampler: draws the batches; every step must take exactly its batch. With `OwnBatches` you
            bring your own, under participations whose every condition the ledger can check.
        key: fixes the noise; fresh from OS entropy when None.
        decay: alpha in (0, 1]; parameters are multiplied by it before each inner step, so that SGD
            computes theta <- alpha theta - lr m (Kalinin & Lampert, 2024). 1 is no decay.
        process_group: the ranks of a data-parallel run, each with its own copy of `module`.
            Weights, key and sampler seed are taken from rank 0; each rank clips and sums its part
            of the batch, and the noise is added once, each rank drawing its own part of it. A
            sharded model brings its own group; its weights stay as they are.
        independence: "probed": steps 0, 1, 2, 4, 8 and so on are replayed, before anything is
            released, with half of the batch replaced (see `rootnoise.training.probe`); layers and
            losses that mix examples are refused. "assumed": you vouch for it, and the claim says
            so.
        probe_every: also probe every so many steps; 0 for powers of two alone.
        planned: the noise is known to be planned for this optimizer: it is not compared.

    Attributes:
        t: steps made.
        non_finite: per-sample gradients of this process so far that were not finite and counted as
            zero. The number is computed from raw data: it is not covered by the guarantee.

    Raises:
        RootnoiseError: parts that do not fit together, or a model that `privatize` refuses.

    >>> from rootnoise.factorization import factorize
    >>> from rootnoise.participation.samplers import FixedCycleSampler
    >>> from rootnoise.training import privatize
    >>> from rootnoise.workload import SGD
    >>> sampler = FixedCycleSampler(n_examples=12, batch_size=4, epochs=2, seed=0)
    >>> workload, cycle = SGD(sampler.n_steps, momentum=0.9), sampler.participation
    >>> bsr = factorize(workload, cycle, "bsr")
    >>> mechanism = Mechanism.calibrate(bsr, cycle, epsilon=2.0, delta=1e-5)
    >>> module = privatize(torch.nn.Linear(3, 2))
    >>> sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    >>> optimizer = PrivateOptimizer(sgd, module, mechanism, sampler)
    >>> x, y = torch.ones(12, 3), torch.zeros(12, dtype=torch.int64)
    >>> for batch in sampler:
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
    ...     optimizer.step(batch)
    >>> optimizer.t
    6
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: PrivateModule,
        mechanism: Mechanism,
        sampler: Sampler,
        key: Key | None = None,
        *,
        decay: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        independence: str = "probed",
        probe_every: int = 0,
        planned: bool = False,
    ) -> None:
        if independence not in ("probed", "assumed"):
            raise RootnoiseError(f"independence must be probed or assumed, got {independence!r}")
        self._held = Held(optimizer, module)
        check_layers(module)
        check_sampler(sampler, mechanism.participation, mechanism.n_steps)
        self.optimizer, self.module, self.sampler = optimizer, module, sampler
        self.decay = real("decay", decay, above=0, at_most=1)
        self._mechanism = mechanism
        clip = Clip.of(mechanism, sampler.n_examples)
        self._place: Place
        if isinstance(module, ShardedModule):
            self._place = Shards(module, clip)
        else:
            self._place = Copies(module, Ranks(process_group), clip)
        self._ranks = self._place.ranks
        every = integer("probe_every", probe_every, 0)
        self._guard, self._probe = watched(module, every if independence == "probed" else None)
        self.ledger = Ledger(mechanism.participation, sampler.n_examples)
        self._stream = self._new_stream(
            resume.follow_first(self, Key.fresh() if key is None else key)
        )
        self._releases = Releases(self.stream.key.id, mechanism.fingerprint)
        if not planned:
            self._advise()
        self.t = 0
        self.non_finite = 0
        self._process = os.getpid()
        self._told = False  # of a penalty
        self._batch: Indices | None = None  # admitted batch of a step that uses micro-batches
        self._taken = np.empty(0, dtype=np.int64)  # this process's examples already in the sum

    def _advise(self) -> None:
        """Say once if the noise was planned for another optimizer, and what that costs."""
        advice = mismatch(self.mechanism, self.optimizer, decay=self.decay)
        if advice:
            warn(advice, UnplannedOptimizerWarning)

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism that sets noise and clip norm; it cannot be replaced."""
        return self._mechanism

    @property
    def stream(self) -> NoiseStream:
        """The mechanism's noise; it cannot be replaced."""
        return self._stream

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: two optimizers would add the same noise to two gradients."""
        raise RootnoiseError(
            "private optimizer must not be copied or pickled, got an attempt: save its state_dict"
        )

    def claim(self) -> str:
        """Return the mechanism's claim, and whether independence of examples was probed.

        Only steps that this process has made count as probed.
        """
        if self._probe is None:
            seen = "was assumed, not probed"
        elif self._probe.probed:
            n, last = len(self._probe.probed), self._probe.probed[-1]
            seen = f"was probed at {n} of this process's steps, last at its step {last}"
        else:
            seen = "has not been probed yet"
        return (
            f"{self.mechanism.claim()} That each example's gradient depends on no other example of "
            f"its batch {seen}."
        )

    def zero_grad(self, *, keep_parts: bool = False) -> None:
        """Drop all gradients, those of `accumulate` included, and the passes that made them.

        Call it once a step, before backward. A forward without backward is kept until the next one.

        Args:
            keep_parts: keep the sum of `accumulate`, and drop only what came after it.
        """
        self._guard.clear()
        if keep_parts:
            self.module.zero_grad()
            return
        self._place.clear()
        self._taken = self._taken[:0]

    def accumulate(self, indices: ArrayLike | None = None, batch: ArrayLike | None = None) -> None:
        """Add the gradients of one part of step `t`'s batch; `step` adds the last part.

        Micro-batches may have any size and order. Together with the part given to `step` they must
        make up the step's batch, each example once. The clipped sum equals that of the undivided
        batch up to float rounding; noise is added once, by `step`. The ledger admits the whole
        batch here, before the first gradient counts. Nothing is released until `step`; `zero_grad`
        drops the parts taken so far, and the step starts over.

        Of a sharded model every rank takes as many parts, which may be empty. Each part's sums are
        exchanged at once, so that no rank holds them whole. After torch's
        `model.set_requires_gradient_sync(False)` they are kept whole on each rank instead, and
        exchanged once, by `step`.

        Args:
            indices: the examples of the last backward, one for each of its rows; may be empty.
            batch: the whole batch, over all ranks, with `OwnBatches`; otherwise the sampler gives
                it.

        Raises:
            RootnoiseError: what `step` refuses; an example that is not in the batch, or was taken
                already. With a process group only this rank raises; of a sharded model all do, and
                where their switches differ, or one takes a part and another steps.

        >>> from rootnoise.participation.samplers import FixedCycleSampler
        >>> from rootnoise.factorization import factorize
        >>> from rootnoise.training import privatize
        >>> from rootnoise.workload import SGD
        >>> sampler = FixedCycleSampler(n_examples=12, batch_size=6, epochs=1, seed=0)
        >>> split = factorize(SGD(sampler.n_steps), sampler.participation, "identity")
        >>> mechanism = Mechanism.calibrate(split, sampler.participation, epsilon=2.0, delta=1e-5)
        >>> module = privatize(torch.nn.Linear(3, 2))
        >>> sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> optimizer = PrivateOptimizer(sgd, module, mechanism, sampler)
        >>> x, y = torch.ones(12, 3), torch.zeros(12, dtype=torch.int64)
        >>> for batch in sampler:
        ...     optimizer.zero_grad()
        ...     for part in (batch[:4], batch[4:]):
        ...         torch.nn.functional.cross_entropy(module(x[part]), y[part]).backward()
        ...         if part[-1] != batch[-1]:
        ...             optimizer.accumulate(part)
        ...     optimizer.step(part)
        >>> optimizer.t
        2
        """
        if self._place.whole:
            part = self._part(indices, batch)
        else:
            try:
                part = self._part(indices, batch)
            except RootnoiseError as refusal:
                self._ranks.refuse(refusal)
            self._ranks.agree(self.t, self._place.doing)
            if self._probe is not None:
                self._probe_together(self._probe, part.size)
        self._taken = np.concatenate([self._taken, part])  # first, so an interrupt cannot add twice
        self._place.take(part.size)
        self._guard.reset()
        if self._probe is not None:
            self._probe.taken()

    def _part(self, indices: ArrayLike | None, batch: ArrayLike | None) -> Indices:
        """Return a part of the step's batch, or refuse it."""
        part = self._checked(indices)
        stranger = part[~np.isin(part, self._begin(batch))]
        if stranger.size:
            raise RootnoiseError(
                f"micro-batch must be of the batch of step {self.t}, got example {stranger[0]}, "
                "which is not in it"
            )
        return part

    def _begin(self, given: ArrayLike | None) -> Indices:
        """Return the batch of a step in micro-batches; the first of them admits it."""
        own = type(self.sampler) is OwnBatches
        whole = None if given is None else self.ledger.checked(given)
        if self._batch is None:
            drawn = None if own else self.sampler.batch(self.t)
            whole = drawn if whole is None else whole
            if whole is None:
                rule = "batch must be given with the first micro-batch of a step of OwnBatches"
                raise RootnoiseError(f"{rule}, got None")
            self.ledger.admit(self.t, whole, drawn)
            self._batch = whole
        elif whole is not None and not np.array_equal(whole, self._batch):
            rule = f"batch of step {self.t} must stay that of its first micro-batch"
            raise RootnoiseError(f"{rule}, got another one")
        return self._batch

    def step(self, indices: ArrayLike | None = None) -> None:
        """Take step `t` with the gradients of the examples `indices`.

        Args:
            indices: the batch of the last backward, integers in [0, n_examples), one for each of
                its rows. If empty, the gradient is noise alone, and no backward is needed. With a
                process group: this rank's part of the batch, which may be empty. After
                `accumulate`: the last part, which may be empty too.

        Raises:
            RootnoiseError: a closure; the mechanism's steps are used up; indices that, joined over
                micro-batches and ranks, are not the sampler's batch of this step, violate the
                participation or do not match the gradients; not exactly one backward in training
                mode since the last step; parameters that were added, removed, frozen or reshaped;
                an earlier step that failed midway; another live optimizer with this key and
                mechanism that has released other values in this step. In all these cases nothing
                has been released. With a process group, all ranks raise together.
        """
        try:
            part = self._checked(indices)
        except RootnoiseError as refusal:
            self._ranks.refuse(refusal)
        batch = self._ranks.batch(self.t, np.concatenate([self._taken, part]))
        if self._probe is not None and not self._place.whole:
            self._probe_together(self._probe, part.size)
        try:
            self._admit(batch)
        except RootnoiseError as refusal:
            self._ranks.refuse(refusal)
        self._ranks.agree(self.t)  # one rank's ledger file may not be writable
        with torch.no_grad():
            by = self.sampler.batch_size
            mean, bad = self._place.noised_mean(part.size, self.stream.next(), self.t, by)
            try:
                self._releases.check(self.t, mean, by)
            except RootnoiseError as refusal:
                self._ranks.refuse(refusal)
            self._ranks.agree(self.t)
            self.non_finite += bad
            self._place.write(mean)
            if self.decay != 1:
                for p in self._held.parameters:
                    p.mul_(self.decay)
        self._guard.reset()
        if self._probe is not None:
            self._probe.next()
        self.optimizer.step()
        self._batch, self._taken = None, self._taken[:0]
        self.t += 1

    def _admit(self, batch: Indices) -> None:
        """Admit the batch of a step, or check that its parts make up the admitted batch."""
        own = type(self.sampler) is OwnBatches
        if self._batch is None:
            self.ledger.admit(self.t, batch, None if own else self.sampler.batch(self.t))
        elif not np.array_equal(self.ledger.checked(batch), self._batch):
            raise RootnoiseError(
                f"batch of step {self.t} must be whole, its micro-batches joined over ranks; got "
                f"{batch.size} examples of its {self._batch.size} (zero_grad drops those before it)"
            )

    def _probe_together(self, probe: Probe, rows: int) -> None:
        """Probe a sharded model, whose forward needs every rank."""
        try:
            probe.run(rows)
        except RootnoiseError as refusal:
            self._ranks.refuse(refusal)
        self._ranks.agree(self.t)

    def _checked(self, indices: ArrayLike | None) -> Indices:
        """Return this process's part of the batch; refuse it, or its gradients, if not valid."""
        if indices is None:
            raise RootnoiseError(
                "step must get the indices of the batch, got none (the optimizer of make_private "
                "is the one that needs none)"
            )
        if callable(indices):
            raise RootnoiseError("step must get the indices of the batch, got a closure")
        if os.getpid() != self._process:
            raise RootnoiseError(
                "step must run in the process that made the optimizer, got a fork of it: both "
                "would use one noise"
            )
        try:
            integer("t", self.t, 0, self.mechanism.n_steps - 1, high_name="n_steps - 1")
        except RootnoiseError as rule:
            raise RootnoiseError(
                f"{rule}: the mechanism's steps are used up; calibrate one for all the steps to be "
                "made, since more of them need more noise from the first on"
            ) from None
        self._check_whole()
        check_sampler(self.sampler, self.mechanism.participation, self.mechanism.n_steps)
        integer("sampler's n_examples", self.sampler.n_examples, *[self.ledger.n_examples] * 2)
        self._held.check(self.optimizer, self.module)
        if isinstance(indices, torch.Tensor):
            indices = indices.numpy(force=True)
        rows = np.size(indices)
        self._place.check(rows)
        self._guard.check(rows)
        self._tell_of_penalty()
        part = self.ledger.checked(indices)
        again = part[np.isin(part, self._taken)]
        if again.size:
            raise RootnoiseError(
                f"micro-batches of step {self.t} must have each example once, got {again[0]} twice"
            )
        if self._probe is not None and self._place.whole:
            self._probe.run(rows)
        return part

    def _tell_of_penalty(self) -> None:
        """Warn once of a term of the loss that depends on parameters alone and counts nothing."""
        name = self.module.past if isinstance(self.module, PrivateModule) else ""
        if name and not self._told:
            self._told = True
            warn(
                "loss must be made of examples alone, got a term of parameters, such as "
                f"{name}, which counts nothing: give weight_decay to the optimizer instead",
                IgnoredPenaltyWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs except the key, for `torch.load(weights_only=True)`.

        It holds recent noise and the sampler's seed: keep it as secret as the key. With a process
        group every rank must call it. The result is the same on each rank except for `non_finite`,
        and any number of ranks can load it. For a sharded model each rank returns its own part, for
        `torch.distributed.checkpoint`.

        Raises:
            RootnoiseError: a step failed midway.
        """
        return resume.saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved run bit for bit, given its key; load the model's weights separately.

        Raises:
            RootnoiseError: this optimizer has taken a step, its ledger already has a file (call
                `keep` afterwards), or the saved one had another mechanism (any field of it), key,
                sampler, decay or layout. Nothing has changed then.
        """
        resume.load(self, state)

    def _new_stream(self, key: Key) -> NoiseStream:
        size = sum(p.numel() for p in self._held.parameters)
        where = self._held.parameters[0].device
        return NoiseStream(self.mechanism, size, key, spans=self._place.spans, device=where)

    def _check_whole(self) -> None:
        admitted = self.t + (self._batch is not None)
        if not (self.t == self.stream.t and self.ledger.t == admitted):
            raise RootnoiseError(
                f"step {self.t} was broken off (ledger at {self.ledger.t}, noise at "
                f"{self.stream.t}): resume from a saved state"
            )

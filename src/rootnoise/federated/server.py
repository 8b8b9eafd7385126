"""The server of a federated run: clients' updates in, noised weights out.

    update    u_i = weights after the client's local training - weights at the start of the round
    sum       S_t = sum of u_i, each clipped as a whole to clip_norm, all with weight one
    release   mean_t = (S_t + noise_std (C^-1 Z)_t) / cohort_size
    weights   the server's optimizer takes -mean_t as its gradient

The divisor is the planned cohort size, however many reply. Only released rounds count: a skipped
round uses up neither noise nor any client's turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rootnoise import accounting
from rootnoise._check import RootnoiseError, integer, real, same
from rootnoise.federated.clients import ClientId, Clients, checked_id
from rootnoise.federated.cohorts import Policy, pick
from rootnoise.federated.store import Store
from rootnoise.federated.updates import MOST_CLIENTS, Layout, Malformed, from_grid, on_grid
from rootnoise.keys import Key
from rootnoise.mechanism import Mechanism
from rootnoise.noise import NoiseStream
from rootnoise.noise.stream import Memory
from rootnoise.workload import SGD

Weights = dict[str, torch.Tensor]
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Reply(StrEnum):
    """The outcome of a reply. Where it depends on the content, the guarantee does not cover it."""

    COUNTED = "counted"
    MALFORMED = "malformed: counts as zero"
    NON_FINITE = "not finite: counts as zero"
    DUPLICATE = "duplicate: dropped"
    LATE = "late: dropped"
    UNINVITED = "uninvited: dropped"


@dataclass(frozen=True)
class Round:
    """Who is asked to train, and on which weights; replies quote `t`."""

    t: int
    cohort: list[ClientId]
    weights: Weights


class PrivateAggregator:
    """Clips, sums, noises and applies clients' updates, and keeps the run in a folder.

    Created again on the same folder, it continues bit for bit after the last round that counts.
    Replies may come in any order, but must come from one thread.

    Whether a client takes part depends on whether its reply arrives in time, never on what is in
    it: an update that is malformed or not finite counts as zero, and uses up its client's turn. A
    client who was invited and does not reply keeps its turn, because nothing of it enters the sum.

    Args:
        folder: the run's folder; `rootnoise.federated.store` lists its files.
        mechanism: calibrated for MinSeparation (or a single participation) over rounds. Its
            clip_norm applies to a whole update, and its n_steps are rounds.
        weights: the initial weights, a state_dict; a resumed run uses the saved ones instead.
            Integer and boolean entries are left alone.
        cohort_size: planned number of clients in a round, and the divisor.
        learning_rate: the server's, for the optimizer of the mechanism's workload.
        optimizer: makes another optimizer from a list of parameters. It is post-processing.
        decay: factor on the weights before each step; that of the workload when None.
        least: a round with fewer replies is skipped.
        over_invite: fraction of cohort_size to invite in addition, against dropouts; replies beyond
            cohort_size count as late.
        policy: as for `pick`.
        memory: as for `NoiseStream`; its state is written every round.
        key: fresh from OS entropy when None; a resumed run uses the one in the folder.

    Attributes:
        t: number of rounds released.
        replies: number of replies of each kind, up to the last round that counts.

    Raises:
        RootnoiseError: parts that do not fit together, or do not fit the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        mechanism: Mechanism,
        weights: Mapping[str, torch.Tensor],
        *,
        cohort_size: int,
        learning_rate: float = 1.0,
        optimizer: Optimizer | None = None,
        decay: float | None = None,
        least: int = 1,
        over_invite: float = 0.0,
        policy: Policy = "fewest",
        memory: Memory = "look-ahead",
        key: Key | None = None,
    ) -> None:
        if not isinstance(mechanism, Mechanism):
            raise RootnoiseError(f"mechanism must be a Mechanism, got {type(mechanism).__name__}")
        if mechanism.trials is not None:  # losers too are sent to clients, round by round
            rule = "mechanism must be of one run, whose every round is shown to clients"
            raise RootnoiseError(f"{rule}, got the best of trials: {mechanism.trials}")
        if not isinstance(weights, Mapping):
            kind = type(weights).__name__
            raise RootnoiseError(f"weights must be a model's state_dict, got {kind}")
        size = integer("cohort_size", cohort_size, 1, MOST_CLIENTS)
        self.cohort_size, self.mechanism, self.policy = size, mechanism, policy
        self.least = integer("least", least, 1, size, high_name="cohort_size")
        more = real("over_invite", over_invite, at_least=0, at_most=9)
        self._invited_size = size + int(np.ceil(more * size))
        self._layout = Layout(weights)
        self._weights: Weights = {name: w.detach().cpu().clone() for name, w in weights.items()}
        self._parameters = {n: nn.Parameter(self._weights[n]) for n in self._layout.shapes}
        server = workload_optimizer(mechanism, learning_rate) if optimizer is None else optimizer
        self._optimizer = server(list(self._parameters.values()))
        if decay is None:
            decay = mechanism.workload.decay if isinstance(mechanism.workload, SGD) else 1.0
        self._decay = real("decay", decay, above=0, at_most=1)
        self.clients = Clients(mechanism.participation)  # refuses what it cannot enforce
        self.t = self._attempt = 0
        self.replies = dict.fromkeys(Reply, 0)
        self._invited: dict[ClientId, int] | None = None
        self._whole = True
        self._store = Store(Path(folder))
        try:
            self._begin(key, memory)
        except BaseException:
            self._store.close()
            raise

    def _begin(self, key: Key | None, memory: Memory) -> None:
        store, begun = self._store, self._store.begun
        if begun and key is not None and key != store.key():
            raise RootnoiseError(f"key must be the run's, {store.key().id}, got {key.id}")
        if begun and store.mechanism().fingerprint != self.mechanism.fingerprint:
            rule = "mechanism must be that of the folder's mechanism.json"
            other = self.mechanism.unlike(store.mechanism().settings())
            raise RootnoiseError(f"{rule}, got {other}")
        self._key = store.key() if begun else (key or Key.fresh())
        self._stream = NoiseStream(self.mechanism, self._layout.size, self._key, memory=memory)
        if begun:
            store.refuse_other_claim(self.claim())
            self._load(store.state())
        else:
            store.create(self.mechanism, self.claim(), self._key)
            self.clients.keep(store.path)
            store.release(0, self.weights)
            store.commit(self._state())
        if not store.holds(self.t, self.weights):
            store.release(self.t, self.weights)

    @property
    def weights(self) -> Weights:
        """A copy of the released weights.

        Raises:
            RootnoiseError: a round failed midway, so the present weights are not released.
        """
        self._check_whole()
        return self._copy()

    def _copy(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    def open(self, available: Iterable[ClientId]) -> Round | None:
        """Invite a cohort from the clients who are available now; new ones join.

        Returns None if fewer than `least` of them may take part: ask again later.

        Raises:
            RootnoiseError: a round is open, all rounds are used up, or bad ids.
        """
        self._check_whole()
        integer("round", self.t, 0, self.mechanism.n_steps - 1, high_name="n_steps - 1")
        if self._invited is not None:
            raise RootnoiseError(f"round {self.t} must be closed before another is opened")
        ids = list(available)
        indices = self.clients.join(ids)
        generator = self._key.derive("cohorts").generator(self.t, self._attempt)
        cohort = pick(self.clients, indices, self._invited_size, generator, self.policy)
        if cohort.size < self.least:
            return None
        named = dict(zip(indices.tolist(), ids, strict=True))
        self._invited = {checked_id(named[i]): i for i in cohort.tolist()}
        self._answered: set[int] = set()
        self._open_replies = dict.fromkeys(Reply, 0)
        self._total = torch.zeros(self._layout.size, dtype=torch.int64)
        return Round(self.t, list(self._invited), self.weights)

    def receive(self, t: int, client: ClientId, update: Any) -> Reply:
        """Accept one reply; nothing in it can stop the round or contribute more than clip_norm.

        Args:
            t: the round that it replies to.
            client: the client's id.
            update: tensors or arrays by name, one for each floating weight; it is not kept.
        """
        return self._count(self._receive(t, client, update))

    def receive_weights(self, t: int, client: ClientId, weights: Any) -> Reply:
        """Accept one reply that holds the client's weights after training, not their change.

        The update is their difference from the weights at the start of the round, in float64.
        """
        return self._count(self._receive(t, client, weights, minus=self._weights))

    def _count(self, reply: Reply) -> Reply:
        counts = self.replies if self._invited is None else self._open_replies
        counts[reply] += 1
        return reply

    def _receive(
        self, t: int, client: ClientId, update: Any, minus: Weights | None = None
    ) -> Reply:
        self._check_whole()
        if self._invited is None or t != self.t:
            return Reply.LATE
        try:
            index = self._invited[checked_id(client)]
        except (KeyError, RootnoiseError):
            return Reply.UNINVITED
        if index in self._answered:
            return Reply.DUPLICATE
        if len(self._answered) == self.cohort_size:
            return Reply.LATE
        self._answered.add(index)
        try:
            vector = self._layout.flat(update)
        except Malformed:
            return Reply.MALFORMED
        if minus is not None:
            vector -= self._layout.flat(minus)
        grid = on_grid(vector, self.mechanism.clip_norm)
        if grid is None:
            return Reply.NON_FINITE
        self._total += grid
        return Reply.COUNTED

    def close(self) -> Weights | None:
        """End the round: add noise once, step, save, and only then release the new weights.

        Returns None if fewer than `least` replied: the round is skipped, releases nothing, and `t`
        stays.

        Raises:
            RootnoiseError: no round is open, or the folder cannot be written; then nothing has
                been released, and the run can continue from the folder.
        """
        self._check_whole()
        if self._invited is None:
            raise RootnoiseError(f"round {self.t} must be open to be closed")
        answered, self._invited = self._answered, None
        for reply, count in self._open_replies.items():
            self.replies[reply] += count
        self._whole = False  # until the round is on disk
        skipped = len(answered) < self.least
        if skipped:
            self._attempt += 1
        else:
            self._step(answered)
        self._store.commit(self._state())
        self._whole = True
        if skipped:
            return None
        self._store.release(self.t, self.weights)
        return self.weights

    def _step(self, answered: set[int]) -> None:
        """Compute the round from those who replied; nothing of it leaves the process."""
        self.clients.admit(sorted(answered))
        noised = from_grid(self._total, self.mechanism.clip_norm) + self._stream.next().double()
        for name, mean in self._layout.split(noised / self.cohort_size).items():
            parameter = self._parameters[name]
            parameter.grad = -mean.to(parameter.dtype)
            parameter.data.mul_(self._decay)
        self._optimizer.step()
        self._attempt, self.t = 0, self.t + 1

    def claim(self) -> str:
        """Return the privacy guarantee for a user, as sentences that an auditor can check."""
        m = self.mechanism
        sens, cost, number = m.sensitivity, m.privacy, accounting.exactly
        kind = "exact" if sens.exact else "an upper bound"
        bound = "exact" if cost.exact and sens.exact else "an upper bound"
        who = str(m.participation).replace("step", "round")
        spent = m.claim().partition("-differential")[0]  # (epsilon, delta), rounded up
        norm = accounting.round_up(sens.value * (1 - 1e-12), 9)  # as `Mechanism.claim` rounds
        return (
            f"{spent}-differential privacy for one user zeroed out (its updates replaced by zero, "
            f"everybody else's rounds unchanged). A user is one client id. Every user takes part "
            f"in {who}, of {m.n_steps} rounds. A user's whole update is clipped to l2 norm "
            f"{number(m.clip_norm)} and summed, all with weight one; the strategy is {m.name} with "
            f"{m.strategy.bands} band(s) and sensitivity {norm} ({kind}: "
            f"{sens.method}); Gaussian noise Z has standard deviation "
            f"{accounting.round_down(m.noise_std)}: noise multiplier {number(m.noise_multiplier)} "
            f"x clip norm x sensitivity. Epsilon is {bound} "
            f"({cost.method}). Not covered: a person with several ids, data of one person on "
            f"another's device, who answers and when, floating-point effects, and choices made by "
            f"looking at the data outside this run."
        )

    def leave(self) -> None:
        """Let another process go on in the folder; an open round is lost."""
        self._whole = False
        self._store.close()

    def finish(self) -> None:
        """End the run and delete its secrets: model.pt stays, and the run cannot be resumed.

        Raises:
            RootnoiseError: a round is open, or failed midway.
        """
        self._check_whole()
        if self._invited is not None:
            raise RootnoiseError(f"round {self.t} must be closed before the run is finished")
        self._whole = False
        self._store.finish()

    def _check_whole(self) -> None:
        if not self._whole:
            raise RootnoiseError(
                "run must go on from its folder in a new PrivateAggregator: this one was left, or "
                "broken off inside a round"
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "version": 1,
            "cohort_size": self.cohort_size,
            "decay": self._decay,
            "layout": self._layout.describe(),
        }

    def _state(self) -> dict[str, Any]:
        return self._identity() | {
            "t": self.t,
            "attempt": self._attempt,
            "replies": {reply.name: count for reply, count in self.replies.items()},
            "clients": self.clients.state_dict(),
            "noise": self._stream.state_dict(),
            "weights": self._copy(),
            "optimizer": self._optimizer.state_dict(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        same("run", self._identity(), state)
        self.t, self._attempt = state["t"], state["attempt"]
        self.replies = {reply: state["replies"][reply.name] for reply in Reply}
        self._stream.load_state_dict(state["noise"])
        path = self._store.path
        self.clients = Clients.reopen(path, self.mechanism.participation, state["clients"])
        for name, weight in state["weights"].items():
            self._weights[name].copy_(weight)
        self._optimizer.load_state_dict(state["optimizer"])
        if not self.t == self._stream.t == self.clients.t:
            raise RootnoiseError(
                f"saved noise and clients must be at round {self.t}, got {self._stream.t} and "
                f"{self.clients.t}"
            )


def workload_optimizer(mechanism: Mechanism, learning_rate: float) -> Optimizer:
    """Return the server's SGD that the mechanism's noise is planned for.

    Raises:
        RootnoiseError: the workload is not that of SGD with momentum and decay.
    """
    workload, rate = mechanism.workload, real("learning_rate", learning_rate, above=0)
    if not isinstance(workload, SGD):
        kind = type(workload).__name__
        raise RootnoiseError(f"optimizer must be given unless the workload is SGD, got {kind}")
    momentum = workload.momentum
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum)

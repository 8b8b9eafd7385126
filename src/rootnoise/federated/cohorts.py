"""Whom to invite to a round: available clients who may take part again."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.random import Generator

from rootnoise._check import RootnoiseError, integer
from rootnoise.federated.clients import Clients
from rootnoise.participation.ledger_file import Indices

Policy = Literal["fewest", "longest", "random"]


def pick(
    clients: Clients,
    available: Indices,
    size: int,
    generator: Generator,
    policy: Policy = "fewest",
) -> Indices:
    """Return at most `size` of the available clients who may take part in round t, sorted.

    The separation is always respected: if too few may take part, fewer are returned, or none.

    Args:
        clients: the ledger, which is only read: nobody is admitted.
        available: dense indices; repeated ones count once.
        size: number of clients wanted.
        generator: breaks ties, so that clients with equal claims have equal chances.
        policy: "fewest" takes those who took part least often, "longest" those whose last round is
            longest ago, "random" anyone.

    Raises:
        RootnoiseError: size < 1, or another policy.

    >>> from rootnoise.participation import MinSeparation
    >>> clients = Clients(MinSeparation(min_sep=2, max_participations=5))
    >>> everyone, rng = clients.join(range(5)), np.random.default_rng(0)
    >>> clients.admit([0, 1])
    >>> pick(clients, everyone, 4, rng).tolist()
    [2, 3, 4]
    """
    integer("size", size, 1)
    if policy not in get_args(Policy):
        raise RootnoiseError(f"policy must be in {list(get_args(Policy))}, got {policy!r}")
    who = np.unique(np.asarray(available, dtype=np.int64))
    who = who[clients.may_join(who)]
    if who.size <= size:
        return who
    count, last = clients.rounds(who)
    ranks = {"fewest": count, "longest": last, "random": np.zeros_like(count)}
    urgency = ranks[policy]
    first = np.argpartition(urgency + generator.random(who.size), size - 1)[:size]
    return np.sort(who[first])

"""Training on people's devices: one person is a client, and what is clipped is its whole update."""

from __future__ import annotations

from rootnoise.federated.clients import Clients
from rootnoise.federated.cohorts import pick
from rootnoise.federated.server import PrivateAggregator, Reply, Round

__all__ = ["Clients", "PrivateAggregator", "Reply", "Round", "pick"]

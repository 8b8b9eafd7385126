"""Training on users' devices: each user is a client, and a client's whole update is clipped."""

from __future__ import annotations

from rootnoise.federated.clients import Clients
from rootnoise.federated.cohorts import pick
from rootnoise.federated.server import PrivateAggregator, Reply, Round

__all__ = ["Clients", "PrivateAggregator", "Reply", "Round", "pick"]

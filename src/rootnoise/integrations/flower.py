"""Flower 1.42: a strategy whose rounds are those of a `PrivateAggregator`.

    start              counts rounds from the state of the run's folder
    configure_train    invites a cohort by user ids, which stay when node ids change
    aggregate_train    a reply's weights minus the round's are one update; then noise, step, save
    evaluation         by clients only on request: their metrics come from raw data

A server app only has to say who its users are (`by_key`, `AskedOnce`) and to change its strategy.
A client replies with its whole weights in one ArrayRecord, as for FedAvg; all else is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rootnoise._check import RootnoiseError, extra, integer, real
from rootnoise.federated import PrivateAggregator
from rootnoise.federated.clients import ClientId

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy

    # Errors that the SuperLink reports for a client. Any other error is the client's own reply.
    ABSENT = {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    }
except ImportError:  # the constructors below then ask for the extra
    Strategy = object

Users = Callable[["Grid"], Mapping[int, ClientId]]

LONGEST_NAME = 200  # most characters in a name that a client gives itself


class PrivateStrategy(Strategy):  # type: ignore[misc] # of type Any where Flower is not installed
    """User-level differential privacy with correlated noise, for `flwr.serverapp`.

    Clipping, noise, the server's optimizer, the ledger of users and the folder are those of the
    aggregator. If a user has several nodes, one of them is asked per round, in turn. A client that
    raises an exception counts as having replied: its update is zero, and its user's turn is used
    up, as for any malformed reply. A client that the SuperLink does not reach, or that is late, has
    not replied.

    Nothing raw is returned: no training metrics and no error messages, and no client evaluates
    unless `evaluation` is given.

    Args:
        server: the run. Its weights are trained, and `start` continues from its last round; call
            its `finish` after the last one.
        users: maps a grid to the user of each available node, {node id: user id}. Node ids do not
            identify users: a SuperNode without its own key gets a new id at each start, and a
            simulation assigns all ids anew. See `by_key` and `AskedOnce`.
        evaluation: a Flower strategy (such as FedAvg) that asks clients to evaluate and averages
            their replies. Its metrics come from raw data and are NOT covered by the guarantee.

    Raises:
        RootnoiseError: Flower is not installed.
    """

    def __init__(
        self, server: PrivateAggregator, users: Users, *, evaluation: Strategy | None = None
    ) -> None:
        extra("flwr", "flower", "a strategy for Flower")
        self.server, self.users, self.evaluation = server, users, evaluation
        self._asked: dict[int, ClientId] = {}
        self._open = False

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train until `num_rounds` rounds are released in total, including earlier processes.

        Args:
            grid: Flower's grid.
            initial_arrays: optional. If given, they must equal the initial weights of a new run.
            num_rounds: all rounds of the mechanism when None. A skipped round uses up one of them:
                then fewer are released, and `start` may be called again.
            timeout: seconds after which a client that has not replied is late.
            train_config: sent to clients, with "server-round" (from 1) added.
            evaluate_config: sent to clients that evaluate.
            evaluate_fn: maps the number of rounds released and their weights to metrics on the
                server's own public data.

        Returns:
            The released weights, and metrics by the number of rounds released.

        Raises:
            RootnoiseError: more rounds than the mechanism has, initial arrays that differ from the
                server's, or what `PrivateAggregator` refuses.
        """
        server, begun = self.server, self.server.t
        n = server.mechanism.n_steps
        wanted = n if num_rounds is None else num_rounds
        rounds = integer("num_rounds", wanted, 0, n, high_name="n_steps")
        if initial_arrays is not None and not begun:
            self._check_initial(initial_arrays)
        metrics: dict[int, MetricRecord] = {}

        def evaluated(_: int, arrays: ArrayRecord) -> MetricRecord | None:
            found = None if evaluate_fn is None else evaluate_fn(server.t, arrays)
            if found is not None:
                metrics[server.t] = found
            return found

        result = super().start(
            grid,
            ArrayRecord(server.weights),
            max(rounds - begun, 0),
            timeout,
            train_config,
            evaluate_config,
            evaluated,
        )
        result.arrays = ArrayRecord(server.weights)
        result.evaluate_metrics_serverapp = metrics
        return result

    def _check_initial(self, arrays: ArrayRecord) -> None:
        ours = ArrayRecord(self.server.weights)
        if dict(arrays) != dict(ours):
            raise RootnoiseError(
                f"initial_arrays must be the weights that PrivateAggregator was made with (or "
                f"left out), got others in {[n for n in arrays if arrays[n] != ours.get(n)][:5]}"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each client of the cohort, or none if too few may take part.

        The weights that are sent are the aggregator's, not `arrays`.
        """
        nodes: dict[ClientId, list[int]] = {}
        for node, user in sorted(self.users(grid).items()):
            nodes.setdefault(user, []).append(node)
        self._asked = {}
        # Sorted, so that users who join together get the same indices in every process.
        opened = self.server.open(sorted(nodes, key=str))
        if opened is None:
            return []
        self._open = True
        clients = self.server.clients
        turns, _ = clients.rounds(clients.join(opened.cohort))
        for user, turn in zip(opened.cohort, turns.tolist(), strict=True):
            self._asked[nodes[user][turn % len(nodes[user])]] = user
        config = ConfigRecord({**config, "server-round": opened.t + 1})
        content = RecordDict({"arrays": ArrayRecord(opened.weights), "config": config})
        group = str(opened.t)
        return [Message(content, node, MessageType.TRAIN, group_id=group) for node in self._asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, None]:
        """Return the round's noised weights once they are on disk; no metrics.

        The weights are None if the round is skipped because fewer than `least` clients replied.
        """
        for reply in replies:
            self._take(reply)
        if not self._open:
            return None, None
        self._open = False
        weights = self.server.close()
        return (None if weights is None else ArrayRecord(weights)), None

    def _take(self, reply: Message) -> None:
        meta = reply.metadata
        if reply.has_error() and reply.error.code in ABSENT:
            return
        t = int(meta.group_id) if meta.group_id.isdecimal() else -1
        # Only nodes that were asked have a user here: the aggregator drops the others' replies.
        user: Any = self._asked.get(meta.src_node_id)
        self.server.receive_weights(t, user, _weights(reply))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages, or those of `evaluation`."""
        if self.evaluation is None:
            return []
        messages: Iterable[Message] = self.evaluation.configure_evaluate(
            server_round, arrays, config, grid
        )
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, or the metrics that `evaluation` computes from the replies."""
        if self.evaluation is None:
            return None
        return self.evaluation.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the claim."""
        log = logging.getLogger("flwr")
        log.info("\t├──> %s", self.server.claim())
        log.info("\t└──> rounds released so far: %d", self.server.t)
        if self.evaluation is not None:
            log.warning("Clients' evaluation metrics are raw: the guarantee does not cover them.")


def _weights(reply: Message) -> Any:
    """Return a reply's one ArrayRecord as arrays by name, or None."""
    try:
        (record,) = reply.content.array_records.values()
        return {name: array.numpy() for name, array in record.items()}
    except Exception:  # noqa: BLE001 - a client's bytes may make NumPy raise anything
        return None


def by_key(grid: Grid) -> dict[int, str]:
    """Return {node id: public key}: each user is the key of a SuperNode.

    SuperNodes must be started with a key (`--auth-supernode-private-key`). Without one a SuperNode
    creates a new key at each start, and counts as a new user who has not taken part yet.
    """
    return {node.node_id: node.public_key.hex() for node in grid.get_nodes()}


class AskedOnce:
    """Asks each new node for the name of its user; the client app replies with `name_of`.

    In the client app::

        @app.query()
        def user(message, context):
            return Message(name_of(context.node_config["partition-id"]), reply_to=message)

    A client that changes its name at each start loses its own guarantee, and one that uses another
    user's name takes up that user's turns; nobody else's guarantee changes. A node that does not
    reply, or not with a valid name, counts as unavailable.

    Args:
        timeout: seconds to wait for the replies of new nodes.

    Raises:
        RootnoiseError: Flower is not installed, or timeout <= 0.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        extra("flwr", "flower", "asking Flower's nodes")
        self.timeout = real("timeout", timeout, above=0)
        self._names: dict[int, str] = {}

    def __call__(self, grid: Grid) -> dict[int, str]:
        """Return {node id: user's name} of the available nodes that have replied."""
        nodes = set(grid.get_node_ids())
        new = sorted(nodes - self._names.keys())
        messages = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        for reply in grid.send_and_receive(messages, timeout=self.timeout) if new else []:
            node, name = reply.metadata.src_node_id, _name(reply)
            if node in nodes and name is not None:
                self._names.setdefault(node, name)
        return {node: name for node, name in self._names.items() if node in nodes}


def name_of(user: str | int) -> RecordDict:
    """Return the content of a client's reply to `AskedOnce`; 7 and "7" are the same user."""
    extra("flwr", "flower", "an answer to Flower's server")
    return RecordDict({"user": ConfigRecord({"name": str(user)})})


def _name(reply: Message) -> str | None:
    record = reply.content.config_records.get("user", {}) if reply.has_content() else {}
    name = record.get("name")
    return name if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME else None

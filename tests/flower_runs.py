"""Flower's real messages without its network: a grid of phones that answer at once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import federated_runs as runs
from processes import kill_at_line, kill_at_state, kill_inside_write
from rootnoise.federated import PrivateAggregator
from rootnoise.integrations.flower import AskedOnce, PrivateStrategy, by_key, name_of

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
logging.getLogger("flwr").setLevel(logging.ERROR)

FILES = (*runs.FILES, "integrations/flower.py")
PHONES = 14

Answer = Callable[["Phones", str, Message], Iterable[Message]]


def trained(name: str, message: Message) -> dict[str, torch.Tensor]:
    """Return the weights of a phone after training: those sent, and a change by phone and round."""
    (record,) = message.content.array_records.values()
    weights = record.to_torch_state_dict()
    change = runs.update(message.content.config_records["config"]["server-round"] - 1, name)
    return {n: w + change[n] if n in change else w for n, w in weights.items()}


def honest(grid: Phones, name: str, message: Message) -> Iterable[Message]:
    content = RecordDict({"arrays": ArrayRecord(trained(name, message))})
    content["metrics"] = MetricRecord({"num-examples": 7, "loss": 0.5})
    return [Message(content, reply_to=message)]


class Phones(Grid):
    """As many nodes as there are names; node ids are dealt anew in each grid, as in simulations."""

    def __init__(self, names: Iterable[str], answer: Answer = honest, deal: int = 0) -> None:
        names = list(names)
        ids = np.random.default_rng(deal).choice(2**40, len(names), replace=False)
        self.names = dict(zip(ids.tolist(), names, strict=True))
        self.answer = answer
        self.asked: list[Message] = []
        self.queries = 0
        self._number = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return set(self.names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=i, public_key=n.encode()) for i, n in self.names.items()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._number))
            name = self.names[message.metadata.dst_node_id]
            if message.metadata.message_type == MessageType.QUERY:
                self.queries += 1
                replies.append(Message(name_of(name), reply_to=message))
            else:
                self.asked.append(message)
                replies.extend(self.answer(self, name, message))
        return replies

    def set_run(self, run: Any) -> None: ...
    def run(self) -> None: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def push_messages(self, messages: Iterable[Message]) -> Any: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Any: ...


def grid(answer: Answer = honest, deal: int = 0) -> Phones:
    return Phones([f"phone {i}" for i in range(PHONES)], answer, deal)


def reply(message: Message, arrays: Any, key: str = "arrays") -> Message:
    """Return a client's reply that holds these arrays, torch, NumPy or Flower's own."""
    made = {}
    for name, array in arrays.items():
        made[name] = array if isinstance(array, Array) else Array(np.asarray(array))
    return Message(RecordDict({key: ArrayRecord(made)}), reply_to=message)


def error(message: Message, code: int) -> Message:
    return Message(Error(code, "the photo of Ann could not be read"), reply_to=message)


def whole(folder: Path, log: Path, deal: int = 0) -> None:
    """Go on to the end in Flower's own loop; each release is shown as a hash."""
    server: PrivateAggregator = runs.server(folder)

    def shown(t: int, arrays: ArrayRecord) -> None:
        runs.show(log, t, dict(arrays.to_torch_state_dict()))

    users = AskedOnce() if deal % 2 else by_key_name
    result = PrivateStrategy(server, users).start(grid(deal=deal), evaluate_fn=shown)
    assert server.t == runs.ROUNDS
    assert not result.train_metrics_clientapp
    server.leave()


def by_key_name(grid: Grid) -> dict[int, str]:
    return {node: bytes.fromhex(key).decode() for node, key in by_key(grid).items()}


def killed_at_line(folder: Path, log: Path, fuse: int, deal: int) -> None:
    kill_at_line(fuse, FILES)
    whole(folder, log, deal)


def killed_at_state(folder: Path, log: Path, fuse: int, deal: int) -> None:
    kill_at_state(fuse, folder, FILES)
    whole(folder, log, deal)


def killed_inside_write(folder: Path, log: Path, fuse: int, deal: int) -> None:
    kill_inside_write(fuse)
    whole(folder, log, deal)

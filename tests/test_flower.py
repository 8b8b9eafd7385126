"""The Flower strategy against the real flwr: its messages and its loop.

`make flower` runs these, in an environment of their own; where flwr is not installed they are
skipped, and what the module says then is in test_flower_missing.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg, Strategy

import federated_runs as runs
import flower_runs as flower
from rootnoise._check import RootnoiseError
from rootnoise.federated import PrivateAggregator, Reply
from rootnoise.federated.updates import from_grid
from rootnoise.integrations.flower import AskedOnce, PrivateStrategy, by_key, name_of
from rootnoise.keys import Key

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def strategy(tmp_path):
    return PrivateStrategy(runs.server(tmp_path / "run"), flower.by_key_name)


def messages(strategy, grid):
    """Open a round; Flower's own arrays and number of the round play no part."""
    return list(strategy.configure_train(99, ArrayRecord(), ConfigRecord({"lr": 0.1}), grid))


def total(strategy):
    """Return the open round's sum of clipped updates, over the clip norm."""
    return from_grid(strategy.server._total, 1.0)


def test_a_round_asks_the_cohort_for_training_on_the_released_weights(strategy):
    asked = messages(strategy, flower.grid())
    assert len(asked) == runs.COHORT
    assert len({m.metadata.dst_node_id for m in asked}) == runs.COHORT
    for message in asked:
        assert message.metadata.message_type == "train"
        assert message.metadata.group_id == "0"
        config = message.content.config_records["config"]
        assert dict(config) == {"lr": 0.1, "server-round": 1}
        sent = message.content.array_records["arrays"].to_torch_state_dict()
        assert all(torch.equal(w, sent[n]) for n, w in strategy.server.weights.items())


def test_rounds_are_those_of_the_aggregator_to_the_last_bit(tmp_path):
    """Flower's loop on one side, `receive` of the same updates on the other; no metrics come out.

    Subtracting the round's weights from the client's costs one float32 rounding of the client's,
    which is given to the aggregator too.
    """
    ours = PrivateStrategy(runs.server(tmp_path / "ours"), flower.by_key_name)
    plain, seen = runs.server(tmp_path / "plain"), []
    result = ours.start(
        flower.grid(), evaluate_fn=lambda t, arrays: MetricRecord({"t": t, "mean": 0.0})
    )
    while plain.t < runs.ROUNDS:
        opened = plain.open(sorted(flower.grid().names.values()))
        for client in opened.cohort:
            update = runs.update(opened.t, client)
            after = {n: opened.weights[n] + u for n, u in update.items()}
            change = {n: w.double() - opened.weights[n].double() for n, w in after.items()}
            assert plain.receive(opened.t, client, change) is Reply.COUNTED
        seen.append(plain.close())
    assert ours.server.t == runs.ROUNDS
    final = result.arrays.to_torch_state_dict()
    assert all(torch.equal(w, final[name]) for name, w in seen[-1].items())
    assert result.train_metrics_clientapp == result.evaluate_metrics_clientapp == {}
    assert [m["t"] for m in result.evaluate_metrics_serverapp.values()] == list(range(9))
    assert isinstance(ours, Strategy)


def test_only_the_change_of_the_weights_is_clipped_and_summed(strategy):
    """A client that returns what it got adds nothing; a small change is added exactly."""
    asked = messages(strategy, flower.grid())
    got = asked[0].content.array_records["arrays"]
    strategy._take(flower.reply(asked[0], got))
    assert not total(strategy).any()
    small = {n: w + 2**-6 if w.is_floating_point() else w for n, w in runs.WEIGHTS.items()}
    strategy._take(flower.reply(asked[1], small))
    clip = strategy.server.mechanism.clip_norm
    assert torch.allclose(total(strategy) * clip, torch.full((17,), 2.0**-6).double(), rtol=1e-6)
    strategy._take(flower.reply(asked[2], {n: w + 1000 for n, w in small.items()}, key="model"))
    norm = float((total(strategy) * clip - 2**-6).norm())
    assert norm == pytest.approx(clip, rel=1e-6)
    assert strategy.server._open_replies[Reply.COUNTED] == 3


def broken(data: bytes, dtype="float32", stype="numpy.ndarray"):
    return Array(dtype=dtype, shape=(4, 3), stype=stype, data=data)


NPY = Array(np.zeros((4, 3), np.float32)).data

HUGE = NPY.replace(b"(4, 3)", b"(9999999999999, 3)")

A, B = torch.ones(4, 3), torch.ones(5)

GARBAGE: dict[str, Any] = {
    "no arrays": {},
    "missing": {"a": A},
    "unknown": {"a": A, "b": B, "c": B},
    "transposed": {"a": A.T, "b": B},
    "would broadcast": {"a": torch.ones(1), "b": torch.ones(1)},
    "integers": {"a": A.long(), "b": B},
    "complex": {"a": A.to(torch.complex64), "b": B},
    "strings": {"a": np.full((4, 3), "x"), "b": B},
    "no bytes": {"a": broken(b""), "b": B},
    "noise": {"a": broken(bytes(range(256))), "b": B},
    "cut": {"a": broken(NPY[:-5]), "b": B},
    "a zip": {"a": broken(b"PK\x03\x04" + bytes(50)), "b": B},
    "a pickle": {"a": broken(b"\x80\x04N."), "b": B},
    "says it is huge": {"a": broken(HUGE), "b": B},
    "another format": {"a": broken(NPY, stype="torch"), "b": B},
}

BAD = {
    "nan": {"a": A * NAN, "b": B},
    "inf": {"a": A * INF, "b": B},
    "half overflow": {"a": (A * 1e6).half(), "b": B.half()},
}


@pytest.mark.parametrize(
    ("kind", "arrays"),
    [(Reply.MALFORMED, a) for a in GARBAGE.values()]
    + [(Reply.NON_FINITE, a) for a in BAD.values()],
    ids=[*GARBAGE, *BAD],
)
def test_garbage_adds_zero_and_takes_its_users_turn(strategy, kind, arrays):
    asked = messages(strategy, flower.grid())
    strategy._take(flower.reply(asked[0], arrays))
    assert strategy.server._open_replies[kind] == 1
    assert not total(strategy).any()
    assert len(strategy.server._answered) == 1
    weights, metrics = strategy.aggregate_train(1, [])
    assert weights is not None
    assert metrics is None


def test_two_records_or_none_are_malformed(strategy):
    asked = messages(strategy, flower.grid())
    sound = ArrayRecord(runs.WEIGHTS)
    two = RecordDict({"arrays": sound, "more": sound})
    strategy._take(Message(two, reply_to=asked[0]))
    strategy._take(Message(RecordDict(), reply_to=asked[1]))
    assert strategy.server._open_replies[Reply.MALFORMED] == 2


def test_half_precision_weights_are_clipped_in_float64(strategy):
    asked = messages(strategy, flower.grid())
    half = {"a": (A * 6e4).half(), "b": (B * 6e4).half()}
    strategy._take(flower.reply(asked[0], half))
    assert float(total(strategy).norm()) == pytest.approx(1.0, abs=1e-6)


def test_an_exception_in_a_client_is_an_answer_and_its_reason_is_not_logged(strategy, caplog):
    """If it were none, a person's data could keep its turn, and so move other people's rounds."""
    asked = messages(strategy, flower.grid())
    own = [ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.UNKNOWN, ErrorCode.CLIENT_APP_CRASHED]
    strategy.aggregate_train(1, [flower.error(m, code) for m, code in zip(asked, own, strict=True)])
    server = strategy.server
    assert server.t == 1
    assert server.replies[Reply.MALFORMED] == 3
    rounds, _ = server.clients.rounds(np.arange(flower.PHONES))
    assert rounds.sum() == 3
    assert "photo" not in caplog.text


def test_who_was_not_reached_keeps_its_turn(strategy):
    asked = messages(strategy, flower.grid())
    away = [
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ]
    replies = [flower.error(m, code) for m, code in zip(asked, away, strict=True)]
    assert strategy.aggregate_train(1, replies) == (None, None)
    server = strategy.server
    assert server.t == server.clients.t == 0
    assert sum(server.replies.values()) == 0
    assert len(messages(strategy, flower.grid())) == runs.COHORT


def test_late_double_and_foreign_replies_are_dropped_and_counted(strategy):
    grid = flower.grid()
    first = messages(strategy, grid)
    late = flower.reply(first[0], runs.WEIGHTS)
    strategy.aggregate_train(1, [flower.reply(m, runs.WEIGHTS) for m in first[1:]])
    asked = messages(strategy, grid)
    stranger = Message(RecordDict(), 12345, "train", group_id="1")
    unnumbered = Message(RecordDict(), asked[1].metadata.dst_node_id, "train", group_id="one")
    once = flower.reply(asked[0], runs.WEIGHTS)
    for reply in (
        late,
        once,
        once,
        flower.reply(stranger, runs.WEIGHTS),
        flower.reply(unnumbered, runs.WEIGHTS),
    ):
        strategy._take(reply)
    strategy.aggregate_train(2, [])
    counts = {reply: count for reply, count in strategy.server.replies.items() if count}
    assert counts == {Reply.COUNTED: 3, Reply.LATE: 2, Reply.DUPLICATE: 1, Reply.UNINVITED: 1}
    strategy.aggregate_train(3, [once])  # no round is open: nothing happens but a count
    assert strategy.server.replies[Reply.LATE] == 3
    assert strategy.server.t == 2


def test_of_one_users_nodes_one_is_asked_by_turns(tmp_path):
    """Ann has three devices: two rounds of eight are hers, not six, and no two at once."""
    names = ["ann"] * 3 + [f"phone {i}" for i in range(12)]
    grid = flower.Phones(names)
    strategy = PrivateStrategy(runs.server(tmp_path), flower.by_key_name)
    strategy.start(grid)
    hers = [m.metadata for m in grid.asked if grid.names[m.metadata.dst_node_id] == "ann"]
    assert len(hers) == 2  # max_participations
    assert len({m.dst_node_id for m in hers}) == 2
    (ann,) = strategy.server.clients.join(["ann"])
    assert strategy.server.clients.rounds(np.array([ann]))[0] == 2


def test_nobody_there_is_a_skipped_round(strategy):
    empty = flower.Phones([])
    assert messages(strategy, empty) == []
    assert strategy.aggregate_train(1, []) == (None, None)
    result = strategy.start(empty)
    assert strategy.server.t == 0
    assert strategy.start(flower.grid()).arrays != result.arrays  # and then they come
    assert strategy.server.t == runs.ROUNDS


def test_a_run_goes_on_where_its_folder_stands(tmp_path):
    """Some rounds, and the rest by another object with other node ids: same bits as at once."""
    whole = PrivateStrategy(runs.server(tmp_path / "whole"), flower.by_key_name)
    expected = whole.start(flower.grid()).arrays
    half = PrivateStrategy(runs.server(tmp_path / "half"), flower.by_key_name)
    half.start(flower.grid(deal=1), num_rounds=3)
    assert half.server.t == 3
    half.server.leave()
    rest = PrivateStrategy(runs.server(tmp_path / "half"), AskedOnce())
    found = rest.start(
        flower.grid(deal=2),
        ArrayRecord(runs.WEIGHTS),  # where the run began, as the script always gives it
        evaluate_fn=lambda t, arrays: MetricRecord({"t": t}),
    )
    assert found.arrays == expected
    assert list(found.evaluate_metrics_serverapp) == list(range(3, runs.ROUNDS + 1))
    assert rest.start(flower.grid()).arrays == expected  # nothing is left to do


def test_other_initial_arrays_and_too_many_rounds_are_refused(strategy):
    other = ArrayRecord({n: w + 1 for n, w in runs.WEIGHTS.items()})
    with pytest.raises(RootnoiseError, match=r"initial_arrays must be .* got others in \['a', "):
        strategy.start(flower.grid(), other)
    with pytest.raises(RootnoiseError, match=r"num_rounds must be in \[0, n_steps=8\], got 9"):
        strategy.start(flower.grid(), num_rounds=9)
    assert strategy.start(flower.grid(), ArrayRecord(runs.WEIGHTS), num_rounds=0).arrays
    assert strategy.server.t == 0


def test_clients_evaluate_only_if_asked_to(tmp_path, caplog):
    def answer(grid, name, message):
        if message.metadata.message_type == "train":
            return flower.honest(grid, name, message)
        metrics = MetricRecord({"num-examples": 7, "loss": 0.5})
        return [Message(RecordDict({"metrics": metrics}), reply_to=message)]

    quiet = PrivateStrategy(runs.server(tmp_path / "quiet"), flower.by_key_name)
    grid = flower.grid(answer)
    assert quiet.start(grid).evaluate_metrics_clientapp == {}
    assert {m.metadata.message_type for m in grid.asked} == {"train"}
    loud = PrivateStrategy(
        runs.server(tmp_path / "loud"), flower.by_key_name, evaluation=FedAvg(min_train_nodes=2)
    )
    with caplog.at_level("WARNING", logger="flwr"):
        found = loud.start(flower.grid(answer)).evaluate_metrics_clientapp
    assert [m["loss"] for m in found.values()] == pytest.approx([0.5] * runs.ROUNDS)
    assert "metrics are raw" in caplog.text


def test_the_claim_is_logged(strategy, caplog):
    with caplog.at_level("INFO", logger="flwr"):
        strategy.summary()
    assert "(4, 1e-05)-differential privacy for one user" in caplog.text


def test_nodes_are_asked_once_for_their_user():
    grid = flower.Phones(["a", "b", "c"])
    users = AskedOnce()
    assert users(grid) == grid.names
    gone = next(iter(grid.names))
    del grid.names[gone]
    grid.names[77] = "d"
    assert users(grid) == grid.names
    assert users(grid)[77] == "d"
    assert grid.queries == 4


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"user": ConfigRecord()}),
        RecordDict({"user": ConfigRecord({"name": 7})}),
        RecordDict({"user": ConfigRecord({"name": ""})}),
        RecordDict({"user": ConfigRecord({"name": "x" * 201})}),
        RecordDict({"user": MetricRecord({"name": 1.0})}),
        None,
    ],
)
def test_a_node_without_a_proper_name_is_not_there(content):
    class Nameless(flower.Phones):
        def send_and_receive(self, messages, *, timeout=None):
            for message in messages:
                if content is None:
                    yield flower.error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
                else:
                    yield Message(content, reply_to=message)

    assert AskedOnce()(Nameless(["a"])) == {}


def test_names_and_keys():
    assert name_of(7) == name_of("7")
    grid = flower.Phones(["ann"])
    assert by_key(grid) == dict.fromkeys(grid.names, b"ann".hex())
    with pytest.raises(RootnoiseError, match="timeout must be a finite number > 0, got 0"):
        AskedOnce(timeout=0)


class Wild:
    """Phones that fail at random, in any way; `calm` plays the same run with zeros for garbage."""

    def __init__(self, seed: int) -> None:
        self.rng, self.sent = np.random.default_rng(seed), 0
        self.faults: dict[str, str] = {}
        self.held: list[Message] = []

    def __call__(self, grid, name, message):
        kinds = ["none", "gone", "raises", "garbage", "twice", "late", "foreign"]
        group = message.metadata.group_id
        fault = self.faults[message.metadata.message_id] = str(self.rng.choice(kinds))
        replies = self.replies(fault, message, *flower.honest(grid, name, message))
        old = [reply for reply in self.held if reply.metadata.group_id != group]
        if old and fault == "none":
            replies.insert(0, old[0])
            self.held.remove(old[0])
        self.sent += len(replies) - (fault == "gone")
        return replies

    def replies(self, fault, message, sound):
        bad = list((GARBAGE | BAD).values())
        garbage = flower.reply(message, bad[self.rng.integers(len(bad))])
        meta = message.metadata
        stranger = Message(
            RecordDict(), int(self.rng.integers(99)), "train", group_id=meta.group_id
        )
        if fault == "late":
            self.held.append(sound)
        return {
            "none": [sound],
            "gone": [flower.error(message, ErrorCode.NODE_UNAVAILABLE)],
            "raises": [flower.error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)],
            "garbage": [garbage],
            "twice": [sound, garbage, sound],
            "late": [],
            "foreign": [Message(sound.content, reply_to=stranger), sound],
        }[fault]

    def calm(self, grid, name, message):
        fault = self.faults[message.metadata.message_id]
        if fault in ("gone", "late"):
            return []
        if fault in ("raises", "garbage"):
            return [flower.reply(message, message.content.array_records["arrays"])]
        return flower.honest(grid, name, message)


def test_a_hundred_random_faults_change_nothing(tmp_path):
    """Through Flower's own messages and loop: the bits are those of the calm run.

    No user exceeds its rounds, all replies are accounted for, and epsilon is the mechanism's.
    """
    wild, n, ends = Wild(12), 60, []
    phones = [f"phone {i}" for i in range(60)]
    mechanism, settings = runs.mechanism(n, b=5, k=6), {"cohort_size": 5, "key": Key.from_seed(3)}
    for name, answer in (("wild", wild), ("calm", wild.calm)):
        server = PrivateAggregator(tmp_path / name, mechanism, runs.WEIGHTS, **settings)
        strategy = PrivateStrategy(server, flower.by_key_name)
        grid = flower.Phones(phones, answer)
        while server.t < n:  # rounds in which nobody answers are skipped
            end = strategy.start(grid).arrays
        ends.append(end)
        assert server.clients.rounds(np.arange(60))[0].max() <= 6
        spent = f"({mechanism.epsilon:.6g}, 1e-05)-differential privacy for one user"
        assert spent in server.claim()
        if name == "wild":
            assert sum(server.replies.values()) == wild.sent
    assert ends[0] == ends[1]
    counts = Counter(wild.faults.values())
    assert counts.total() - counts["none"] >= 100
    assert len(counts) == 7
    assert min(counts.values()) >= 10

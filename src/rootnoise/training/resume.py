"""What of an optimizer is saved between two steps, and how a saved one, or a rank, goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rootnoise._check import RootnoiseError, integer
from rootnoise.keys import Key
from rootnoise.participation.ledger import Ledger

if TYPE_CHECKING:
    from rootnoise.training.optimizer import PrivateOptimizer


def follow_first(private: PrivateOptimizer, key: Key) -> Key:
    """Adopt rank 0's weights, sampler seed and ledger salt, and return its key."""
    ranks = private._ranks
    if ranks.size == 1:
        return key
    ranks.same("mechanism", private.mechanism.fingerprint)
    ranks.same("parameters", private._held.layout)
    ranks.same("decay", private.decay)
    states = [private.sampler.state_dict(), private.ledger.state_dict(), key.secret]
    sampler, ledger, secret = ranks.first(states)
    private.sampler.load_state_dict(sampler)
    private.ledger.load_state_dict(ledger)
    private._place.begin()
    return Key(secret)


def saved(private: PrivateOptimizer) -> dict[str, Any]:
    """Return the state; see `PrivateOptimizer.state_dict`."""
    private._check_whole()
    if private._batch is not None:
        raise RootnoiseError(
            f"state must be that between two steps, got step {private.t} in micro-batches: finish "
            "it, or resume from the state before"
        )
    place, noise = private._place, private.stream.state_dict()
    noise |= {name: place.save(noise[name], most) for name, most in rows(private).items()}
    return {
        "version": 1,
        "t": private.t,
        "non_finite": private.non_finite,
        "decay": private.decay,
        "layout": private._held.layout,
        "optimizer": place.optimizer_state(private.optimizer),
        "noise": noise,
        "ledger": private.ledger.state_dict(),
        "sampler": private.sampler.state_dict(),
    }


def load(private: PrivateOptimizer, state: Mapping[str, Any]) -> None:
    """Take over a saved state, or refuse it; see `PrivateOptimizer.load_state_dict`."""
    if not isinstance(state, Mapping):
        raise RootnoiseError(f"saved state must be a mapping, got {type(state).__name__}")
    if private.t or private.ledger.t or private.stream.t:
        raise RootnoiseError(f"optimizer must be fresh to load a state, got step {private.t}")
    private.ledger.check_unkept()
    fixed = {"version": 1, "decay": private.decay, "layout": private._held.layout}
    for name, ours in fixed.items():
        if state.get(name) != ours:
            raise RootnoiseError(f"saved {name} must be {ours!r}, got {state.get(name)!r:.80}")
    t = integer("saved t", state.get("t", -1), 0, private.mechanism.n_steps)
    bad = integer("saved non_finite", state.get("non_finite", -1), 0)
    # Load into fresh copies first, so that a refusal changes nothing.
    stream = private._new_stream(private.stream.key)
    ledger = Ledger(private.ledger.participation, private.ledger.n_examples)
    sampler = copy.copy(private.sampler)
    parts: dict[str, Any] = {"noise": stream, "ledger": ledger, "sampler": sampler}
    for name, part in parts.items():
        if not isinstance(state.get(name), Mapping):
            raise RootnoiseError(f"saved {name} must be a mapping, got {state.get(name)!r:.80}")
        part.load_state_dict(_own(private, state[name]) if part is stream else state[name])
    if not stream.t == ledger.t == t:
        raise RootnoiseError(
            f"saved noise and ledger must be at step {t}, got {stream.t} and {ledger.t}"
        )
    try:
        private._place.load_optimizer_state(private.optimizer, state["optimizer"])
    except (KeyError, TypeError, ValueError) as reason:
        raise RootnoiseError(f"saved optimizer must fit this one, got {reason}") from None
    private.sampler.load_state_dict(state["sampler"])
    private._stream, private.ledger, private.t, private.non_finite = stream, ledger, t, bad


def rows(private: PrivateOptimizer) -> dict[str, int]:
    """Return the largest number of rows of each tensor in a saved stream."""
    return {"state": private.mechanism.noising.state_size, "ready": private.stream.block_steps}


def _own(private: PrivateOptimizer, noise: Mapping[str, Any]) -> dict[str, Any]:
    """Return this process's part of a saved state of the whole noise."""
    unread = integer("saved noise's made", noise.get("made", -1)) - integer(
        "saved noise's t", noise.get("t", -1)
    )
    held = {"state": private.mechanism.noising.state_size, "ready": unread}
    own = {name: private._place.load(name, noise.get(name), n) for name, n in held.items()}
    return dict(noise) | own

"""The server: a `PrivateStrategy` in FedAvg's place, and the accuracy on images nobody owns."""

from __future__ import annotations

import tempfile

from federated_loop import accuracy, server_of, settings_of
from flwr.serverapp import ServerApp
from options import options_of

from rootnoise import RootnoiseError
from rootnoise.integrations.flower import AskedOnce, PrivateStrategy

app = ServerApp()


@app.main()
def main(grid, context):
    """Train; started again with the same `out`, go on where the run was killed."""
    args = options_of(context)
    there = len(list(grid.get_node_ids()))
    if there != args.people:
        cure = f"--federation-config 'num-supernodes={args.people}'"
        raise RootnoiseError(
            f"people must be the {there} SuperNodes, got {args.people}: add {cure}"
        )
    every = max(1, args.rounds // 10)

    def evaluate(t, arrays):
        if t and t % every == 0:
            correct = accuracy(arrays.to_torch_state_dict(), settings_of(args))
            print(f"round {t}: accuracy {correct:.3f}")

    with tempfile.TemporaryDirectory() as spare:
        strategy = PrivateStrategy(server_of(args, args.out or spare), AskedOnce(timeout=600))
        strategy.start(grid, evaluate_fn=evaluate)
        print(strategy.server.claim())
        strategy.server.leave()

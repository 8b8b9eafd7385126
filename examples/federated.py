"""The training of federated_loop.py as a Flower simulation, one CPU a client: rootnoise[flower].

    python examples/federated.py [--rounds 20 ...] [--data-dir FOLDER]

What differs from any Flower app is the strategy, and that clients say who they are. Nothing is sent
anywhere: telemetry and the check for updates are off.
"""

from __future__ import annotations

import argparse
import os

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")

from federated_loop import accuracy, main, people_of, server_of, settings_of, train
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from rootnoise.integrations.flower import AskedOnce, PrivateStrategy, name_of


def clients(args: argparse.Namespace) -> ClientApp:
    """Return the client app: an epoch of SGD on one person's images, and who that person is."""
    app = ClientApp()

    @app.query()
    def user(message, context):
        return Message(name_of(context.node_config["partition-id"]), reply_to=message)

    @app.train()
    def one_person(message, context):
        who = [int(context.node_config["partition-id"])]
        x, y = people_of(settings_of(args))
        weights = message.content["arrays"].to_torch_state_dict()
        trained = train(weights, x[who], y[who], args.client_rate)
        arrays = ArrayRecord({name: weight[0] for name, weight in trained.items()})
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    return app


def simulate(args: argparse.Namespace, folder: str) -> list[float]:
    """Train in a simulation and return the accuracy after every tenth of the rounds."""
    app, every, curve = ServerApp(), max(1, args.rounds // 10), []

    @app.main()
    def server(grid, context):
        strategy = PrivateStrategy(server_of(args, folder), AskedOnce(timeout=600))

        def evaluate(t, arrays):
            if t and t % every == 0:
                curve.append(accuracy(arrays.to_torch_state_dict(), settings_of(args)))

        strategy.start(grid, evaluate_fn=evaluate)
        strategy.server.leave()

    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "init_args": {"num_cpus": 1, "include_dashboard": False},
    }
    run_simulation(app, clients(args), args.people, backend_config=backend)
    return curve


if __name__ == "__main__":
    main(simulate)

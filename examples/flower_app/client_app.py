"""One person: who that is, and an epoch of SGD on that person's images."""

from __future__ import annotations

from federated_loop import people_of, settings_of, train
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from options import options_of

from rootnoise.integrations.flower import name_of

app = ClientApp()


@app.query()
def user(message, context):
    """Answer the server's question who is at this node."""
    return Message(name_of(context.node_config["partition-id"]), reply_to=message)


@app.train()
def one_person(message, context):
    """Return the whole weights after training: the server subtracts, clips and adds noise."""
    args, who = options_of(context), [int(context.node_config["partition-id"])]
    x, y = people_of(settings_of(args))
    weights = message.content["arrays"].to_torch_state_dict()
    trained = train(weights, x[who], y[who], args.client_rate)
    arrays = ArrayRecord({name: weight[0] for name, weight in trained.items()})
    return Message(RecordDict({"arrays": arrays}), reply_to=message)

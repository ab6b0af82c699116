"""Federated learning with FedSpeed under Flower.

Five clients hold digits, each of a few classes. FedSpeed corrects for what each of them would pull the common model
towards. One object is the algorithm: `to_strategy` makes the server's half of it, `to_client_app` the clients'. Under
`flwr run` Flower carries the messages between them; here a grid in one process does.
"""

import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import trimtab
from trimtab.federated import FedSpeed, dirichlet_partition, to_client_app, to_strategy

torch.manual_seed(0)
data = trimtab.data.load("digits")
parts = dirichlet_partition(data.y_train, 5, alpha=0.5, generator=torch.Generator().manual_seed(0))
clients = [(data.x_train[part], data.y_train[part]) for part in parts]
algorithm = FedSpeed(lr=0.1, prox=0.1, local_epochs=2)
model = trimtab.nets.mlp(64)
strategy = to_strategy(algorithm, model, num_clients=5, generator=torch.Generator().manual_seed(0))
client_app = to_client_app(algorithm, lambda: trimtab.nets.mlp(64), lambda client: clients[client])


class OneProcess:
    """Hands each message to the client app of its node, with the context in which that client remembers."""

    def __init__(self):
        self.contexts = {node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {}) for node in range(1, 6)}

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        return [client_app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]


TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # who sends, as `flwr run` would say
result = strategy.start(OneProcess(), ArrayRecord(model.state_dict()), num_rounds=12)
model.load_state_dict(result.arrays.to_torch_state_dict())
accuracy = (model.eval()(data.x_test).argmax(1) == data.y_test).float().mean().item()
print(f"after 12 rounds, {accuracy:.1%} of the test digits are right")

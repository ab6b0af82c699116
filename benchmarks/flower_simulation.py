"""Flower's simulation of the federation of `bench_federated`, with its own FedAvg and a plain PyTorch client.

`python -m benchmarks.flower_simulation ROUNDS` prints the seconds of its start and of a round as JSON. Needs Ray.
"""

import itertools
import json
import statistics
import sys
import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.bench_federated import CLIENTS, FRACTION, client_data, network, train_plainly


def main(rounds: int) -> None:
    client, server, stamps = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model, (x, y) = network(), client_data(int(context.node_config["partition-id"]))
        train_plainly(model, message.content["arrays"].to_torch_state_dict(), x, y)
        content = RecordDict(
            {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        )
        return Message(content, reply_to=message)

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        FedAvg(fraction_train=FRACTION, fraction_evaluate=0.0, min_available_nodes=CLIENTS).start(
            grid,
            ArrayRecord(network().state_dict()),
            num_rounds=rounds + 1,
            evaluate_fn=lambda server_round, arrays: stamps.append(time.perf_counter()),
        )

    run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    lengths = [after - before for before, after in itertools.pairwise(stamps)]
    print(json.dumps({"start": lengths[0], "round": statistics.median(lengths[1:])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))

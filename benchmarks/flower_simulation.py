"""Flower's simulation of the federation of `bench_federated`, with its own FedAvg and a plain PyTorch client.

`python -m benchmarks.flower_simulation ROUNDS` prints as JSON the seconds of its start, of a round, and of a round of
our `simulate` that takes turns with it. Needs Ray.
"""

import json
import statistics
import sys
import time

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.bench_federated import BATCH, CLIENTS, FRACTION, client_data, network, train_plainly
from trimtab.federated import FedAvg as OurFedAvg
from trimtab.federated import simulate


def main(rounds: int) -> None:
    client, server = ClientApp(), ServerApp()
    model, clients = network(), [client_data(i) for i in range(CLIENTS)]
    theirs: list[float] = []
    ours: list[float] = []
    resumed = [time.perf_counter()]

    @client.train()
    def train(message: Message, context: Context) -> Message:
        local, (x, y) = network(), client_data(int(context.node_config["partition-id"]))
        train_plainly(local, message.content["arrays"].to_torch_state_dict(), x, y)
        content = RecordDict(
            {"arrays": ArrayRecord(local.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        )
        return Message(content, reply_to=message)

    def take_turns(server_round: int, arrays: ArrayRecord) -> None:
        theirs.append(time.perf_counter() - resumed[-1])
        started = time.perf_counter()
        simulate(OurFedAvg(0.1, batch_size=BATCH), model, clients, rounds=1, fraction=FRACTION)
        resumed.append(time.perf_counter())
        ours.append(resumed[-1] - started)

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        FedAvg(fraction_train=FRACTION, fraction_evaluate=0.0, min_available_nodes=CLIENTS).start(
            grid,
            ArrayRecord(network().state_dict()),
            num_rounds=rounds + 1,
            evaluate_fn=take_turns,
        )

    run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    # The first call is before the first round, and that round waits for Ray.
    print(json.dumps({"start": theirs[1], "round": statistics.median(theirs[2:]), "ours": statistics.median(ours[2:])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))

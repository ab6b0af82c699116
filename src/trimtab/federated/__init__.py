"""Federated training rules, robust aggregation, calibration, fairness and privacy audits."""

from trimtab.federated.fedavg import FedAvg
from trimtab.federated.fedspeed import FedSpeed, quasi_gradient
from trimtab.federated.flower import to_client_app, to_strategy
from trimtab.federated.partition import dirichlet_partition, shard_partition
from trimtab.federated.protocol import Algorithm, Broadcast, ServerState, Update
from trimtab.federated.simulation import History, SimulationState, finish, simulate
from trimtab.federated.state_dicts import average_states, flatten, unflatten

__all__ = [
    "Algorithm",
    "Broadcast",
    "FedAvg",
    "FedSpeed",
    "History",
    "ServerState",
    "SimulationState",
    "Update",
    "average_states",
    "dirichlet_partition",
    "finish",
    "flatten",
    "quasi_gradient",
    "shard_partition",
    "simulate",
    "to_client_app",
    "to_strategy",
    "unflatten",
]

"""Federated training rules, robust aggregation, calibration, fairness and privacy audits."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.federated.fairness_pid import Disparity as Disparity
    from trimtab.federated.fairness_pid import FrontierPoint as FrontierPoint
    from trimtab.federated.fairness_pid import accuracy_frontier as accuracy_frontier
    from trimtab.federated.fairness_pid import disparities as disparities
    from trimtab.federated.fairness_pid import disparities_from_table as disparities_from_table
    from trimtab.federated.fedavg import FedAvg as FedAvg
    from trimtab.federated.fedspeed import FedSpeed as FedSpeed
    from trimtab.federated.fedspeed import quasi_gradient as quasi_gradient
    from trimtab.federated.flower import to_client_app as to_client_app
    from trimtab.federated.flower import to_strategy as to_strategy
    from trimtab.federated.partition import dirichlet_partition as dirichlet_partition
    from trimtab.federated.partition import shard_partition as shard_partition
    from trimtab.federated.protocol import Algorithm as Algorithm
    from trimtab.federated.protocol import Broadcast as Broadcast
    from trimtab.federated.protocol import ServerState as ServerState
    from trimtab.federated.protocol import Update as Update
    from trimtab.federated.simulation import History as History
    from trimtab.federated.simulation import SimulationState as SimulationState
    from trimtab.federated.simulation import finish as finish
    from trimtab.federated.simulation import simulate as simulate
    from trimtab.federated.state_dicts import average_states as average_states
    from trimtab.federated.state_dicts import flatten as flatten
    from trimtab.federated.state_dicts import unflatten as unflatten
else:
    import_lazily(__name__)

"""Federated training rules, robust aggregation, calibration, fairness and privacy audits."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.federated.ccvr import CCVR as CCVR
    from trimtab.federated.creamfl import CreamFLClient as CreamFLClient
    from trimtab.federated.creamfl import CreamFLServer as CreamFLServer
    from trimtab.federated.creamfl import client_contrast as client_contrast
    from trimtab.federated.creamfl import contrastive_weights as contrastive_weights
    from trimtab.federated.creamfl import distillation as distillation
    from trimtab.federated.creamfl import ensemble as ensemble
    from trimtab.federated.creamfl import fuse as fuse
    from trimtab.federated.creamfl import inter_modal_loss as inter_modal_loss
    from trimtab.federated.creamfl import intra_modal_loss as intra_modal_loss
    from trimtab.federated.creamfl import represent as represent
    from trimtab.federated.fairness_pid import Disparity as Disparity
    from trimtab.federated.fairness_pid import FrontierPoint as FrontierPoint
    from trimtab.federated.fairness_pid import accuracy_frontier as accuracy_frontier
    from trimtab.federated.fairness_pid import disparities as disparities
    from trimtab.federated.fairness_pid import disparities_from_table as disparities_from_table
    from trimtab.federated.fedavg import FedAvg as FedAvg
    from trimtab.federated.feddyn import FedDyn as FedDyn
    from trimtab.federated.fedlabel import FedLabel as FedLabel
    from trimtab.federated.fedlabel import PseudoLabels as PseudoLabels
    from trimtab.federated.fedlabel import pseudo_label_loss as pseudo_label_loss
    from trimtab.federated.fedlabel import select_pseudo_labels as select_pseudo_labels
    from trimtab.federated.fedlabel import sureness as sureness
    from trimtab.federated.fedld import FedLD as FedLD
    from trimtab.federated.fedld import MarginControlLoss as MarginControlLoss
    from trimtab.federated.fedld import confidence_penalty as confidence_penalty
    from trimtab.federated.fedld import principal_aggregate as principal_aggregate
    from trimtab.federated.fedloge import FedLoGe as FedLoGe
    from trimtab.federated.fedloge import realign_global as realign_global
    from trimtab.federated.fedloge import realign_local as realign_local
    from trimtab.federated.fedloge import simplex_etf as simplex_etf
    from trimtab.federated.fedloge import sparse_etf as sparse_etf
    from trimtab.federated.fedspeed import FedSpeed as FedSpeed
    from trimtab.federated.fedspeed import quasi_gradient as quasi_gradient
    from trimtab.federated.flag_aggregator import FlagAggregator as FlagAggregator
    from trimtab.federated.flag_aggregator import FlagSubspace as FlagSubspace
    from trimtab.federated.flag_aggregator import flag_aggregate as flag_aggregate
    from trimtab.federated.flag_aggregator import flag_subspace as flag_subspace
    from trimtab.federated.flower import to_client_app as to_client_app
    from trimtab.federated.flower import to_strategy as to_strategy
    from trimtab.federated.ggeur import GGEUR as GGEUR
    from trimtab.federated.ggeur import GaussianExpander as GaussianExpander
    from trimtab.federated.gifd import AuditResult as AuditResult
    from trimtab.federated.gifd import GradientInversionAudit as GradientInversionAudit
    from trimtab.federated.gifd import client_gradients as client_gradients
    from trimtab.federated.gifd import code_divergence as code_divergence
    from trimtab.federated.gifd import gradient_distance as gradient_distance
    from trimtab.federated.gifd import infer_labels as infer_labels
    from trimtab.federated.gifd import project_l1_ball as project_l1_ball
    from trimtab.federated.gifd import search_lr as search_lr
    from trimtab.federated.gifd import total_variation as total_variation
    from trimtab.federated.hidenseek import HideNseek as HideNseek
    from trimtab.federated.hidenseek import SignSupermask as SignSupermask
    from trimtab.federated.hidenseek import pack_signs as pack_signs
    from trimtab.federated.hidenseek import signed_weights as signed_weights
    from trimtab.federated.hidenseek import unpack_signs as unpack_signs
    from trimtab.federated.moments import ClassMoments as ClassMoments
    from trimtab.federated.moments import gaussian_factors as gaussian_factors
    from trimtab.federated.moments import sample_virtual as sample_virtual
    from trimtab.federated.partition import dirichlet_partition as dirichlet_partition
    from trimtab.federated.partition import long_tailed as long_tailed
    from trimtab.federated.partition import shard_partition as shard_partition
    from trimtab.federated.protocol import Algorithm as Algorithm
    from trimtab.federated.protocol import Broadcast as Broadcast
    from trimtab.federated.protocol import ServerState as ServerState
    from trimtab.federated.protocol import Update as Update
    from trimtab.federated.robust_means import RobustFedAvg as RobustFedAvg
    from trimtab.federated.robust_means import bulyan as bulyan
    from trimtab.federated.robust_means import coordinate_median as coordinate_median
    from trimtab.federated.robust_means import krum as krum
    from trimtab.federated.robust_means import krum_scores as krum_scores
    from trimtab.federated.robust_means import multi_krum as multi_krum
    from trimtab.federated.robust_means import plain_mean as plain_mean
    from trimtab.federated.robust_means import trimmed_mean as trimmed_mean
    from trimtab.federated.scaffold import SCAFFOLD as SCAFFOLD
    from trimtab.federated.simulation import History as History
    from trimtab.federated.simulation import SimulationState as SimulationState
    from trimtab.federated.simulation import finish as finish
    from trimtab.federated.simulation import simulate as simulate
    from trimtab.federated.state_dicts import average_states as average_states
    from trimtab.federated.state_dicts import flatten as flatten
    from trimtab.federated.state_dicts import unflatten as unflatten
    from trimtab.federated.synflow import keep_largest as keep_largest
    from trimtab.federated.synflow import prune_at_init as prune_at_init
    from trimtab.federated.synflow import synflow_scores as synflow_scores
else:
    import_lazily(__name__)

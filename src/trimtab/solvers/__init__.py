"""Solvers for optimal transport, low-rank models, causal graphs and discrete search."""

from trimtab.solvers.acyclicity import h_expm, h_logdet, is_dag, to_dag, topological_order
from trimtab.solvers.bandits import (
    BanditResult,
    line_search_elimination,
    sequential_halving,
    successive_rejects,
    unimodal_elimination,
)
from trimtab.solvers.colide import CoLiDE, colide_score, noise_scale
from trimtab.solvers.combinatorial import CVRP, TSP, Knapsack, OpenPaths, OpenRoutes, SubKnapsacks
from trimtab.solvers.gaussian_moments import MomentGap, moment_gaps
from trimtab.solvers.graph_distance import GraphDistance, graph_distance
from trimtab.solvers.heatmap_gnn import HeatmapGNN
from trimtab.solvers.holobeam import BeamResult, FarFieldChannel, beam_grid, holobeam
from trimtab.solvers.matrix_completion import MatrixCompletion, MatrixCompletionResult, complete_matrix
from trimtab.solvers.minmax_designs import (
    FixedPointFilter,
    QuantizedLayer,
    discrete_tomography,
    fixed_point_filter,
    parallel_projections,
    quantization_grid,
    quantize_layer,
)
from trimtab.solvers.minmax_violation import MinMaxViolationResult, minmax_violation
from trimtab.solvers.monge_gap import MongeGap, MongeMap, ResidualMLP, monge_gap, sinkhorn_divergence, transport_cost
from trimtab.solvers.path_constructor import PathConstructor
from trimtab.solvers.privacy_accounting import delta_from_rho, gaussian_sigma, rho_from_epsilon_delta
from trimtab.solvers.private_gsd import GeneticSearchResult, PrivateGSD, genetic_search
from trimtab.solvers.private_measurements import noisy_answers, private_quantiles
from trimtab.solvers.routing import nearest_neighbour, path_length, shortest_paths, tour_length, two_opt
from trimtab.solvers.row_statistics import CellCounts, RowSums, halfspaces, marginals, prefixes
from trimtab.solvers.sinkhorn_newton_sparse import SinkhornNewtonSparseResult, sinkhorn_newton_sparse
from trimtab.solvers.sparse_transport import SparseRouter, SparseTransportResult, sparse_plan, sparse_transport
from trimtab.solvers.subgradient_recovery import (
    SubgradientRecoveryResult,
    entry_operator,
    rank_one_operator,
    subgradient_recovery,
)
from trimtab.solvers.supervised_dictionary import SupervisedDictionary
from trimtab.solvers.tester_learner import (
    CertificateTest,
    HalfspaceCertificate,
    HalfspaceTesterLearner,
    RejectedError,
    RejectionWarning,
    disagreement_bound,
    halfspace_iterates,
    smoothed_error,
)
from trimtab.solvers.topo_swaps import TopoSwaps, TopoSwapsResult, polish_dag, topo_swaps
from trimtab.solvers.udc import UDC, UDCLoss, UDCResult, dcr_round

__all__ = [
    "CVRP",
    "TSP",
    "UDC",
    "BanditResult",
    "BeamResult",
    "CellCounts",
    "CertificateTest",
    "CoLiDE",
    "FarFieldChannel",
    "FixedPointFilter",
    "GeneticSearchResult",
    "GraphDistance",
    "HalfspaceCertificate",
    "HalfspaceTesterLearner",
    "HeatmapGNN",
    "Knapsack",
    "MatrixCompletion",
    "MatrixCompletionResult",
    "MinMaxViolationResult",
    "MomentGap",
    "MongeGap",
    "MongeMap",
    "OpenPaths",
    "OpenRoutes",
    "PathConstructor",
    "PrivateGSD",
    "QuantizedLayer",
    "RejectedError",
    "RejectionWarning",
    "ResidualMLP",
    "RowSums",
    "SinkhornNewtonSparseResult",
    "SparseRouter",
    "SparseTransportResult",
    "SubKnapsacks",
    "SubgradientRecoveryResult",
    "SupervisedDictionary",
    "TopoSwaps",
    "TopoSwapsResult",
    "UDCLoss",
    "UDCResult",
    "beam_grid",
    "colide_score",
    "complete_matrix",
    "dcr_round",
    "delta_from_rho",
    "disagreement_bound",
    "discrete_tomography",
    "entry_operator",
    "fixed_point_filter",
    "gaussian_sigma",
    "genetic_search",
    "graph_distance",
    "h_expm",
    "h_logdet",
    "halfspace_iterates",
    "halfspaces",
    "holobeam",
    "is_dag",
    "line_search_elimination",
    "marginals",
    "minmax_violation",
    "moment_gaps",
    "monge_gap",
    "nearest_neighbour",
    "noise_scale",
    "noisy_answers",
    "parallel_projections",
    "path_length",
    "polish_dag",
    "prefixes",
    "private_quantiles",
    "quantization_grid",
    "quantize_layer",
    "rank_one_operator",
    "rho_from_epsilon_delta",
    "sequential_halving",
    "shortest_paths",
    "sinkhorn_divergence",
    "sinkhorn_newton_sparse",
    "smoothed_error",
    "sparse_plan",
    "sparse_transport",
    "subgradient_recovery",
    "successive_rejects",
    "to_dag",
    "topo_swaps",
    "topological_order",
    "tour_length",
    "transport_cost",
    "two_opt",
    "unimodal_elimination",
]

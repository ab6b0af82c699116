"""Metric learning, face-recognition heads, retrieval, and image-text alignment."""

from trimtab.metric.binomial_deviance import BinomialDevianceLoss
from trimtab.metric.clustering import nmi
from trimtab.metric.cross_modal_ood import (
    CrossModalAlignmentLoss,
    cross_modal_alignment,
    mcm_score,
    mine_negative_labels,
    modality_gap,
    neglabel_log_odds,
    neglabel_score,
)
from trimtab.metric.ecaml import ECAMLLoss, EnergyConfusion, energy_confusion, random_class_pairs
from trimtab.metric.fol import (
    foreground_background_loss,
    region_mask,
    same_place_pairs,
    spatial_alignment_loss,
    suppress_peaks,
)
from trimtab.metric.local_matching import (
    MutualMatches,
    discriminative_patches,
    local_triplet_loss,
    mutual_nearest_neighbors,
    mutual_nn_score,
    mutual_nn_similarity,
    rerank,
)
from trimtab.metric.margin_softmax import CosineClassifier, MarginSoftmaxLoss, arcface_margin, cosface_margin
from trimtab.metric.pairs import PairMasks, pair_masks
from trimtab.metric.pseudo_correspondences import Correspondences, correspondence_loss, pseudo_correspondences
from trimtab.metric.retrieval import map_at_r, recall_at_k
from trimtab.metric.samplers import PKSampler
from trimtab.metric.sface import SFaceLoss, inter_strength, intra_strength, sface_loss
from trimtab.metric.sinkhorn_aggregation import Aggregation, SinkhornAggregator, class_attention, log_sinkhorn
from trimtab.metric.tcm import (
    ThresholdConsistentMarginLoss,
    UtilityCurves,
    opis,
    threshold_consistent_margin,
    utility_curves,
    utility_variance,
)
from trimtab.metric.unpg import UNPGLoss, unpg_loss, whisker_filter
from trimtab.metric.verification import auroc, equal_error_rate, pair_scores, tpr_at_far

__all__ = [
    "Aggregation",
    "BinomialDevianceLoss",
    "Correspondences",
    "CosineClassifier",
    "CrossModalAlignmentLoss",
    "ECAMLLoss",
    "EnergyConfusion",
    "MarginSoftmaxLoss",
    "MutualMatches",
    "PKSampler",
    "PairMasks",
    "SFaceLoss",
    "SinkhornAggregator",
    "ThresholdConsistentMarginLoss",
    "UNPGLoss",
    "UtilityCurves",
    "arcface_margin",
    "auroc",
    "class_attention",
    "correspondence_loss",
    "cosface_margin",
    "cross_modal_alignment",
    "discriminative_patches",
    "energy_confusion",
    "equal_error_rate",
    "foreground_background_loss",
    "inter_strength",
    "intra_strength",
    "local_triplet_loss",
    "log_sinkhorn",
    "map_at_r",
    "mcm_score",
    "mine_negative_labels",
    "modality_gap",
    "mutual_nearest_neighbors",
    "mutual_nn_score",
    "mutual_nn_similarity",
    "neglabel_log_odds",
    "neglabel_score",
    "nmi",
    "opis",
    "pair_masks",
    "pair_scores",
    "pseudo_correspondences",
    "random_class_pairs",
    "recall_at_k",
    "region_mask",
    "rerank",
    "same_place_pairs",
    "sface_loss",
    "spatial_alignment_loss",
    "suppress_peaks",
    "threshold_consistent_margin",
    "tpr_at_far",
    "unpg_loss",
    "utility_curves",
    "utility_variance",
    "whisker_filter",
]

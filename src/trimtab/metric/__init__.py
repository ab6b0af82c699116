"""Metric learning, face-recognition heads, retrieval, and image-text alignment."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.metric.binomial_deviance import BinomialDevianceLoss as BinomialDevianceLoss
    from trimtab.metric.clustering import nmi as nmi
    from trimtab.metric.cross_modal_ood import CrossModalAlignmentLoss as CrossModalAlignmentLoss
    from trimtab.metric.cross_modal_ood import cross_modal_alignment as cross_modal_alignment
    from trimtab.metric.cross_modal_ood import mcm_score as mcm_score
    from trimtab.metric.cross_modal_ood import mine_negative_labels as mine_negative_labels
    from trimtab.metric.cross_modal_ood import modality_gap as modality_gap
    from trimtab.metric.cross_modal_ood import neglabel_log_odds as neglabel_log_odds
    from trimtab.metric.cross_modal_ood import neglabel_score as neglabel_score
    from trimtab.metric.ecaml import ECAMLLoss as ECAMLLoss
    from trimtab.metric.ecaml import EnergyConfusion as EnergyConfusion
    from trimtab.metric.ecaml import energy_confusion as energy_confusion
    from trimtab.metric.ecaml import random_class_pairs as random_class_pairs
    from trimtab.metric.fol import foreground_background_loss as foreground_background_loss
    from trimtab.metric.fol import region_mask as region_mask
    from trimtab.metric.fol import same_place_pairs as same_place_pairs
    from trimtab.metric.fol import spatial_alignment_loss as spatial_alignment_loss
    from trimtab.metric.fol import suppress_peaks as suppress_peaks
    from trimtab.metric.local_matching import MutualMatches as MutualMatches
    from trimtab.metric.local_matching import discriminative_patches as discriminative_patches
    from trimtab.metric.local_matching import local_triplet_loss as local_triplet_loss
    from trimtab.metric.local_matching import mutual_nearest_neighbors as mutual_nearest_neighbors
    from trimtab.metric.local_matching import mutual_nn_score as mutual_nn_score
    from trimtab.metric.local_matching import mutual_nn_similarity as mutual_nn_similarity
    from trimtab.metric.local_matching import rerank as rerank
    from trimtab.metric.magface import MagFaceLoss as MagFaceLoss
    from trimtab.metric.margin_softmax import CosineClassifier as CosineClassifier
    from trimtab.metric.margin_softmax import MarginSoftmaxLoss as MarginSoftmaxLoss
    from trimtab.metric.margin_softmax import arcface_margin as arcface_margin
    from trimtab.metric.margin_softmax import cosface_margin as cosface_margin
    from trimtab.metric.pairs import PairMasks as PairMasks
    from trimtab.metric.pairs import pair_masks as pair_masks
    from trimtab.metric.pseudo_correspondences import Correspondences as Correspondences
    from trimtab.metric.pseudo_correspondences import correspondence_loss as correspondence_loss
    from trimtab.metric.pseudo_correspondences import pseudo_correspondences as pseudo_correspondences
    from trimtab.metric.retrieval import map_at_r as map_at_r
    from trimtab.metric.retrieval import recall_at_k as recall_at_k
    from trimtab.metric.samplers import PKSampler as PKSampler
    from trimtab.metric.sface import SFaceLoss as SFaceLoss
    from trimtab.metric.sface import inter_strength as inter_strength
    from trimtab.metric.sface import intra_strength as intra_strength
    from trimtab.metric.sface import sface_loss as sface_loss
    from trimtab.metric.sinkhorn_aggregation import Aggregation as Aggregation
    from trimtab.metric.sinkhorn_aggregation import SinkhornAggregator as SinkhornAggregator
    from trimtab.metric.sinkhorn_aggregation import class_attention as class_attention
    from trimtab.metric.sinkhorn_aggregation import log_sinkhorn as log_sinkhorn
    from trimtab.metric.tcm import ThresholdConsistentMarginLoss as ThresholdConsistentMarginLoss
    from trimtab.metric.tcm import UtilityCurves as UtilityCurves
    from trimtab.metric.tcm import opis as opis
    from trimtab.metric.tcm import threshold_consistent_margin as threshold_consistent_margin
    from trimtab.metric.tcm import utility_curves as utility_curves
    from trimtab.metric.tcm import utility_variance as utility_variance
    from trimtab.metric.unpg import MetricLearningHead as MetricLearningHead
    from trimtab.metric.unpg import UNPGLoss as UNPGLoss
    from trimtab.metric.unpg import unpg_loss as unpg_loss
    from trimtab.metric.unpg import whisker_filter as whisker_filter
    from trimtab.metric.verification import auroc as auroc
    from trimtab.metric.verification import equal_error_rate as equal_error_rate
    from trimtab.metric.verification import pair_scores as pair_scores
    from trimtab.metric.verification import tpr_at_far as tpr_at_far
else:
    import_lazily(__name__)

"""Classification losses for noisy, imbalanced, aggregated or calibrated labels."""

from trimtab.losses.adawac import AdaWAC, augmentation_consistency, mirror_ascent_log_odds
from trimtab.losses.adele import (
    ADELE,
    LearningCurve,
    MultiScaleConsistencyLoss,
    class_iou,
    correct_labels,
    fit_learning_curve,
    memorization_epoch,
    multi_scale_consistency,
    multi_scale_logits,
)
from trimtab.losses.aggregate_responses import (
    AggregateLoss,
    AggregateRidge,
    aggregate_risk,
    bag_level_loss,
    instance_level_loss,
    private_bag_means,
)
from trimtab.losses.arl import AsymmetricLearning, SharedHeadFusion, asymmetric_coefficients, scale_gradient
from trimtab.losses.calibration import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    expected_calibration_error,
)
from trimtab.losses.classwise_calibration import classwise_calibration_error
from trimtab.losses.co_teaching import CoTeaching, small_loss_indices
from trimtab.losses.comp_sum import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_loss,
    comp_sum_min_risk,
    h_consistency_bound,
    h_consistency_transform,
)
from trimtab.losses.conr import ConRLoss, conr_loss
from trimtab.losses.elr import ELR, elr_penalty
from trimtab.losses.elr_plus import ELRPlus, elr_plus_loss
from trimtab.losses.ensloss import EnsLoss, calibrated_derivatives
from trimtab.losses.instance_noise import instance_dependent_noise
from trimtab.losses.label_noise import NoisyLabels, asymmetric_noise, symmetric_noise
from trimtab.losses.ldr import ALDRKL, LDRKL, aldr_temperature, ldr_kl
from trimtab.losses.nacl import NACLLoss, SVLSLoss, neighborhood_proportions
from trimtab.losses.naive_bayes_probe import NaiveBayesProbe
from trimtab.losses.nested_dropout import (
    NestedCoTeaching,
    NestedDropout,
    select_truncation,
    truncated_accuracy,
    truncation_distribution,
)
from trimtab.losses.ps_kd import PSKD, pskd_targets
from trimtab.losses.segmentation import dice_loss
from trimtab.ops.sample_memory import SampleMemory

__all__ = [
    "ADELE",
    "ALDRKL",
    "ELR",
    "LDRKL",
    "PSKD",
    "AdaWAC",
    "AggregateLoss",
    "AggregateRidge",
    "AsymmetricLearning",
    "CoTeaching",
    "CompSumLoss",
    "ConRLoss",
    "ELRPlus",
    "EnsLoss",
    "LearningCurve",
    "MultiScaleConsistencyLoss",
    "NACLLoss",
    "NaiveBayesProbe",
    "NestedCoTeaching",
    "NestedDropout",
    "NoisyLabels",
    "SVLSLoss",
    "SampleMemory",
    "SharedHeadFusion",
    "SmoothAdversarialCompSumLoss",
    "adaptive_calibration_error",
    "aggregate_risk",
    "aldr_temperature",
    "area_under_risk_coverage",
    "asymmetric_coefficients",
    "asymmetric_noise",
    "augmentation_consistency",
    "bag_level_loss",
    "calibrated_derivatives",
    "class_iou",
    "classwise_calibration_error",
    "comp_sum_loss",
    "comp_sum_min_risk",
    "conr_loss",
    "correct_labels",
    "dice_loss",
    "elr_penalty",
    "elr_plus_loss",
    "expected_calibration_error",
    "fit_learning_curve",
    "h_consistency_bound",
    "h_consistency_transform",
    "instance_dependent_noise",
    "instance_level_loss",
    "ldr_kl",
    "memorization_epoch",
    "mirror_ascent_log_odds",
    "multi_scale_consistency",
    "multi_scale_logits",
    "neighborhood_proportions",
    "private_bag_means",
    "pskd_targets",
    "scale_gradient",
    "select_truncation",
    "small_loss_indices",
    "symmetric_noise",
    "truncated_accuracy",
    "truncation_distribution",
]

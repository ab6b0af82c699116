"""Classification losses for noisy, imbalanced, aggregated or calibrated labels."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.losses.adawac import AdaWAC as AdaWAC
    from trimtab.losses.adawac import augmentation_consistency as augmentation_consistency
    from trimtab.losses.adawac import mirror_ascent_log_odds as mirror_ascent_log_odds
    from trimtab.losses.adele import ADELE as ADELE
    from trimtab.losses.adele import LearningCurve as LearningCurve
    from trimtab.losses.adele import MultiScaleConsistencyLoss as MultiScaleConsistencyLoss
    from trimtab.losses.adele import class_iou as class_iou
    from trimtab.losses.adele import correct_labels as correct_labels
    from trimtab.losses.adele import fit_learning_curve as fit_learning_curve
    from trimtab.losses.adele import memorization_epoch as memorization_epoch
    from trimtab.losses.adele import multi_scale_consistency as multi_scale_consistency
    from trimtab.losses.adele import multi_scale_logits as multi_scale_logits
    from trimtab.losses.aggregate_responses import AggregateLoss as AggregateLoss
    from trimtab.losses.aggregate_responses import AggregateRidge as AggregateRidge
    from trimtab.losses.aggregate_responses import aggregate_risk as aggregate_risk
    from trimtab.losses.aggregate_responses import bag_level_loss as bag_level_loss
    from trimtab.losses.aggregate_responses import instance_level_loss as instance_level_loss
    from trimtab.losses.aggregate_responses import private_bag_means as private_bag_means
    from trimtab.losses.arl import AsymmetricLearning as AsymmetricLearning
    from trimtab.losses.arl import asymmetric_coefficients as asymmetric_coefficients
    from trimtab.losses.arl import scale_gradient as scale_gradient
    from trimtab.losses.calibration import adaptive_calibration_error as adaptive_calibration_error
    from trimtab.losses.calibration import area_under_risk_coverage as area_under_risk_coverage
    from trimtab.losses.calibration import expected_calibration_error as expected_calibration_error
    from trimtab.losses.classwise_calibration import classwise_calibration_error as classwise_calibration_error
    from trimtab.losses.co_teaching import CoTeaching as CoTeaching
    from trimtab.losses.co_teaching import small_loss_indices as small_loss_indices
    from trimtab.losses.comp_sum import CompSumLoss as CompSumLoss
    from trimtab.losses.comp_sum import SmoothAdversarialCompSumLoss as SmoothAdversarialCompSumLoss
    from trimtab.losses.comp_sum import comp_sum_loss as comp_sum_loss
    from trimtab.losses.comp_sum import comp_sum_min_risk as comp_sum_min_risk
    from trimtab.losses.comp_sum import h_consistency_bound as h_consistency_bound
    from trimtab.losses.comp_sum import h_consistency_transform as h_consistency_transform
    from trimtab.losses.conr import ConRLoss as ConRLoss
    from trimtab.losses.conr import conr_loss as conr_loss
    from trimtab.losses.elr import ELR as ELR
    from trimtab.losses.elr import elr_penalty as elr_penalty
    from trimtab.losses.elr_plus import ELRPlus as ELRPlus
    from trimtab.losses.elr_plus import elr_plus_loss as elr_plus_loss
    from trimtab.losses.ensloss import EnsLoss as EnsLoss
    from trimtab.losses.ensloss import calibrated_derivatives as calibrated_derivatives
    from trimtab.losses.fusion import FiLMFusion as FiLMFusion
    from trimtab.losses.fusion import GatedFusion as GatedFusion
    from trimtab.losses.fusion import SharedHeadFusion as SharedHeadFusion
    from trimtab.losses.fusion import SumFusion as SumFusion
    from trimtab.losses.instance_noise import instance_dependent_noise as instance_dependent_noise
    from trimtab.losses.label_noise import NoisyLabels as NoisyLabels
    from trimtab.losses.label_noise import asymmetric_noise as asymmetric_noise
    from trimtab.losses.label_noise import symmetric_noise as symmetric_noise
    from trimtab.losses.ldr import ALDRKL as ALDRKL
    from trimtab.losses.ldr import LDRKL as LDRKL
    from trimtab.losses.ldr import aldr_temperature as aldr_temperature
    from trimtab.losses.ldr import ldr_kl as ldr_kl
    from trimtab.losses.nacl import NACLLoss as NACLLoss
    from trimtab.losses.nacl import SVLSLoss as SVLSLoss
    from trimtab.losses.nacl import neighborhood_proportions as neighborhood_proportions
    from trimtab.losses.naive_bayes_probe import NaiveBayesProbe as NaiveBayesProbe
    from trimtab.losses.nested_dropout import NestedCoTeaching as NestedCoTeaching
    from trimtab.losses.nested_dropout import NestedDropout as NestedDropout
    from trimtab.losses.nested_dropout import select_truncation as select_truncation
    from trimtab.losses.nested_dropout import truncated_accuracy as truncated_accuracy
    from trimtab.losses.nested_dropout import truncation_distribution as truncation_distribution
    from trimtab.losses.ps_kd import PSKD as PSKD
    from trimtab.losses.ps_kd import pskd_targets as pskd_targets
    from trimtab.losses.segmentation import dice_loss as dice_loss
    from trimtab.losses.trainer import IndexedDataset as IndexedDataset
    from trimtab.losses.trainer import IndexedTrainerMixin as IndexedTrainerMixin
    from trimtab.ops.sample_memory import SampleMemory as SampleMemory
else:
    import_lazily(__name__)

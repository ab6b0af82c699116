"""Domain generalisation, domain adaptation, and test-time adaptation."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.domain.adanpc import AdaNPC as AdaNPC
    from trimtab.domain.adanpc import AdaNPCBN as AdaNPCBN
    from trimtab.domain.adanpc import NeighbourLoss as NeighbourLoss
    from trimtab.domain.adanpc import neighbour_vote as neighbour_vote
    from trimtab.domain.advstyle import AdvStyle as AdvStyle
    from trimtab.domain.advstyle import insert_advstyle as insert_advstyle
    from trimtab.domain.advstyle import style_spread as style_spread
    from trimtab.domain.batch_styles import BatchStyleViews as BatchStyleViews
    from trimtab.domain.batch_styles import batch_color_jitter as batch_color_jitter
    from trimtab.domain.batch_styles import batch_style_standardize as batch_style_standardize
    from trimtab.domain.batch_styles import fourier_augment as fourier_augment
    from trimtab.domain.batch_styles import same_style_nt_xent as same_style_nt_xent
    from trimtab.domain.batch_styles import same_style_swav as same_style_swav
    from trimtab.domain.batch_styles import swap_low_amplitude as swap_low_amplitude
    from trimtab.domain.crafting_shifts import EdgeDraws as EdgeDraws
    from trimtab.domain.crafting_shifts import EdgePairLoss as EdgePairLoss
    from trimtab.domain.crafting_shifts import EnhancedCanny as EnhancedCanny
    from trimtab.domain.crafting_shifts import ShiftSelection as ShiftSelection
    from trimtab.domain.crafting_shifts import ShiftValidator as ShiftValidator
    from trimtab.domain.crafting_shifts import adaptive_thresholds as adaptive_thresholds
    from trimtab.domain.crafting_shifts import category_folds as category_folds
    from trimtab.domain.crafting_shifts import kfold_shift_selection as kfold_shift_selection
    from trimtab.domain.crafting_shifts import mix_predictions as mix_predictions
    from trimtab.domain.diversified_matching import ConditionCritics as ConditionCritics
    from trimtab.domain.diversified_matching import DiversifiedTranslator as DiversifiedTranslator
    from trimtab.domain.diversified_matching import conditional_energy_distance as conditional_energy_distance
    from trimtab.domain.diversified_matching import mean_by_condition as mean_by_condition
    from trimtab.domain.diversified_matching import translation_error as translation_error
    from trimtab.domain.drm import DomainHeads as DomainHeads
    from trimtab.domain.drm import DRMSteering as DRMSteering
    from trimtab.domain.drm import head_entropy as head_entropy
    from trimtab.domain.drm import head_weights as head_weights
    from trimtab.domain.drm import prototype_gap as prototype_gap
    from trimtab.domain.environments import DomainBatch as DomainBatch
    from trimtab.domain.environments import domain_batches as domain_batches
    from trimtab.domain.head_gradients import head_gradients as head_gradients
    from trimtab.domain.head_gradients import head_hessian as head_hessian
    from trimtab.domain.hessian_alignment import HGPPenalty as HGPPenalty
    from trimtab.domain.hessian_alignment import HutchinsonPenalty as HutchinsonPenalty
    from trimtab.domain.hessian_alignment import hessian_distance as hessian_distance
    from trimtab.domain.hessian_alignment import hessian_gradient_product as hessian_gradient_product
    from trimtab.domain.hessian_alignment import hutchinson_diagonal as hutchinson_diagonal
    from trimtab.domain.hiast import HardClassPaste as HardClassPaste
    from trimtab.domain.hiast import HIASTLoss as HIASTLoss
    from trimtab.domain.hiast import InstanceAdaptiveSelector as InstanceAdaptiveSelector
    from trimtab.domain.hiast import RegionTerms as RegionTerms
    from trimtab.domain.hiast import hard_class_odds as hard_class_odds
    from trimtab.domain.hiast import region_regularization as region_regularization
    from trimtab.domain.hiast import region_soft_cross_entropy as region_soft_cross_entropy
    from trimtab.domain.mic import MaskedImageConsistency as MaskedImageConsistency
    from trimtab.domain.mic import masked_consistency as masked_consistency
    from trimtab.domain.mic import pseudo_label_weight as pseudo_label_weight
    from trimtab.domain.ood_unlabeled import RSSLinearClassifier as RSSLinearClassifier
    from trimtab.domain.ood_unlabeled import RSSLoss as RSSLoss
    from trimtab.domain.ood_unlabeled import excess_bound as excess_bound
    from trimtab.domain.ood_unlabeled import ramp_surrogate as ramp_surrogate
    from trimtab.domain.ood_unlabeled import robust_surrogate as robust_surrogate
    from trimtab.domain.ood_unlabeled import unlabelled_needed as unlabelled_needed
    from trimtab.domain.poseda import HUMAN as HUMAN
    from trimtab.domain.poseda import AugmentedPose as AugmentedPose
    from trimtab.domain.poseda import PartDiscriminator as PartDiscriminator
    from trimtab.domain.poseda import PoseAugmenter as PoseAugmenter
    from trimtab.domain.poseda import PoseDA as PoseDA
    from trimtab.domain.poseda import Skeleton as Skeleton
    from trimtab.domain.poseda import global_position_alignment as global_position_alignment
    from trimtab.domain.poseda import mpjpe as mpjpe
    from trimtab.domain.poseda import project as project
    from trimtab.domain.sfda2 import SFDA2 as SFDA2
    from trimtab.domain.sfda2 import ClassCovariance as ClassCovariance
    from trimtab.domain.sfda2 import feature_disentanglement as feature_disentanglement
    from trimtab.domain.sfda2 import implicit_feature_augmentation as implicit_feature_augmentation
    from trimtab.domain.sfda2 import neighbourhood_clustering as neighbourhood_clustering
    from trimtab.domain.styles import instance_statistics as instance_statistics
    from trimtab.domain.styles import restyle as restyle
    from trimtab.domain.styles import standardize as standardize
    from trimtab.domain.udim import UDIM as UDIM
    from trimtab.domain.udim import inconsistency as inconsistency
    from trimtab.domain.udim import perturb_domain as perturb_domain
else:
    import_lazily(__name__)

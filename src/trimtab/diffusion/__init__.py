"""Diffusion samplers, guidance, consistency training, distillation and score analysis."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.diffusion import grids as grids
    from trimtab.diffusion.agd import CrossAttentionAdapter as CrossAttentionAdapter
    from trimtab.diffusion.agd import GuidanceAdapters as GuidanceAdapters
    from trimtab.diffusion.agd import GuidedTrajectories as GuidedTrajectories
    from trimtab.diffusion.agd import OffsetAdapter as OffsetAdapter
    from trimtab.diffusion.agd import TrajectoryRecorder as TrajectoryRecorder
    from trimtab.diffusion.agd import adapt_to_guidance as adapt_to_guidance
    from trimtab.diffusion.agd import trajectory_loss as trajectory_loss
    from trimtab.diffusion.apg import AdaptiveProjectedGuidance as AdaptiveProjectedGuidance
    from trimtab.diffusion.apg import adaptive_projected_guidance as adaptive_projected_guidance
    from trimtab.diffusion.apg import project as project
    from trimtab.diffusion.cfgpp import CFGPlusPlus as CFGPlusPlus
    from trimtab.diffusion.cfgpp import ddim_invert as ddim_invert
    from trimtab.diffusion.consistency import cauchy as cauchy
    from trimtab.diffusion.consistency import consistency_sample as consistency_sample
    from trimtab.diffusion.consistency import geman_mcclure as geman_mcclure
    from trimtab.diffusion.consistency import neighbours as neighbours
    from trimtab.diffusion.consistency import noise_levels as noise_levels
    from trimtab.diffusion.consistency import pseudo_huber as pseudo_huber
    from trimtab.diffusion.ddo import DDOLoss as DDOLoss
    from trimtab.diffusion.ddo import SelfPlay as SelfPlay
    from trimtab.diffusion.ddo import autoregressive_log_ratio as autoregressive_log_ratio
    from trimtab.diffusion.ddo import diffusion_log_ratio as diffusion_log_ratio
    from trimtab.diffusion.deis import deis as deis
    from trimtab.diffusion.deis import deis_coefficients as deis_coefficients
    from trimtab.diffusion.deis import deis_rk as deis_rk
    from trimtab.diffusion.deis import ipndm as ipndm
    from trimtab.diffusion.denoiser import CountNFE as CountNFE
    from trimtab.diffusion.denoiser import Denoiser as Denoiser
    from trimtab.diffusion.denoiser import Split as Split
    from trimtab.diffusion.denoiser import StepCallback as StepCallback
    from trimtab.diffusion.denoiser import predict as predict
    from trimtab.diffusion.dualfast import DualFast as DualFast
    from trimtab.diffusion.dualfast import SamplingError as SamplingError
    from trimtab.diffusion.dualfast import compensate as compensate
    from trimtab.diffusion.dualfast import error_decomposition as error_decomposition
    from trimtab.diffusion.first_hitting import MaskedDiffusionLoss as MaskedDiffusionLoss
    from trimtab.diffusion.first_hitting import ancestral as ancestral
    from trimtab.diffusion.first_hitting import first_hitting as first_hitting
    from trimtab.diffusion.first_hitting import hitting_times as hitting_times
    from trimtab.diffusion.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
    from trimtab.diffusion.guidance import ClassifierGuidance as ClassifierGuidance
    from trimtab.diffusion.guidance import classifier_free_guidance as classifier_free_guidance
    from trimtab.diffusion.guidance import guidance_rescale as guidance_rescale
    from trimtab.diffusion.guided_distillation import GuidedDistillation as GuidedDistillation
    from trimtab.diffusion.guided_distillation import guidance_matching_loss as guidance_matching_loss
    from trimtab.diffusion.guided_distillation import guided_clean_sample as guided_clean_sample
    from trimtab.diffusion.guided_distillation import progressive_loss as progressive_loss
    from trimtab.diffusion.guided_distillation import progressive_target as progressive_target
    from trimtab.diffusion.guided_distillation import stochastic_ddim as stochastic_ddim
    from trimtab.diffusion.guided_distillation import truncated_snr as truncated_snr
    from trimtab.diffusion.gumbel import gumbel_categorical as gumbel_categorical
    from trimtab.diffusion.gumbel import truncated_gumbel_probs as truncated_gumbel_probs
    from trimtab.diffusion.jacobian import denoiser_jacobian as denoiser_jacobian
    from trimtab.diffusion.jacobian import jacobian_svd as jacobian_svd
    from trimtab.diffusion.jacobian import numerical_rank as numerical_rank
    from trimtab.diffusion.masking import CosineMasking as CosineMasking
    from trimtab.diffusion.masking import MaskingSchedule as MaskingSchedule
    from trimtab.diffusion.masking import PolynomialMasking as PolynomialMasking
    from trimtab.diffusion.mixtures import AnalyticGMM as AnalyticGMM
    from trimtab.diffusion.mixtures import degrade as degrade
    from trimtab.diffusion.preconditioning import ConsistencyPreconditioned as ConsistencyPreconditioned
    from trimtab.diffusion.preconditioning import EDMPreconditioned as EDMPreconditioned
    from trimtab.diffusion.prediction import convert as convert
    from trimtab.diffusion.scale_conditioning import DistilledGuidance as DistilledGuidance
    from trimtab.diffusion.scale_conditioning import FourierFeatures as FourierFeatures
    from trimtab.diffusion.scale_conditioning import ScaleConditioned as ScaleConditioned
    from trimtab.diffusion.scale_conditioning import ScaleEmbedding as ScaleEmbedding
    from trimtab.diffusion.schedules import EDM as EDM
    from trimtab.diffusion.schedules import VE as VE
    from trimtab.diffusion.schedules import Discrete as Discrete
    from trimtab.diffusion.schedules import Flow as Flow
    from trimtab.diffusion.schedules import SubVP as SubVP
    from trimtab.diffusion.schedules import VPCosine as VPCosine
    from trimtab.diffusion.schedules import VPLinear as VPLinear
    from trimtab.diffusion.solvers import ddim as ddim
    from trimtab.diffusion.solvers import dpm_solver as dpm_solver
    from trimtab.diffusion.solvers import euler as euler
    from trimtab.diffusion.subspace_clustering import KSubspaces as KSubspaces
    from trimtab.diffusion.subspace_clustering import LowRankDenoiser as LowRankDenoiser
    from trimtab.diffusion.subspace_clustering import MoLRG as MoLRG
    from trimtab.diffusion.subspace_clustering import edit_along as edit_along
    from trimtab.diffusion.subspace_clustering import fit_low_rank as fit_low_rank
    from trimtab.diffusion.subspace_clustering import low_rank_denoise as low_rank_denoise
    from trimtab.diffusion.subspace_clustering import match_subspaces as match_subspaces
    from trimtab.diffusion.subspace_clustering import subspace_distance as subspace_distance
    from trimtab.diffusion.training import denoising_loss as denoising_loss
    from trimtab.diffusion.training import drop_labels as drop_labels
    from trimtab.diffusion.training import lognormal_levels as lognormal_levels
else:
    import_lazily(__name__)

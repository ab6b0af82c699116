"""Classification losses for noisy, imbalanced, aggregated or calibrated labels."""

from trimtab.losses.calibration import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    expected_calibration_error,
)
from trimtab.losses.comp_sum import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_loss,
    comp_sum_min_risk,
    h_consistency_bound,
    h_consistency_transform,
)
from trimtab.losses.elr import ELR, elr_penalty
from trimtab.losses.elr_plus import ELRPlus, elr_plus_loss
from trimtab.losses.ensloss import EnsLoss, calibrated_derivatives
from trimtab.losses.instance_noise import instance_dependent_noise
from trimtab.losses.label_noise import NoisyLabels, asymmetric_noise, symmetric_noise
from trimtab.losses.ldr import ALDRKL, LDRKL, aldr_temperature, ldr_kl
from trimtab.losses.ps_kd import PSKD, pskd_targets
from trimtab.ops.sample_memory import SampleMemory

__all__ = [
    "ALDRKL",
    "ELR",
    "LDRKL",
    "PSKD",
    "CompSumLoss",
    "ELRPlus",
    "EnsLoss",
    "NoisyLabels",
    "SampleMemory",
    "SmoothAdversarialCompSumLoss",
    "adaptive_calibration_error",
    "aldr_temperature",
    "area_under_risk_coverage",
    "asymmetric_noise",
    "calibrated_derivatives",
    "comp_sum_loss",
    "comp_sum_min_risk",
    "elr_penalty",
    "elr_plus_loss",
    "expected_calibration_error",
    "h_consistency_bound",
    "h_consistency_transform",
    "instance_dependent_noise",
    "ldr_kl",
    "pskd_targets",
    "symmetric_noise",
]

"""Optimizers, sharpness-aware training, and the dynamics of learning."""

from trimtab.optim.adabelief import AdaBelief
from trimtab.optim.rule import RuleOptimizer
from trimtab.optim.saf import MESA, TrajectoryLoss
from trimtab.optim.sgd_sai import SGDSaI, gradient_snr
from trimtab.optim.sharpness import (
    EigenPair,
    TraceEstimate,
    hessian_top_eigenvalue,
    hessian_trace,
    sam_sharpness,
)
from trimtab.optim.two_pass import SAM, TwoPassOptimizer, ascent_direction, frozen_norm_stats

__all__ = [
    "MESA",
    "SAM",
    "AdaBelief",
    "EigenPair",
    "RuleOptimizer",
    "SGDSaI",
    "TraceEstimate",
    "TrajectoryLoss",
    "TwoPassOptimizer",
    "ascent_direction",
    "frozen_norm_stats",
    "gradient_snr",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "sam_sharpness",
]

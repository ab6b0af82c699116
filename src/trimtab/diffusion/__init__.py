"""Diffusion samplers, guidance, consistency training, distillation and score analysis."""

from trimtab.diffusion import grids
from trimtab.diffusion.apg import AdaptiveProjectedGuidance, adaptive_projected_guidance, project
from trimtab.diffusion.deis import deis, deis_coefficients, deis_rk, ipndm
from trimtab.diffusion.denoiser import CountNFE, Denoiser, Split, predict
from trimtab.diffusion.guidance import ClassifierFreeGuidance, classifier_free_guidance, guidance_rescale
from trimtab.diffusion.mixtures import AnalyticGMM, degrade
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import EDM, VE, Discrete, Flow, SubVP, VPCosine, VPLinear

__all__ = [
    "EDM",
    "VE",
    "AdaptiveProjectedGuidance",
    "AnalyticGMM",
    "ClassifierFreeGuidance",
    "CountNFE",
    "Denoiser",
    "Discrete",
    "Flow",
    "Split",
    "SubVP",
    "VPCosine",
    "VPLinear",
    "adaptive_projected_guidance",
    "classifier_free_guidance",
    "convert",
    "degrade",
    "deis",
    "deis_coefficients",
    "deis_rk",
    "grids",
    "guidance_rescale",
    "ipndm",
    "predict",
    "project",
]

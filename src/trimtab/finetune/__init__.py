"""Parameter-efficient adapters and regularised fine-tuning of pre-trained networks."""

from trimtab.finetune.adapter import AdaptedModel, AdapterConfig, LoRADelta, apply_adapter
from trimtab.finetune.sorsa import SORSAConfig, SORSAWeight, orthonormality, orthonormality_penalty
from trimtab.finetune.svd import SingularDrift, SVDFactors, singular_drift, svd_factors

__all__ = [
    "AdaptedModel",
    "AdapterConfig",
    "LoRADelta",
    "SORSAConfig",
    "SORSAWeight",
    "SVDFactors",
    "SingularDrift",
    "apply_adapter",
    "orthonormality",
    "orthonormality_penalty",
    "singular_drift",
    "svd_factors",
]

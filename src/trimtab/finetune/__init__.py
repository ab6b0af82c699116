"""Parameter-efficient adapters and regularised fine-tuning of pre-trained networks."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.finetune.adapter import AdaptedModel as AdaptedModel
    from trimtab.finetune.adapter import AdapterConfig as AdapterConfig
    from trimtab.finetune.adapter import LoRADelta as LoRADelta
    from trimtab.finetune.adapter import apply_adapter as apply_adapter
    from trimtab.finetune.sorsa import SORSAConfig as SORSAConfig
    from trimtab.finetune.sorsa import SORSAWeight as SORSAWeight
    from trimtab.finetune.sorsa import orthonormality as orthonormality
    from trimtab.finetune.sorsa import orthonormality_penalty as orthonormality_penalty
    from trimtab.finetune.svd import SingularDrift as SingularDrift
    from trimtab.finetune.svd import SVDFactors as SVDFactors
    from trimtab.finetune.svd import singular_drift as singular_drift
    from trimtab.finetune.svd import svd_factors as svd_factors
else:
    import_lazily(__name__)

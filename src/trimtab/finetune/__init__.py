"""Parameter-efficient adapters and regularised fine-tuning of pre-trained networks."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.finetune.adapter import AdaptedModel as AdaptedModel
    from trimtab.finetune.adapter import AdapterConfig as AdapterConfig
    from trimtab.finetune.adapter import LoRADelta as LoRADelta
    from trimtab.finetune.adapter import apply_adapter as apply_adapter
    from trimtab.finetune.dr_tune import DRTune as DRTune
    from trimtab.finetune.dr_tune import procrustes_rotation as procrustes_rotation
    from trimtab.finetune.dr_tune import semantic_calibration as semantic_calibration
    from trimtab.finetune.glad import GradientSteering as GradientSteering
    from trimtab.finetune.glad import LoRAConfig as LoRAConfig
    from trimtab.finetune.glad import LoRAWeight as LoRAWeight
    from trimtab.finetune.glad import steer_gradient as steer_gradient
    from trimtab.finetune.hard_attention_gates import FeatureGate as FeatureGate
    from trimtab.finetune.hard_attention_gates import GradientRouting as GradientRouting
    from trimtab.finetune.hard_attention_gates import closed_share as closed_share
    from trimtab.finetune.hard_attention_gates import feature_gate as feature_gate
    from trimtab.finetune.hard_attention_gates import fold_gates as fold_gates
    from trimtab.finetune.hard_attention_gates import gate_parameters as gate_parameters
    from trimtab.finetune.hard_attention_gates import initial_gates as initial_gates
    from trimtab.finetune.hard_attention_gates import insert_gates as insert_gates
    from trimtab.finetune.ramt import BinaryMask as BinaryMask
    from trimtab.finetune.ramt import MaskTuner as MaskTuner
    from trimtab.finetune.ramt import MaskTuningConfig as MaskTuningConfig
    from trimtab.finetune.ramt import gradient_dropout as gradient_dropout
    from trimtab.finetune.ramt import keep_probability as keep_probability
    from trimtab.finetune.ramt import load_packed_masks as load_packed_masks
    from trimtab.finetune.ramt import mask_norm as mask_norm
    from trimtab.finetune.ramt import packed_masks as packed_masks
    from trimtab.finetune.ramt import rank_by_gradient as rank_by_gradient
    from trimtab.finetune.ramt import sparsity as sparsity
    from trimtab.finetune.sara import SaRAConfig as SaRAConfig
    from trimtab.finetune.sara import SparseScatter as SparseScatter
    from trimtab.finetune.sara import nuclear_norm as nuclear_norm
    from trimtab.finetune.sara import nuclear_norm_penalty as nuclear_norm_penalty
    from trimtab.finetune.sara import reselect as reselect
    from trimtab.finetune.sara import sara_lr as sara_lr
    from trimtab.finetune.sara import smallest_entries as smallest_entries
    from trimtab.finetune.soma import SoMAConfig as SoMAConfig
    from trimtab.finetune.soma import SoMAWeight as SoMAWeight
    from trimtab.finetune.soma import WeightDecayAnnealing as WeightDecayAnnealing
    from trimtab.finetune.soma import adapted_biases as adapted_biases
    from trimtab.finetune.soma import annealed_weight_decay as annealed_weight_decay
    from trimtab.finetune.soma import modules_from_block as modules_from_block
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

"""Adversarial training, certified bounds, black-box defences and feature-level attacks."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.robust.aaer import AAERLoss as AAERLoss
    from trimtab.robust.aaer import AbnormalExamples as AbnormalExamples
    from trimtab.robust.aaer import SingleStep as SingleStep
    from trimtab.robust.aaer import abnormal_examples as abnormal_examples
    from trimtab.robust.aaer import single_step_adversary as single_step_adversary
    from trimtab.robust.auto_attack import AutoAttackResult as AutoAttackResult
    from trimtab.robust.auto_attack import auto_attack as auto_attack
    from trimtab.robust.auto_attack import auto_pgd as auto_pgd
    from trimtab.robust.auto_attack import boundary_attack as boundary_attack
    from trimtab.robust.auto_attack import square_attack as square_attack
    from trimtab.robust.foa_attack import FOAAttack as FOAAttack
    from trimtab.robust.foa_attack import cluster_tokens as cluster_tokens
    from trimtab.robust.foa_attack import crop_resized as crop_resized
    from trimtab.robust.foa_attack import ensemble_weights as ensemble_weights
    from trimtab.robust.foa_attack import local_alignment as local_alignment
    from trimtab.robust.foa_attack import random_boxes as random_boxes
    from trimtab.robust.gd_uap import GDUAP as GDUAP
    from trimtab.robust.gd_uap import UniversalPerturbation as UniversalPerturbation
    from trimtab.robust.gd_uap import feature_log_norm_loss as feature_log_norm_loss
    from trimtab.robust.gd_uap import fooling_rate as fooling_rate
    from trimtab.robust.ibp_tightness import IBPLoss as IBPLoss
    from trimtab.robust.ibp_tightness import can_be_propagation_invariant as can_be_propagation_invariant
    from trimtab.robust.ibp_tightness import expected_tightness as expected_tightness
    from trimtab.robust.ibp_tightness import is_propagation_invariant as is_propagation_invariant
    from trimtab.robust.ibp_tightness import propagation_tightness as propagation_tightness
    from trimtab.robust.ibp_tightness import worst_case_logits as worst_case_logits
    from trimtab.robust.zo_ae_ds import BlackBoxDefense as BlackBoxDefense
    from trimtab.robust.zo_ae_ds import Certificate as Certificate
    from trimtab.robust.zo_ae_ds import certify as certify
    from trimtab.robust.zo_ae_ds import num_queries as num_queries
    from trimtab.robust.zo_ae_ds import zo_gradient as zo_gradient
    from trimtab.robust.zo_ae_ds import zo_surrogate as zo_surrogate
else:
    import_lazily(__name__)

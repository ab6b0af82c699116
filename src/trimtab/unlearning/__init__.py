"""Machine unlearning for classifiers, graphs and generators, and an audit of its results."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.unlearning.adapt_then_unlearn import AdaptThenUnlearn as AdaptThenUnlearn
    from trimtab.unlearning.adapt_then_unlearn import ElasticPenalty as ElasticPenalty
    from trimtab.unlearning.adapt_then_unlearn import RepulsionLoss as RepulsionLoss
    from trimtab.unlearning.adapt_then_unlearn import generator_fisher as generator_fisher
    from trimtab.unlearning.adapt_then_unlearn import gradient_penalty as gradient_penalty
    from trimtab.unlearning.adapt_then_unlearn import parameter_distance as parameter_distance
    from trimtab.unlearning.adapt_then_unlearn import repulsion as repulsion
    from trimtab.unlearning.concept_domain_correction import ConceptDomainCorrection as ConceptDomainCorrection
    from trimtab.unlearning.concept_domain_correction import PatchDiscriminator as PatchDiscriminator
    from trimtab.unlearning.concept_domain_correction import clean_estimate as clean_estimate
    from trimtab.unlearning.concept_domain_correction import preserve_gradient as preserve_gradient
    from trimtab.unlearning.d2dgn import D2DGN as D2DGN
    from trimtab.unlearning.d2dgn import bernoulli_kl as bernoulli_kl
    from trimtab.unlearning.d2dgn import sample_non_edges as sample_non_edges
    from trimtab.unlearning.d2dgn import untrained_copy as untrained_copy
    from trimtab.unlearning.datamodel_matching import LinearDatamodel as LinearDatamodel
    from trimtab.unlearning.datamodel_matching import datamodel_matching as datamodel_matching
    from trimtab.unlearning.datamodel_matching import oracle_matching as oracle_matching
    from trimtab.unlearning.datamodel_matching import predict_without as predict_without
    from trimtab.unlearning.datamodel_matching import ridge_influences as ridge_influences
    from trimtab.unlearning.datamodel_matching import subset_masks as subset_masks
    from trimtab.unlearning.matching import match_outputs as match_outputs
    from trimtab.unlearning.matching import matching_indices as matching_indices
    from trimtab.unlearning.protocol import klom as klom
    from trimtab.unlearning.protocol import margins as margins
    from trimtab.unlearning.protocol import membership_auc as membership_auc
    from trimtab.unlearning.protocol import relearning_steps as relearning_steps
    from trimtab.unlearning.unlearn_diff_attack import AuditResult as AuditResult
    from trimtab.unlearning.unlearn_diff_attack import attack_success_rate as attack_success_rate
    from trimtab.unlearning.unlearn_diff_attack import denoising_error as denoising_error
    from trimtab.unlearning.unlearn_diff_attack import draw_tokens as draw_tokens
    from trimtab.unlearning.unlearn_diff_attack import insert_tokens as insert_tokens
    from trimtab.unlearning.unlearn_diff_attack import search_tokens as search_tokens
    from trimtab.unlearning.unlearn_diff_attack import straight_through_gradient as straight_through_gradient
else:
    import_lazily(__name__)

"""Generative models: any-order likelihoods, GANs, tokenizers, latent codes and imputation."""

from typing import TYPE_CHECKING

from trimtab.faces import import_lazily

if TYPE_CHECKING:
    from trimtab.generative.augment import DiffAugment as DiffAugment
    from trimtab.generative.augself_gan import AugSelfGAN as AugSelfGAN
    from trimtab.generative.augself_gan import AugSelfHead as AugSelfHead
    from trimtab.generative.augself_gan import augself_discriminator_loss as augself_discriminator_loss
    from trimtab.generative.augself_gan import augself_generator_loss as augself_generator_loss
    from trimtab.generative.gan import GAN as GAN
    from trimtab.generative.gan import Discriminator as Discriminator
    from trimtab.generative.gan import hinge_discriminator_loss as hinge_discriminator_loss
    from trimtab.generative.gan import hinge_generator_loss as hinge_generator_loss
    from trimtab.generative.gigatok import AutoregressiveProbe as AutoregressiveProbe
    from trimtab.generative.gigatok import Tokenized as Tokenized
    from trimtab.generative.gigatok import Tokenizer1D as Tokenizer1D
    from trimtab.generative.gigatok import level_averages as level_averages
    from trimtab.generative.gigatok import semantic_regularization as semantic_regularization
    from trimtab.generative.hmar import Generated as Generated
    from trimtab.generative.hmar import HierarchicalMaskedAR as HierarchicalMaskedAR
    from trimtab.generative.hmar import next_scale_mask as next_scale_mask
    from trimtab.generative.hmar import scale_loss_weights as scale_loss_weights
    from trimtab.generative.importance import effective_sample_size as effective_sample_size
    from trimtab.generative.importance import importance_weights as importance_weights
    from trimtab.generative.importance import log_mean_exp as log_mean_exp
    from trimtab.generative.infomec import DCI as DCI
    from trimtab.generative.infomec import InfoMEC as InfoMEC
    from trimtab.generative.infomec import dci as dci
    from trimtab.generative.infomec import infomec as infomec
    from trimtab.generative.infomec import mutual_information_gap as mutual_information_gap
    from trimtab.generative.mam import MarginalFM as MarginalFM
    from trimtab.generative.mam import MarginalKL as MarginalKL
    from trimtab.generative.mam import MarginalLikelihood as MarginalLikelihood
    from trimtab.generative.mam import Marginals as Marginals
    from trimtab.generative.mam import marginal_consistency_loss as marginal_consistency_loss
    from trimtab.generative.mam import reverse_kl_surrogate as reverse_kl_surrogate
    from trimtab.generative.qlae import QuantizedAutoencoder as QuantizedAutoencoder
    from trimtab.generative.qlae import decay_groups as decay_groups
    from trimtab.generative.quantize import CodebookUse as CodebookUse
    from trimtab.generative.quantize import MultiScaleQuantizer as MultiScaleQuantizer
    from trimtab.generative.quantize import Quantized as Quantized
    from trimtab.generative.quantize import ScalarQuantizer as ScalarQuantizer
    from trimtab.generative.quantize import VectorQuantizer as VectorQuantizer
    from trimtab.generative.quantize import codebook_use as codebook_use
    from trimtab.generative.quantize import entropy_loss as entropy_loss
    from trimtab.generative.quantize import rotation_trick as rotation_trick
    from trimtab.generative.quantize import straight_through as straight_through
    from trimtab.generative.supnotmiwae import Fillings as Fillings
    from trimtab.generative.supnotmiwae import Prediction as Prediction
    from trimtab.generative.supnotmiwae import SupNotMIWAE as SupNotMIWAE
    from trimtab.generative.supnotmiwae import cauchy_kernel as cauchy_kernel
    from trimtab.generative.supnotmiwae import decay_impute as decay_impute
    from trimtab.generative.supnotmiwae import last_observed as last_observed
    from trimtab.generative.supnotmiwae import latent_log_prob as latent_log_prob
    from trimtab.generative.supnotmiwae import obs_dropout as obs_dropout
    from trimtab.ops.ordering import any_order_log_prob as any_order_log_prob
    from trimtab.ops.ordering import any_order_loss as any_order_loss
    from trimtab.ops.ordering import any_order_sample as any_order_sample
    from trimtab.ops.ordering import random_ranks as random_ranks
else:
    import_lazily(__name__)

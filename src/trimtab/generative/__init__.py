"""Generative models: any-order likelihoods, GANs, tokenizers, latent codes and imputation."""

"""Gaussian and volumetric scenes, distillation from 2-D priors, matching and registration."""

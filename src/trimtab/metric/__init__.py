"""Metric learning, face-recognition heads, retrieval, and image-text alignment."""

from trimtab.metric.pairs import PairMasks, pair_masks
from trimtab.metric.retrieval import map_at_r, recall_at_k
from trimtab.metric.samplers import PKSampler
from trimtab.metric.tcm import (
    ThresholdConsistentMarginLoss,
    UtilityCurves,
    opis,
    threshold_consistent_margin,
    utility_curves,
    utility_variance,
)

__all__ = [
    "PKSampler",
    "PairMasks",
    "ThresholdConsistentMarginLoss",
    "UtilityCurves",
    "map_at_r",
    "opis",
    "pair_masks",
    "recall_at_k",
    "threshold_consistent_margin",
    "utility_curves",
    "utility_variance",
]

r"""Adapter guidance distillation: small adapters that make a frozen model say what it would say under guidance.

For a conditional model that is used with classifier-free guidance and should sample at half the cost, without training
or storing another model. Adapters of a few per cent of its size sit behind its attention blocks (or any others), are
told the guidance scale, and learn on trajectories that guidance itself has sampled, where they will be used:

$$
\min_\phi\ \mathbb{E}_{w,\ (x_t, t, c)\, \sim\, \text{guided sampling at } w}
\left\| \varepsilon_{\theta, \phi}(x_t, t, c, w) -
\bigl(\varepsilon_u + w(\varepsilon_c - \varepsilon_u)\bigr) \right\|^2 .
$$

The network is left as it was: without a scale it is called as before, and the adapters are saved alone.

Reference: Cristian Perez Jensen and Seyedmorteza Sadat, "Efficient Distillation of Classifier-Free Guidance using
Adapters", TMLR 2025, arXiv 2503.07274. The authors' release can also read the model's own time and class embeddings;
here adapters have theirs.
"""

from trimtab.diffusion.agd.adapters import CrossAttentionAdapter, GuidanceAdapters, OffsetAdapter, adapt_to_guidance
from trimtab.diffusion.agd.trajectories import GuidedTrajectories, TrajectoryRecorder, trajectory_loss

__all__ = [
    "CrossAttentionAdapter",
    "GuidanceAdapters",
    "GuidedTrajectories",
    "OffsetAdapter",
    "TrajectoryRecorder",
    "adapt_to_guidance",
    "trajectory_loss",
]

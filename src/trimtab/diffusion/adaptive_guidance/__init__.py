r"""Adaptive guidance: classifier-free guidance without the evaluations that change nothing.

Classifier-free guidance doubles the cost of a step. The prediction with the condition and the one without come to agree
as noise falls; from then on the second is not worth its evaluation. Nothing is trained, and any condition may be guided
away from, negative prompts included. Three ways of saving, each bolder than the last:

- `AdaptiveGuidance` (AG) drops the second evaluation of a sample for good as soon as the two agree,

$$
\gamma_t = \cos\bigl(r_c, r_u\bigr) \ge \bar\gamma, \qquad r = x_t - \varepsilon .
$$

- `search_policy` finds, step by step, whether to evaluate with the condition, without it, or both and at which scale,
  by gradient descent over soft choices through the whole sampler; `PolicyGuidance` follows what it found.
- `LinearAG` puts a linear combination of all predictions so far in the place of every other second evaluation of the
  first half, and none in the second half,

$$
\hat\varepsilon_u^{(t)} = \sum_{i \ge t} \beta^c_{t,i}\, \varepsilon_c^{(i)}
    + \sum_{i > t} \beta^u_{t,i}\, \varepsilon_u^{(i)},
$$

  with coefficients for each step from least squares on recorded runs (`record_guidance`, `fit_linear_guidance`).

The paper's text was not available. Accounts of it take the cosine of the noises; its authors' figure, and
implementations for Stable Diffusion, take it of the residual or of the denoised prediction. So does this one, since two
noises agree before anything is denoised: they are nearly the sample itself then. The form of the regression stands
alike in two accounts of the paper; which steps it serves is from one of them.

Reference: Angela Castillo, Jonas Kohler, Juan C. Pérez, Juan Pablo Pérez, Albert Pumarola, Bernard Ghanem, Pablo
Arbeláez and Ali Thabet, "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
arXiv 2312.12487.
"""

from trimtab.diffusion.adaptive_guidance.agreement import AdaptiveGuidance, agreement
from trimtab.diffusion.adaptive_guidance.linear import LinearAG, fit_linear_guidance, record_guidance
from trimtab.diffusion.adaptive_guidance.policy import PolicyGuidance, policy_evaluations, search_policy

__all__ = [
    "AdaptiveGuidance",
    "LinearAG",
    "PolicyGuidance",
    "agreement",
    "fit_linear_guidance",
    "policy_evaluations",
    "record_guidance",
    "search_policy",
]

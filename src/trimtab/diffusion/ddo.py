r"""DDO: fine-tunes a generator by a GAN's loss whose discriminator is the generator itself.

For a diffusion or autoregressive model that maximum likelihood has brought as far as its size allows: it covers the
data and blurs over them. The discriminator is the likelihood ratio of the model $p_\theta$ to a frozen copy $p_r$ of
it, so that there is no second network and no game:

$$
\mathcal{L} = \mathbb{E}_{x \sim p_{\text{data}}}\, \operatorname{softplus}(-\beta r(x))
+ \alpha\, \mathbb{E}_{x \sim p_r}\, \operatorname{softplus}(\beta r(x)),
\qquad r(x) = \log \frac{p_\theta(x)}{p_r(x)} .
$$

With $\alpha = \beta = 1$ its optimum is the data's distribution. In general it is
$p \propto p_r^{1 - 1/\beta}\, p_{\text{data}}^{1/\beta}$: a smaller $\beta$, which the size of log-likelihoods calls
for, goes beyond the data, as guidance does. Runs are short, and repeated: `SelfPlay` makes the tuned model the next
reference.

Reference: Kaiwen Zheng, Yongxin Chen, Huayu Chen, Guande He, Ming-Yu Liu, Jun Zhu and Qinsheng Zhang, "Direct
Discriminative Optimization: Your Likelihood-Based Visual Generative Model is Secretly a GAN Discriminator", ICML 2025,
arXiv 2503.01103.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem
from trimtab.diffusion.prediction import target
from trimtab.ops.arguments import floating_tensor, looked_at, one_of, positive, real_problem, same_shape

Reduction = Literal["mean", "sum"]


class DDOLoss(nn.Module):
    """The loss on log-ratios of the model to its reference, called as `loss(data, fake)`.

    Args:
        alpha: weight of the samples of the reference. The authors search 0.5 to 6 for diffusion, 10 to 100 for
            autoregressive models.
        beta: factor on the log-ratios. The authors search 0.01 to 0.1.
        reduction: "mean" or "sum", of each of the two groups.

    Raises:
        ValueError: if alpha or beta is not positive, or the reduction unknown.

    Example:
        >>> DDOLoss()(torch.zeros(4), torch.zeros(4))  # at the reference: (1 + alpha) log 2
        tensor(1.3863)
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.alpha, self.beta = positive("alpha", alpha), positive("beta", beta)
        self.reduction: Reduction = one_of("reduction", reduction, get_args(Reduction))

    def forward(self, data: Float[Tensor, " batch"], fake: Float[Tensor, " fakes"]) -> Tensor:
        """The loss.

        Args:
            data: log-ratios of data.
            fake: log-ratios of samples of the reference; there may be more or fewer.

        Raises:
            TypeError: if they are not floating-point tensors.
            ValueError: if they are no vectors, or empty.
        """
        data, fake = floating_tensor("data", data), floating_tensor("fake", fake)
        for name, value in (("data", data), ("fake", fake)):
            if value.ndim != 1 or len(value) == 0:
                raise ValueError(f"{name} must be a vector of at least one log-ratio, got shape {tuple(value.shape)}")
        real, other = F.softplus(-self.beta * data), F.softplus(self.beta * fake)
        if self.reduction == "mean":
            return real.mean() + self.alpha * other.mean()
        return real.sum() + self.alpha * other.sum()


def diffusion_log_ratio(
    denoiser: DenoiserLike,
    reference: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    *further: Any,
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""An estimate of the log-ratio of two diffusion models, by their errors on the same noisy sample.

    $-w(t) \bigl(\lVert D_\theta - y \rVert^2 - \lVert D_r - y \rVert^2\bigr)$, summed over numbers, where y is the kind
    of prediction that the models make: the difference of two variational bounds, at one time.

    Args:
        denoiser: the model; gradients are its own alone.
        reference: the frozen model, of the same schedule and kind of prediction.
        x0: samples.
        t: a time for each.
        noise: standard normal, of the shape of `x0`.
        *further: what both take beside x and t, such as a class.
        weight: per sample; one where None. `EDMPreconditioned.weight(t)` makes the errors those of EDM's raw network.

    Raises:
        TypeError: if a tensor is complex or a NumPy array, or a denoiser lacks the form of one or returns a `Split`.
        ValueError: if shapes do not fit.

    Example:
        >>> from trimtab.diffusion import Denoiser, Flow
        >>> right = Denoiser(lambda x, t: torch.ones_like(x), Flow(), "flow")
        >>> wrong = Denoiser(lambda x, t: torch.zeros_like(x), Flow(), "flow")
        >>> x0, noise, t = torch.zeros(1, 2), torch.ones(1, 2), torch.full((1,), 0.5)
        >>> diffusion_log_ratio(right, wrong, x0, t, noise)
        tensor([2.])
    """
    if problem := real_problem(x0=x0, t=t, noise=noise, weight=weight):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    for name, value in (("t", t), ("weight", weight)):
        if value is not None and value.shape != x0.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(x0)},), one per sample, got {tuple(value.shape)}")
    if problem := form_problem(denoiser=denoiser):
        raise TypeError(problem)
    schedule = denoiser.schedule
    wanted = target(x0, noise, schedule.alpha(t), schedule.sigma(t), denoiser.prediction)
    x = schedule.add_noise(x0, noise, t)

    def error(model: DenoiserLike) -> Tensor:
        found = model(x, t, *further)
        if isinstance(found, Split):
            raise TypeError("denoiser must return one prediction, got a Split")
        return (found - wanted).square().flatten(1).sum(1)

    with torch.no_grad():
        before = error(reference)
    ratio = before - error(denoiser)
    return ratio if weight is None else weight * ratio


def autoregressive_log_ratio(
    scores: Float[Tensor, "batch length values"],
    reference_scores: Float[Tensor, "batch length values"],
    tokens: Int[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """The exact log-ratio of two autoregressive models, summed over tokens.

    Args:
        scores: of the model, at each position for the token that stands there.
        reference_scores: of the frozen model; they get no gradient.
        tokens: int64.

    Raises:
        TypeError: if scores are no floating-point tensors, or tokens not int64.
        ValueError: if shapes do not fit, or a token has no score.

    Example:
        >>> scores = torch.tensor([[[1.0, 0.0]]])
        >>> autoregressive_log_ratio(scores, scores, torch.tensor([[0]]))
        tensor([0.])
    """
    if not all(isinstance(part, Tensor) and part.is_floating_point() for part in (scores, reference_scores)):
        raise TypeError("scores and reference_scores must be floating-point tensors, got others")
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")
    same_shape("reference_scores", reference_scores, "scores", scores)
    if scores.ndim != 3 or scores.shape[:2] != tokens.shape:
        raise ValueError(f"tokens must have shape {tuple(scores.shape[:2])}, got {tuple(tokens.shape)}")
    if looked_at(tokens) and not bool(((tokens >= 0) & (tokens < scores.shape[2])).all()):
        raise ValueError(f"tokens must be in [0, {scores.shape[2]}), got others")
    difference = scores.log_softmax(2) - reference_scores.detach().log_softmax(2)
    return difference.gather(2, tokens.unsqueeze(2)).squeeze(2).sum(1)


LogRatio = Callable[[nn.Module, nn.Module, Any], Float[Tensor, " batch"]]
"""Maps the model, the reference and samples to log-ratios."""


class SelfPlay:
    """DDO in rounds: the model against samples of its frozen copy, which it replaces at the end of a round.

    Dropout is off in both networks, or the ratio would not be 1 where they coincide.

    Args:
        model: the trained generator.
        optimizer: over its parameters.
        log_ratio: `log_ratio(model, reference, samples)`, such as one of the two of this module with draws of its own.
        sample: `sample(reference, count)` gives the reference's samples, drawn now or taken from a set drawn before.
        alpha, beta: of the loss.

    Attributes:
        reference: the frozen copy.

    Raises:
        ValueError: if alpha or beta is not positive.

    Example:
        >>> model = nn.Linear(1, 2)  # a categorical distribution, of its bias
        >>> def log_ratio(model, reference, tokens):
        ...     scores = [net(torch.zeros(len(tokens), 1, 1)) for net in (model, reference)]
        ...     return autoregressive_log_ratio(*scores, tokens)
        >>> sample = lambda model, count: model.bias.softmax(0).multinomial(count, replacement=True)[:, None]
        >>> rule = SelfPlay(model, torch.optim.SGD(model.parameters(), lr=1.0), log_ratio, sample)
        >>> rule.step(torch.ones(4, 1, dtype=torch.int64))["loss"]  # the first step of a round: 2 log 2
        tensor(1.3863)
        >>> rule.next_round()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        log_ratio: LogRatio,
        sample: Callable[[nn.Module, int], Any],
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        self.loss = DDOLoss(alpha, beta)
        self.model, self.optimizer = model, optimizer
        self.log_ratio, self.sample = log_ratio, sample
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def step(self, data: Any) -> dict[str, Tensor]:
        """A step on a batch of data and as many samples of the reference."""
        if problem := real_problem(data=data):
            raise TypeError(problem)
        self.model.eval()
        with torch.no_grad():
            fake = self.sample(self.reference, len(data))
        real_ratio = self.log_ratio(self.model, self.reference, data)
        fake_ratio = self.log_ratio(self.model, self.reference, fake)
        loss = self.loss(real_ratio, fake_ratio)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "data": real_ratio.detach().mean(), "fake": fake_ratio.detach().mean()}

    def next_round(self) -> None:
        """Make the model the reference; where an earlier state of it was better, load that into the model before."""
        self.reference.load_state_dict(self.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that a continued training needs."""
        return {
            "model": self.model.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; one that does not fit is refused and changes nothing."""
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        for part in ("model", "reference", "optimizer"):
            getattr(self, part).load_state_dict(state[part])

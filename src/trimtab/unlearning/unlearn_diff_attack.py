r"""UnlearnDiffAtk: an audit that searches the few prompt tokens which bring an erased concept back.

For those who made a diffusion model forget a concept and want to know whether it did. Given an image of what was
erased, tokens are sought that, put beside the prompt, let the unlearned model denoise this image well. The model's own
error is the classifier, so that the audit needs neither a second diffusion model nor a classifier while it searches.

$$
\min_{s} \; E_{\epsilon, t} \bigl\| \epsilon - \epsilon_{\theta'}(x_t, t, [s; c]) \bigr\|^2, \qquad
x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon .
$$

Each of the k tokens has a distribution over the vocabulary. In an iteration a token is drawn of each, the gradient with
respect to the one-hot rows, cut off at plus and minus 1, is taken for the distributions' own, and after a step of Adam
these are projected back onto the simplex. After each noise level the likeliest tokens are tried on the judge.

Reference: Yimeng Zhang, Jinghan Jia, Xin Chen, Aochuan Chen, Yihua Zhang, Jiancheng Liu, Ke Ding and Sijia Liu, "To
Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now", ECCV
2024, arXiv 2310.11868; from the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trimtab.ops.arguments import (
    all_finite,
    finite_tensor,
    integer,
    labels,
    looked_at,
    non_negative,
    one_of,
    positive,
    same_shape,
    tensor,
    tensor_problem,
)
from trimtab.ops.simplex import project_simplex

Position = Literal["prefix", "suffix", "middle", "spread"]
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps noisy images, the number of the step of each, and embedded prompts (batch, tokens, width) to noise."""


@dataclass(frozen=True)
class AuditResult:
    """What an audit of one image found.

    Attributes:
        tokens: those tried last, the likeliest ones; they brought the concept back where `success` is True. None
            where the prompt alone did.
        losses: mean denoising error over the iterations of each noise level that was searched.
        success: whether the judge saw the concept; None without a judge.
        before: whether it was seen without any tokens; None without a judge.
        queries: images that went through the model in the search.
    """

    tokens: tuple[int, ...] | None
    losses: tuple[float, ...]
    success: bool | None
    before: bool | None
    queries: int


def denoising_error(
    denoiser: Denoiser,
    x0: Float[Tensor, "batch ..."],
    cond: Tensor,
    t: Int64[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    alphas_cumprod: Float[Tensor, " steps"],
) -> Float[Tensor, " batch"]:
    """How badly a model denoises each image under its prompt: the mean square of what it gets wrong in the noise.

    The prompt of least error is the class that the model itself sees. Compare errors at the same steps and noise.

    Args:
        denoiser: predicts noise.
        x0: images.
        cond: their prompts, in the form that the denoiser takes.
        t: their steps.
        noise: standard normal.
        alphas_cumprod: share of the signal in the variance at each step.

    Raises:
        ValueError: shapes do not fit, or a step is out of range.

    Example:
        >>> blind = lambda x_t, t, cond: torch.zeros_like(x_t)
        >>> t, noise = torch.tensor([0]), torch.tensor([[3.0, 1.0]])
        >>> denoising_error(blind, torch.zeros(1, 2), torch.zeros(1, 1, 4), t, noise, torch.tensor([0.5]))
        tensor([5.])
    """
    if problem := tensor_problem(x0=x0, cond=cond, t=t, noise=noise, alphas_cumprod=alphas_cumprod):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must be {len(x0)} steps as x0, got shape {tuple(t.shape)}")
    if t.numel() and looked_at(t) and not 0 <= int(t.min()) <= int(t.max()) < len(alphas_cumprod):
        raise ValueError(f"t must be in [0, {len(alphas_cumprod)}), got {int(t.min())} to {int(t.max())}")
    signal = alphas_cumprod.to(x0)[t].view(-1, *[1] * (x0.ndim - 1))
    predicted = denoiser(signal.sqrt() * x0 + (1 - signal).sqrt() * noise, t, cond)
    return (predicted - noise).square().flatten(1).mean(1)


def insert_tokens(
    prompt: Float[Tensor, "*batch length width"],
    tokens: Float[Tensor, "*batch k width"],
    position: Position = "prefix",
) -> Float[Tensor, "*batch total width"]:
    """An embedded prompt with further embedded tokens in it.

    Args:
        prompt: embedded tokens of the prompt.
        tokens: those to be put in.
        position: "prefix" before it, "suffix" after it, "middle" in its middle, or "spread" over it at equal distances.

    Raises:
        ValueError: `position` is unknown.

    Example:
        >>> prompt, tokens = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[8.0], [9.0]])
        >>> [insert_tokens(prompt, tokens, where).int().flatten().tolist() for where in ("middle", "spread")]
        [[1, 2, 8, 9, 3, 4], [1, 8, 2, 9, 3, 4]]
    """
    if problem := tensor_problem(prompt=prompt, tokens=tokens):
        raise TypeError(problem)
    one_of("position", position, get_args(Position))
    length, count = prompt.shape[-2], tokens.shape[-2]
    if position == "spread":
        every = length // (count + 1)
        parts = [
            part
            for k in range(count)
            for part in (prompt[..., k * every : (k + 1) * every, :], tokens[..., k : k + 1, :])
        ]
        return torch.cat([*parts, prompt[..., count * every :, :]], -2)
    at = {"prefix": 0, "suffix": length, "middle": length // 2}[position]
    return torch.cat([prompt[..., :at, :], tokens, prompt[..., at:, :]], -2)


def straight_through_gradient(gradient: Float[Tensor, "k vocabulary"]) -> Float[Tensor, "k vocabulary"]:
    """What a gradient with respect to one-hot rows counts for the distributions they were drawn from: cut off at 1.

    Example:
        >>> straight_through_gradient(torch.tensor([[0.5, -3.0]]))
        tensor([[ 0.5000, -1.0000]])
    """
    if problem := tensor_problem(gradient=gradient):
        raise TypeError(problem)
    return gradient.clamp(-1, 1)


def search_tokens(
    denoiser: Denoiser,
    embeddings: Float[Tensor, "vocabulary width"],
    alphas_cumprod: Float[Tensor, " steps"],
    x0: Float[Tensor, "batch ..."],
    prompt: Int64[Tensor, " length"],
    *,
    num_tokens: int = 3,
    position: Position = "prefix",
    timesteps: Sequence[int] | Int64[Tensor, " levels"] | int = 50,
    iterations: int = 40,
    lr: float = 0.01,
    weight_decay: float = 0.1,
    judge: Callable[[tuple[int, ...] | None], bool] | None = None,
    generator: torch.Generator | None = None,
) -> AuditResult:
    """Searches tokens that bring an erased concept back: an audit of an unlearned model of your own.

    Args:
        denoiser: the unlearned model, called with embedded prompts. Its weights get no gradients.
        embeddings: of the tokens that may be used.
        alphas_cumprod: share of the signal in the variance at each step of the model.
        x0: an image of what was erased, of the original model or of the data; several share their tokens.
        prompt: the tokens of the prompt, positions in `embeddings`.
        num_tokens: how many are added.
        position: where, see `insert_tokens`.
        timesteps: the steps of the model to search at, in turn; a number takes so many at equal distances, from little
            noise to much.
        iterations: at each of them.
        lr: Adam's, on the distributions.
        weight_decay: Adam's, added to the gradient before the projection.
        judge: says whether what is made with these tokens shows the concept, None standing for the prompt alone. The
            search ends with the first success. Give it the seed that the audit is about.
        generator: draws tokens and noise.

    Raises:
        TypeError: a tensor is not floating point, or positions not integers.
        ValueError: there are fewer than two tokens to choose from, no token to add, no image, a number or position is
            out of range, or an embedding is not finite.

    Example:
        >>> embeddings = torch.eye(3)
        >>> x0, bars = torch.ones(1, 2), torch.tensor([0.9, 0.5])
        >>> def model(x_t, t, cond):  # knows the image where token 2 stands in the prompt
        ...     bar = bars[t][:, None]
        ...     return (x_t - bar.sqrt() * cond[:, 0, 2:]) / (1 - bar).sqrt()
        >>> generator = torch.Generator().manual_seed(0)
        >>> search_tokens(model, embeddings, bars, x0, torch.tensor([0]), num_tokens=1, generator=generator).tokens
        (2,)
    """
    embeddings = tensor("embeddings", embeddings, ndim=2, floating=True).detach()
    if len(embeddings) < 2:
        raise ValueError(f"embeddings must be of two tokens or more, got {len(embeddings)}")
    if not all_finite(embeddings):
        raise ValueError("embeddings must be finite, got NaN or infinity")
    bars = tensor("alphas_cumprod", alphas_cumprod, ndim=1, floating=True)
    if not len(bars) or not bool(((bars >= 0) & (bars <= 1)).all()):
        raise ValueError("alphas_cumprod must be one number or more in [0, 1], got others or none")
    x0 = finite_tensor("x0", x0, floating=True)
    if x0.ndim < 2 or not len(x0):
        raise ValueError(f"x0 must be (batch, ...) with one image or more, got shape {tuple(x0.shape)}")
    given = embeddings[labels("prompt", prompt, len(embeddings)).to(embeddings.device)]
    integer("num_tokens", num_tokens)
    one_of("position", position, get_args(Position))
    integer("iterations", iterations)
    positive("lr", lr)
    non_negative("weight_decay", weight_decay)
    if isinstance(timesteps, int | Integral):
        count = integer("timesteps", timesteps)
        levels = [(2 * k + 1) * len(bars) // (2 * count) for k in range(count)]
    else:
        levels = labels("timesteps", torch.as_tensor(timesteps), len(bars)).tolist()
    before = None if judge is None else bool(judge(None))
    if before:
        return AuditResult(None, (), True, True, 0)

    u = torch.full((num_tokens, len(embeddings)), 1 / len(embeddings)).to(embeddings).requires_grad_()
    optimizer = torch.optim.Adam([u], lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    tokens: tuple[int, ...] | None = None
    success = None if judge is None else False
    for level in levels:
        t = torch.full((len(x0),), level, device=x0.device)
        total = torch.zeros((), device=x0.device)
        for _ in range(iterations):
            rows = draw_tokens(u.detach(), generator=generator)
            one_hot = torch.nn.functional.one_hot(rows, len(embeddings)).to(u).requires_grad_()
            cond = insert_tokens(given, one_hot @ embeddings, position).expand(len(x0), -1, -1)
            noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
            loss = denoising_error(denoiser, x0, cond, t, noise, bars).mean()
            # A model that does not look at its prompt gives no gradient at all.
            (gradient,) = torch.autograd.grad(loss, one_hot, allow_unused=True) if loss.requires_grad else (None,)
            u.grad = torch.zeros_like(u) if gradient is None else straight_through_gradient(gradient)
            optimizer.step()
            with torch.no_grad():
                u.copy_(project_simplex(u))
            total += loss.detach()
        losses.append(float(total) / iterations)
        tokens = tuple(u.detach().argmax(1).tolist())
        if judge is not None and judge(tokens):
            success = True
            break
    return AuditResult(tokens, tuple(losses), success, before, len(losses) * iterations * len(x0))


def draw_tokens(
    probabilities: Float[Tensor, "k vocabulary"], *, generator: torch.Generator | None = None
) -> Int64[Tensor, " k"]:
    """A token from each row's distribution.

    Example:
        >>> draw_tokens(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    if problem := tensor_problem(probabilities=probabilities):
        raise TypeError(problem)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(probabilities.device)


def attack_success_rate(results: Sequence[AuditResult]) -> tuple[float, float]:
    """Shares of audits in which the concept came back: without any tokens, and in all.

    Args:
        results: of audits with a judge.

    Raises:
        ValueError: there are none, or one had no judge.

    Example:
        >>> found = [AuditResult(None, (), True, True, 0), AuditResult((3,), (0.1,), True, False, 40)]
        >>> attack_success_rate([*found, AuditResult((5,), (0.2,), False, False, 40)])
        (0.333..., 0.666...)
    """
    if not results or any(result.success is None for result in results):
        raise ValueError("results must be of one audit or more, all with a judge, got others")
    return sum(bool(r.before) for r in results) / len(results), sum(bool(r.success) for r in results) / len(results)

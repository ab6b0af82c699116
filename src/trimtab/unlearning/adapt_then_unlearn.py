r"""Adapt, then unlearn: learns where in weight space an undesired feature lies, and keeps a GAN away from there.

For a generator that should no longer make what a user marks in its own samples, without its training data. First the
GAN is fine-tuned on samples marked as undesired, held near its start where its weights matter (`ElasticPenalty`), once
or several times: the adapted weights say where the feature is. Then the original GAN is trained on the other samples,
and its generator is repelled from there (`RepulsionLoss`).

$$
L_G = E\,\mathrm{softplus}\bigl(-D(G_\theta(z))\bigr) + L_{\text{rep}}(v), \qquad
v = \frac{1}{n} \sum_{i=1}^{n} \frac{1}{T} \sum_{k=1}^{T} \mathrm{mean}\bigl( (\theta_k - \theta^i_k)^2 \bigr),
$$

with $L_{\text{rep}}$ one of $\gamma / v$ (IL2), $-\gamma v$ (NL2) and $\alpha e^{-\gamma v}$ (EL2), over T weight
tensors and n adapted generators. `AdaptThenUnlearn` trains both stages, with one penalty or the other.

Reference: Piyush Tiwary, Atri Guha, Subhodip Panda and Prathosh A. P., "Adapt then Unlearn: Exploring Parameter Space
Semantics for Unlearning in Generative Adversarial Networks", TMLR 2025, arXiv 2309.14054. The distance is that of the
authors' code but for its factor, which there is n / 2 of the sum over adapted generators; the mean over each tensor
makes a bias weigh as much as a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import all_finite, floating_tensor, integer, non_negative, one_of, tensor_problem
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.per_sample_gradients import per_sample_gradients
from trimtab.ops.states import fits

Kind = Literal["il2", "nl2", "el2"]
_LEAST = 1e-12  # of a distance that is divided by


def parameter_distance(model: nn.Module, references: Sequence[nn.Module], *, normalise: bool = True) -> Tensor:
    """Mean squared distance of a network's weights from others', each weight tensor counting alike.

    Buffers, such as running statistics, do not count. No gradient goes to the references.

    Args:
        model: the network in training.
        references: networks of the same weights, one or more.
        normalise: take the mean over references; otherwise their sum.

    Raises:
        ValueError: there are no references, or one has other weights.

    Example:
        >>> model, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [nn.init.constant_(p, value) for m, value in ((model, 1.0), (other, 3.0)) for p in m.parameters()]
        >>> parameter_distance(model, [other]).item()
        4.0
    """
    if not references:
        raise ValueError("references must be one network or more, got none")
    own = dict(model.named_parameters())
    for reference in references:
        theirs = dict(reference.named_parameters())
        if not fits(theirs, own):
            wrong = sorted(k for k in own.keys() | theirs.keys() if _shape(own, k) != _shape(theirs, k))
            raise ValueError(f"references must have the weights of model, got others at {', '.join(wrong)}")
    stacks = (torch.stack([dict(r.named_parameters())[name].detach() for r in references]) for name in own)
    return _distance(own.values(), stacks) * (1 if normalise else len(references))


def repulsion(v: Tensor, kind: Kind = "el2", *, gamma: float = 1.0, alpha: float = 100.0) -> Tensor:
    """What a distance from the undesired weights costs: less, the farther off they are.

    Args:
        v: the distance, not negative.
        kind: "il2", gamma / v, which is finite at 0 for v is taken as 1e-12 at least; "nl2", -gamma v, which has no
            lower bound, so that it needs few steps or small rates; or "el2", alpha exp(-gamma v).
        gamma: not negative.
        alpha: of "el2" alone, not negative; 50 to 250 in the authors' code.

    Raises:
        ValueError: a number is negative, or `kind` unknown.

    Example:
        >>> v = torch.tensor(2.0)
        >>> [round(repulsion(v, kind, gamma=0.5).item(), 4) for kind in ("il2", "nl2", "el2")]
        [0.25, -1.0, 36.7879]
    """
    if problem := tensor_problem(v=v):
        raise TypeError(problem)
    one_of("kind", kind, get_args(Kind))
    non_negative("gamma", gamma)
    non_negative("alpha", alpha)
    if kind == "il2":
        return gamma / v.clamp_min(_LEAST)
    return -gamma * v if kind == "nl2" else alpha * (-gamma * v).exp()


class RepulsionLoss(nn.Module):
    """`repulsion` of a network from adapted ones, whose weights it holds as buffers.

    Args:
        references: the adapted networks, one or more.
        kind, gamma, alpha: as in `repulsion`.
        normalise: as in `parameter_distance`.

    Raises:
        ValueError: there are no references, they have different weights, or as `repulsion`.

    Example:
        >>> adapted = nn.Linear(2, 1)
        >>> RepulsionLoss([adapted], "el2", alpha=5.0)(adapted).item()
        5.0
    """

    def __init__(
        self,
        references: Sequence[nn.Module],
        kind: Kind = "el2",
        *,
        gamma: float = 1.0,
        alpha: float = 100.0,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        repulsion(torch.ones(()), kind, gamma=gamma, alpha=alpha)
        if not references:
            raise ValueError("references must be one network or more, got none")
        parameter_distance(references[0], references)
        self.kind: Kind = kind
        self.gamma, self.alpha, self.normalise = float(gamma), float(alpha), bool(normalise)
        self.names = [name for name, _ in references[0].named_parameters()]
        for k, name in enumerate(self.names):
            stack = torch.stack([dict(r.named_parameters())[name].detach().clone() for r in references])
            self.register_buffer(f"references_{k}", stack)

    def distance(self, model: nn.Module) -> Tensor:
        """`parameter_distance` from the networks held."""
        own = dict(model.named_parameters())
        stacks = list(self.buffers())
        if list(own) != self.names or any(p.shape != s.shape[1:] for p, s in zip(own.values(), stacks, strict=True)):
            raise ValueError("model must have the weights of the references, got others")
        return _distance(own.values(), stacks) * (1 if self.normalise else len(stacks[0]))

    def forward(self, model: nn.Module) -> Tensor:
        """The loss of a network of the same weights.

        Raises:
            ValueError: it has others.
        """
        return repulsion(self.distance(model), self.kind, gamma=self.gamma, alpha=self.alpha)


def generator_fisher(
    synthesis: nn.Module, discriminator: nn.Module, z: Float[Tensor, "samples latent"]
) -> Float[Tensor, " weights"]:
    """How much each weight of a generator matters: the mean square of its adversarial loss's gradient, over samples.

    Args:
        synthesis: the generator, in eval mode if it has batch normalisation.
        discriminator: maps images to scores, (batch,) or (batch, 1).
        z: latent vectors; the authors take 32.

    Returns:
        A number for each weight, in the order of `synthesis.parameters()`.

    Raises:
        ValueError: as `per_sample_gradients`.

    Example:
        >>> generator_fisher(nn.Linear(3, 2), nn.Linear(2, 1), torch.zeros(4, 3)).shape
        torch.Size([8])
    """
    if problem := tensor_problem(z=z):
        raise TypeError(problem)
    return per_sample_gradients(_Fooling(synthesis, frozen_copy(discriminator)), z).square().mean(0)


class _Fooling(nn.Module):
    """The generator's loss of each latent vector."""

    def __init__(self, synthesis: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.synthesis, self.discriminator = synthesis, discriminator

    def forward(self, z: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(self.synthesis(z)).reshape(len(z)))


class ElasticPenalty(nn.Module):
    r"""Holds a network near where it started, as far as its weights matter: $\lambda \sum_j F_j (\theta_j -
    \theta_{0,j})^2$.

    From "Overcoming catastrophic forgetting in neural networks" (EWC), arXiv 1612.00796.

    Args:
        start: the network as it is now; its weights are held as a buffer.
        importance: F, a number for each weight, as of `generator_fisher`.
        weight: lambda, not negative.

    Raises:
        ValueError: there are not as many numbers as weights, one is negative or not finite, or `weight` is negative.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> penalty = ElasticPenalty(model, torch.tensor([1.0, 10.0]), weight=2.0)
        >>> _ = model.weight.data.add_(torch.tensor([[1.0, 0.5]]))
        >>> round(penalty(model).item(), 4)
        7.0
    """

    start: Tensor
    importance: Tensor

    def __init__(self, start: nn.Module, importance: Float[Tensor, " weights"], weight: float = 1.0) -> None:
        super().__init__()
        if problem := tensor_problem(importance=importance):
            raise TypeError(problem)
        self.weight = non_negative("weight", weight)
        flat = nn.utils.parameters_to_vector(start.parameters()).detach().clone()
        if importance.shape != flat.shape:
            raise ValueError(f"importance must be {len(flat)} numbers, got shape {tuple(importance.shape)}")
        if not all_finite(importance) or bool((importance < 0).any()):
            raise ValueError("importance must be finite and at least 0, got other numbers")
        self.register_buffer("start", flat)
        self.register_buffer("importance", importance.detach().clone())

    def forward(self, model: nn.Module) -> Tensor:
        """The penalty of a network of the same weights.

        Raises:
            ValueError: it has others.
        """
        flat = nn.utils.parameters_to_vector(model.parameters())
        if flat.shape != self.start.shape:
            raise ValueError(f"model must have {len(self.start)} weights, got {len(flat)}")
        return self.weight * (self.importance * (flat - self.start).square()).sum()


class AdaptThenUnlearn:
    """Trains a GAN on marked samples, with the logistic loss, R1 and a penalty on the generator's weights.

    A training rule for your own loop, for both stages: first on undesired samples with an `ElasticPenalty`, then, from
    the original weights of both networks, on the others with a `RepulsionLoss`. Networks and optimizers are yours.

    Args:
        synthesis: the generating network, called `synthesis(z)`.
        discriminator: maps images to scores.
        optimizers: of the two, in this order.
        latent_dim: length of z, which is standard normal.
        penalty: maps the generating network to a scalar that is added to its loss; None for plain fine-tuning.
        r1: weight of the squared gradient of the scores of real images, halved; 0 switches it off.
        r1_every: it is taken at each so manieth step, and counts so many times.
        generator: draws z.

    Raises:
        ValueError: a number is out of range, or there are not two optimizers.

    Example:
        >>> synthesis, discriminator = nn.Linear(3, 5), nn.Linear(5, 1)
        >>> undesired, others = torch.randn(8, 5), torch.randn(8, 5)
        >>> def rule(network, critic, penalty):
        ...     optimizers = [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (network, critic)]
        ...     return AdaptThenUnlearn(network, critic, optimizers, 3, penalty=penalty)
        >>> elastic = ElasticPenalty(synthesis, generator_fisher(synthesis, discriminator, torch.randn(32, 3)))
        >>> adapted = copy.deepcopy(synthesis)
        >>> _ = rule(adapted, copy.deepcopy(discriminator), elastic).step(undesired)
        >>> sorted(rule(synthesis, discriminator, RepulsionLoss([adapted])).step(others))
        ['discriminator', 'generator', 'penalty']
    """

    def __init__(
        self,
        synthesis: nn.Module,
        discriminator: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        latent_dim: int,
        *,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        r1: float = 10.0,
        r1_every: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        self.optimizers = list(optimizers)
        if len(self.optimizers) != 2:
            raise ValueError(f"optimizers must be two, the generating network's first, got {len(self.optimizers)}")
        self.synthesis, self.discriminator = synthesis, discriminator
        self.latent_dim = integer("latent_dim", latent_dim)
        self.penalty = penalty
        self.r1 = non_negative("r1", r1)
        self.r1_every = integer("r1_every", r1_every)
        self.generator = generator
        self.steps_done = 0

    def step(
        self, x: Float[Tensor, "batch ..."], *, z: Float[Tensor, "2 batch latent"] | None = None
    ) -> dict[str, Tensor]:
        """One step of the discriminator, then one of the generating network.

        Args:
            x: marked samples, which take the place of real images.
            z: latent vectors of the two steps; drawn by default.

        Returns:
            The losses, detached: "discriminator" without R1, "generator" without the penalty, and "penalty".

        Raises:
            TypeError: `x` is not floating point.
            ValueError: there are no samples, or `z` has another shape.
        """
        x = floating_tensor("x", x)
        if not len(x):
            raise ValueError("x must be one sample or more, got none")
        wanted = (2, len(x), self.latent_dim)
        if z is not None and tuple(z.shape) != wanted:
            raise ValueError(f"z must have shape {wanted}, got {tuple(z.shape)}")
        if z is None:
            z = torch.randn(wanted, generator=self.generator, dtype=x.dtype).to(x.device)
        own, other = self.optimizers
        with torch.no_grad():
            fake = self.synthesis(z[0])
        loss_d = F.softplus(self.discriminator(fake)).mean() + F.softplus(-self.discriminator(x)).mean()
        total = loss_d
        if self.r1 and self.steps_done % self.r1_every == 0:
            total = loss_d + self.r1_every * self.r1 / 2 * gradient_penalty(self.discriminator, x)
        other.zero_grad()
        total.backward()
        other.step()

        loss_g = F.softplus(-self.discriminator(self.synthesis(z[1]))).mean()
        penalty = loss_g.new_zeros(()) if self.penalty is None else self.penalty(self.synthesis)
        trained = [p for group in own.param_groups for p in group["params"] if p.requires_grad]
        # Only the generating network's gradients: the discriminator's step needs none of them.
        gradients = torch.autograd.grad(loss_g + penalty, trained, allow_unused=True)
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        own.step()
        self.steps_done += 1
        return {"discriminator": loss_d.detach(), "generator": loss_g.detach(), "penalty": penalty.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers, the count of steps and the generator of randomness, without the penalty."""
        return {
            "synthesis": self.synthesis.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "steps_done": self.steps_done,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was called; a state that does not fit is refused and changes nothing.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state is another rule's or of other networks.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        self.synthesis.load_state_dict(state["synthesis"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.steps_done = integer("steps_done", state["steps_done"], 0)
        if self.generator is not None:
            self.generator.set_state(state["generator"])


@torch.enable_grad()
def gradient_penalty(discriminator: nn.Module, x: Float[Tensor, "batch ..."]) -> Tensor:
    """The squared gradient of scores with respect to real images, summed over an image, mean over images (R1).

    Example:
        >>> critic = nn.Linear(2, 1)
        >>> _ = critic.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> gradient_penalty(critic, torch.zeros(5, 2)).item()
        25.0
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not len(x):
        raise ValueError("x must be at least one image, got an empty batch")
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def _shape(held: dict[str, nn.Parameter], name: str) -> torch.Size | None:
    return held[name].shape if name in held else None


def _distance(own: Iterable[Tensor], stacks: Iterable[Tensor]) -> Tensor:
    """Mean over tensors and references of the mean squared difference."""
    return torch.stack([(p - stack).square().mean() for p, stack in zip(own, stacks, strict=True)]).mean()

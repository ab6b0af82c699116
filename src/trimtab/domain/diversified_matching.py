r"""Diversified distribution matching: learns an unpaired translation between domains that is the right one.

For translating between two domains (photos and sketches, say) without pairs, where matching the domains as a whole, as
CycleGAN does, may find a wrong map that matches just as well: any map of a domain to itself that keeps its distribution
(a measure-preserving automorphism) can be slipped in between. If both domains have a label in common (a class, say),
one translator is asked to match the distribution of every label's samples; an automorphism that keeps all of them at
once hardly exists if they differ enough. The label chooses the critic and is never shown to the translator.

$$
\min_{g, h} \max_{d}\ \frac{1}{K} \sum_{k=1}^{K} \Bigl[
\mathrm{GAN}_k\bigl(g_\# p_{x \mid k},\ p_{y \mid k}\bigr) + \mathrm{GAN}_k\bigl(h_\# p_{y \mid k},\ p_{x \mid k}\bigr)
\Bigr] + \lambda\, \mathbb{E}\bigl[ \| h(g(x)) - x \|^2 + \| g(h(y)) - y \|^2 \bigr]
$$

with a critic of its own for every label $k$ and direction. By one label alone it is CycleGAN. Beside the least-squares
GAN of the paper's synthetic experiments and the non-saturating one of its images there is `gan="energy"`, which
compares samples by energy distance and needs no critics: the same idea without the minima of adversarial training.

The authors' synthetic code takes sums over a label's samples where the formula has means, so that the cycle weighs
less by the size of the batch; here they are means, by which a label that is more frequent in one domain than in the
other needs no weights either, as their image code gives it.

Reference: Sagar Shrestha and Xiao Fu, "Towards Identifiable Unsupervised Domain Translation: A Diversified Distribution
Matching Approach", ICLR 2024, arXiv 2401.09671.
"""

from __future__ import annotations

from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    floating_tensor,
    indices,
    integer,
    looked_at,
    non_negative,
    one_of,
    real_problem,
)
from trimtab.ops.whole_state import WholeState

GAN = Literal["lsgan", "nsgan", "energy"]


def mean_by_condition(
    values: Float[Tensor, " batch"], conditions: Int[Tensor, " batch"], num_conditions: int
) -> Float[Tensor, " conditions"]:
    """The mean of the values of each condition; zero where there is none.

    Raises:
        TypeError: `values` is not floating point, `conditions` not int64, or `num_conditions` no integer.
        ValueError: they are not vectors of one length, or a condition is out of range.

    Example:
        >>> mean_by_condition(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
        tensor([2., 0., 5.])
    """
    if problem := real_problem(values=values):
        raise TypeError(problem)
    if not values.is_floating_point() or conditions.dtype != torch.int64:
        raise TypeError(f"values must be floating point and conditions int64, got {values.dtype}, {conditions.dtype}")
    if values.ndim != 1 or conditions.shape != values.shape:
        raise ValueError(
            "values and conditions must be vectors of one length, got "
            f"{tuple(values.shape)} and {tuple(conditions.shape)}"
        )
    if not isinstance(num_conditions, int | Integral):
        raise TypeError(f"num_conditions must be an integer, got {num_conditions!r}")
    if not _known(conditions, num_conditions):
        raise ValueError(f"conditions must be in [0, {num_conditions}), got others")
    total = values.new_zeros(num_conditions).index_add(0, conditions, values)
    return total / conditions.bincount(minlength=num_conditions)[:num_conditions].clamp_min(1)


def conditional_energy_distance(
    a: Float[Tensor, "n ..."],
    b: Float[Tensor, "m ..."],
    a_conditions: Int[Tensor, " n"],
    b_conditions: Int[Tensor, " m"],
    num_conditions: int,
) -> Float[Tensor, " conditions"]:
    """For each condition the energy distance of its samples in `a` from those in `b`: 2 E|a-b| - E|a-a'| - E|b-b'|.

    Expectations are over all pairs, also of a sample with itself, so that none is negative; zero where one side has no
    sample.

    Args:
        a, b: samples of two sets, of one shape.
        a_conditions, b_conditions: the condition of each.
        num_conditions: how many conditions there are.

    Raises:
        TypeError: samples are not floating point, conditions not int64, or `num_conditions` is no integer.
        ValueError: samples differ in shape, there is not one condition a sample, or one is out of range.

    Example:
        >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])
        >>> conditional_energy_distance(a, b, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
        tensor([6., 0.])
    """
    if problem := real_problem(a=a, b=b, a_conditions=a_conditions, b_conditions=b_conditions):
        raise TypeError(problem)
    if not (a.is_floating_point() and b.is_floating_point()):
        raise TypeError(f"a and b must be floating point, got {a.dtype} and {b.dtype}")
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a and b must be samples of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a_conditions.dtype != torch.int64 or b_conditions.dtype != torch.int64:
        raise TypeError(f"conditions must be int64, got {a_conditions.dtype} and {b_conditions.dtype}")
    if a_conditions.shape != a.shape[:1] or b_conditions.shape != b.shape[:1]:
        raise ValueError(
            f"conditions must be one a sample, ({len(a)},) and ({len(b)},), got "
            f"{tuple(a_conditions.shape)} and {tuple(b_conditions.shape)}"
        )
    if not isinstance(num_conditions, int | Integral):
        raise TypeError(f"num_conditions must be an integer, got {num_conditions!r}")
    if not (_known(a_conditions, num_conditions) and _known(b_conditions, num_conditions)):
        raise ValueError(f"conditions must be in [0, {num_conditions}), got others")
    a, b = floating_tensor("a", a).flatten(1), floating_tensor("b", b).flatten(1)
    ours = F.one_hot(a_conditions, num_conditions).to(a)
    theirs = F.one_hot(b_conditions, num_conditions).to(b)
    both = ((ours.sum(0) > 0) & (theirs.sum(0) > 0)).to(a)
    ours, theirs = ours / ours.sum(0).clamp_min(1), theirs / theirs.sum(0).clamp_min(1)
    across = torch.einsum("ik,ij,jk->k", ours, _distances(a, b), theirs)
    within = torch.einsum("ik,ij,jk->k", ours, _distances(a, a), ours)
    between = torch.einsum("ik,ij,jk->k", theirs, _distances(b, b), theirs)
    return both * (2 * across - within - between)


def _known(conditions: Tensor, num_conditions: int) -> bool:
    """Whether conditions are in range, as far as they may be looked at."""
    return not looked_at(conditions) or bool(((conditions >= 0) & (conditions < num_conditions)).all())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Of a sample from itself the distance is exactly zero, and so is its gradient there.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


class DiversifiedTranslator(WholeState, nn.Module):
    """Two translators, and the losses of theirs and of their critics.

    Critics score a batch of their domain for every condition at once: a network with `num_conditions` outputs, or a
    `ConditionCritics` of one network each. In the user's loop, critics first:

        critic_loss = rule.discriminator_loss(x, u, y, v)
        generator_loss = rule.generator_loss(x, u, y, v)

    each with an optimizer of its own, over `critics()` and `translators()`.

    Args:
        g12: from the first domain to the second.
        g21: back.
        d1: critic of the first domain, samples to (batch, num_conditions); None for `gan="energy"`.
        d2: critic of the second domain.
        num_conditions: how many labels there are; 1 is CycleGAN.
        cycle_weight: weight of the cycles, the authors' 10.
        gan: "lsgan" (least squares), "nsgan" (non-saturating) or "energy" (energy distance, no critics).
        cycle: "l2" as in the formula, or "l1" as for images.
        r1: for "nsgan", weight of the critics' squared gradient at real samples, halved; the authors' 1 for images.

    Raises:
        ValueError: a number is out of its range, critics are missing, or given where none is used.

    Example:
        >>> g, h = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> rule = DiversifiedTranslator(g, h, nn.Linear(2, 3), nn.Linear(2, 3), num_conditions=3)
        >>> x, y, u = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6) % 3
        >>> sorted(rule.generator_loss(x, u, y, u))
        ['cycle', 'match', 'total']
    """

    def __init__(
        self,
        g12: nn.Module,
        g21: nn.Module,
        d1: nn.Module | None = None,
        d2: nn.Module | None = None,
        *,
        num_conditions: int,
        cycle_weight: float = 10.0,
        gan: GAN = "lsgan",
        cycle: Literal["l1", "l2"] = "l2",
        r1: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_conditions = integer("num_conditions", num_conditions)
        self.cycle_weight = non_negative("cycle_weight", cycle_weight)
        self.gan: GAN = one_of("gan", gan, get_args(GAN))
        self.cycle = one_of("cycle", cycle, ("l1", "l2"))
        self.r1 = non_negative("r1", r1)
        if (gan == "energy") != (d1 is None) or (d1 is None) != (d2 is None):
            given = sum(critic is not None for critic in (d1, d2))
            raise ValueError(f"d1 and d2 must both be given, or neither for gan='energy', got {given} with {gan!r}")
        self.g12, self.g21, self.d1, self.d2 = g12, g21, d1, d2

    def translators(self) -> list[nn.Parameter]:
        """Weights of both translators."""
        return [*self.g12.parameters(), *self.g21.parameters()]

    def critics(self) -> list[nn.Parameter]:
        """Weights of both critics."""
        return [p for critic in (self.d1, self.d2) if critic is not None for p in critic.parameters()]

    def discriminator_loss(
        self,
        x: Float[Tensor, "n ..."],
        u: Int[Tensor, " n"],
        y: Float[Tensor, "m ..."],
        v: Int[Tensor, " m"],
    ) -> dict[str, Tensor]:
        """The critics' loss, `total`, and its two parts `first` and `second`; translations are detached.

        Args:
            x: samples of the first domain.
            u: their labels.
            y: samples of the second domain, not paired with `x`.
            v: their labels.

        Raises:
            RuntimeError: there are no critics.
            TypeError: samples are not floating point, or labels not int64.
            ValueError: lengths differ, a batch is empty, or a label is out of range.
        """
        if self.d1 is None or self.d2 is None:
            raise RuntimeError("DiversifiedTranslator: with gan='energy' there are no critics to train")
        self._check(x, u, y, v)
        with torch.no_grad():
            there, back = self.g12(x), self.g21(y)
        first = self._critic_loss(self.d1, x, u, back, v)
        second = self._critic_loss(self.d2, y, v, there, u)
        return {"total": first + second, "first": first, "second": second}

    def _critic_loss(self, critic: nn.Module, real: Tensor, k: Tensor, fake: Tensor, j: Tensor) -> Tensor:
        if self.r1:
            real = real.detach().requires_grad_()
        on_real, on_fake = _own(critic(real), k), _own(critic(fake), j)
        if self.gan == "lsgan":
            return self._summed((on_real - 1).square(), k) + self._summed(on_fake.square(), j)
        loss = self._summed(F.softplus(-on_real), k) + self._summed(F.softplus(on_fake), j)
        if self.r1:
            (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            loss = loss + self.r1 / 2 * slope.flatten(1).square().sum(1).mean()
        return loss

    def generator_loss(
        self,
        x: Float[Tensor, "n ..."],
        u: Int[Tensor, " n"],
        y: Float[Tensor, "m ..."],
        v: Int[Tensor, " m"],
    ) -> dict[str, Tensor]:
        """The translators' loss, `total`, and its parts: `match` (over K, as in the formula) and `cycle`.

        Arguments and errors are those of `discriminator_loss`.
        """
        self._check(x, u, y, v)
        there, back = self.g12(x), self.g21(y)
        distance = F.mse_loss if self.cycle == "l2" else F.l1_loss
        cycle = distance(self.g21(there), x) + distance(self.g12(back), y)
        if self.d1 is None or self.d2 is None:
            match = (
                conditional_energy_distance(there, y, u, v, self.num_conditions)
                + conditional_energy_distance(back, x, v, u, self.num_conditions)
            ).sum()
        else:
            scores = ((_own(self.d2(there), u), u), (_own(self.d1(back), v), v))
            believed = (lambda s: (s - 1).square()) if self.gan == "lsgan" else (lambda s: F.softplus(-s))
            match = sum((self._summed(believed(s), k) for s, k in scores), start=x.new_zeros(()))
        match = match / self.num_conditions
        return {"total": match + self.cycle_weight * cycle, "match": match, "cycle": cycle}

    def _summed(self, values: Tensor, conditions: Tensor) -> Tensor:
        return mean_by_condition(values, conditions, self.num_conditions).sum()

    def _check(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> None:
        for name, samples, label_name, labels in (("x", x, "u", u), ("y", y, "v", v)):
            floating_tensor(name, samples)
            class_indices(label_name, labels)
            if len(samples) == 0 or labels.shape != samples.shape[:1]:
                raise ValueError(
                    f"{name} and {label_name} must be as many samples and labels, at least one, "
                    f"got {tuple(samples.shape)} and {tuple(labels.shape)}"
                )
            indices(label_name, labels, self.num_conditions)


def _own(scores: Tensor, conditions: Tensor) -> Tensor:
    """Each sample's score by the critic of its condition, (batch,)."""
    if scores.ndim != 2:
        raise ValueError(f"critics must give scores of shape (batch, num_conditions), got {tuple(scores.shape)}")
    return floating_tensor("scores", scores).gather(1, conditions[:, None])[:, 0]


class ConditionCritics(nn.ModuleList):
    """One critic for each condition, each from samples to one score, side by side.

    Example:
        >>> ConditionCritics([nn.Linear(2, 1) for _ in range(3)])(torch.zeros(4, 2)).shape
        torch.Size([4, 3])
    """

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch conditions"]:
        """Scores of all critics."""
        return torch.cat([critic(x).flatten(1) for critic in self], 1)


@torch.no_grad()
def translation_error(
    g12: nn.Module, g21: nn.Module, x: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]
) -> Float[Tensor, ""]:
    """Mean squared error of both translations on pairs, which training does not have: half their sum.

    Args:
        g12, g21: the translators.
        x: samples of the first domain.
        y: what each of them is in the second.

    Raises:
        ValueError: there are not as many of both, or none.

    Example:
        >>> translation_error(nn.Identity(), nn.Identity(), torch.zeros(3, 2), torch.ones(3, 2))
        tensor(1.)
    """
    if problem := real_problem(x=x, y=y):
        raise TypeError(problem)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be as many samples, at least one, got {len(x)} and {len(y)}")
    return (F.mse_loss(g12(x), y) + F.mse_loss(g21(y), x)) / 2

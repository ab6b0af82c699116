r"""Hessian alignment: the head's gradient, and its Hessian seen through one product, are made alike in all domains.

For training on several domains whose shortcuts differ. A head that has the same slope and the same curvature
everywhere rests on what the domains share; the term is added to the mean loss with a weight that usually rises after
some training. With the head's parameters $\varphi$, the domains' losses $\ell_d$ and their mean $\bar\ell$,

$$
g_d = \nabla_\varphi \ell_d, \qquad h_d = \nabla^2_\varphi \ell_d\, g_d = \nabla_\varphi \tfrac12 \|g_d\|^2, \qquad
\mathcal{P} = \frac1E \sum_{d=1}^E \alpha\, \| h_d - \bar h \|^2 + \beta\, \| g_d - \bar g \|^2 ,
$$

where $\bar g$ and $\bar h$ are those of $\bar\ell$, held constant. `HGPPenalty` uses the Hessian-gradient product $h$,
`HutchinsonPenalty` in its place the Hessian's diagonal, estimated from random signs, $\mathbb{E}\, z \odot (H_d z)$.
Without the first term ($\alpha = 0$) gradients alone are matched. The spectral norm of the difference of two domains'
head Hessians, `hessian_distance`, is the paper's bound on how far the head's excess loss in one domain carries over
to the other.

Reference: Sobhan Hemati, Guojun Zhang, Amir Estiri and Xi Chen, "Understanding Hessian Alignment for Domain
Generalization", ICCV 2023, arXiv 2308.11778. In its experiment on coloured digits the authors' code does not hold the
means constant (`detach_mean=False`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.domain.head_gradients import head_hessian
from trimtab.ops.arguments import integer, non_negative, real_problem

Head = nn.Module | Iterable[Tensor]


def hessian_gradient_product(loss: Float[Tensor, ""], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r"""$H g$ of a scalar loss, from one more differentiation: the gradient of $\tfrac12 \|g\|^2$; differentiable.

    Args:
        loss: a scalar with its graph.
        params: what gradient and Hessian are taken in.

    Raises:
        TypeError: `params` is no sequence of tensors, or `loss` no real tensor.
        ValueError: `loss` is no scalar with a graph, `params` is empty, or one of them takes no gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_gradient_product((x**3).sum(), [x])[0].tolist()  # 6 x times 3 x squared
        [18.0, 144.0]
    """
    if problem := real_problem(loss=loss):
        raise TypeError(problem)
    if isinstance(params, Tensor) or not isinstance(params, Sequence):
        raise TypeError(f"params must be a list of tensors, got {type(params).__name__}")
    if not all(p.requires_grad for p in params):
        raise ValueError("params must all require a gradient, got some that do not")
    return _product(_gradient(_checked_losses([loss])[0], _checked_params(params)), list(params))


def hutchinson_diagonal(
    loss: Float[Tensor, ""],
    params: Sequence[Tensor],
    probes: int = 50,
    *,
    generator: torch.Generator | None = None,
    signs: Float[Tensor, "probes parameters"] | None = None,
) -> Float[Tensor, " parameters"]:
    r"""The Hessian's diagonal, estimated as the mean of $z \odot (H z)$ over random signs $z$; differentiable.

    Unbiased, and exact with one probe where the Hessian is diagonal. All probes are one batched differentiation.

    Args:
        loss: a scalar with its graph.
        params: what the Hessian is taken in, flattened one after the other.
        probes: how many vectors of signs are drawn.
        generator: decides the signs; on the CPU.
        signs: the vectors themselves, in place of drawn ones.

    Raises:
        TypeError: `params` is a single tensor, `loss` no real tensor, `signs` no tensor, or `probes` no integer.
        ValueError: `loss` is no scalar with a graph, params is empty, `probes` is not positive or `signs` has another
            width.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hutchinson_diagonal((x**3).sum(), [x], probes=1).tolist()
        [6.0, 12.0]
    """
    if problem := real_problem(loss=loss):
        raise TypeError(problem)
    if not isinstance(probes, int | Integral):
        raise TypeError(f"probes must be an integer, got {probes!r}")
    params = _checked_params(params)
    gradient = _gradient(_checked_losses([loss])[0], params)
    return _diagonal(gradient, params, _signs(gradient, probes, generator, signs))


def hessian_distance(
    features: Float[Tensor, "batch dim"],
    logits: Float[Tensor, "batch classes"],
    other_features: Float[Tensor, "other dim"],
    other_logits: Float[Tensor, "other classes"],
) -> Float[Tensor, ""]:
    """The spectral norm of the difference of the head's Hessians in two domains, exactly.

    Args:
        features, logits: of samples of the one domain.
        other_features, other_logits: of the other, under the same head.

    Raises:
        ValueError: the shapes do not fit, or a domain is empty.

    Example:
        >>> z = torch.tensor([[0.0], [2.0]])
        >>> hessian_distance(z, torch.zeros(2, 2), z, torch.zeros(2, 2)).item()
        0.0
    """
    if problem := real_problem(other_features=other_features, other_logits=other_logits):
        raise TypeError(problem)
    first, second = head_hessian(features, logits), head_hessian(other_features, other_logits)
    if first.shape != second.shape:
        raise ValueError(
            "other_features and other_logits must be as wide as features and logits, got "
            f"{tuple(other_features.shape)} and {tuple(other_logits.shape)}"
        )
    curvatures: Tensor = torch.linalg.eigvalsh(first - second)
    return curvatures.abs().amax()


class HGPPenalty(nn.Module):
    """Alignment of the head's gradients and Hessian-gradient products, called as `penalty(losses, head)`.

    Args:
        alpha: weight of the products' distances.
        beta: weight of the gradients' distances.
        detach_mean: whether the domains' means are constants, as in the paper.

    Raises:
        ValueError: a weight is negative.

    Example:
        >>> features, head = nn.Linear(4, 3), nn.Linear(3, 2)
        >>> domains = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(2)]
        >>> losses = [nn.functional.cross_entropy(head(features(x)), y) for x, y in domains]
        >>> penalty = HGPPenalty(alpha=1.0, beta=1.0)(losses, head)
        >>> (sum(losses) / 2 + penalty).backward()
    """

    def __init__(self, alpha: float = 1e-4, beta: float = 5e-3, *, detach_mean: bool = True) -> None:
        super().__init__()
        self.alpha, self.beta = non_negative("alpha", alpha), non_negative("beta", beta)
        self.detach_mean = detach_mean

    def forward(self, losses: Sequence[Float[Tensor, ""]], head: Head) -> Float[Tensor, ""]:
        """The penalty of a batch.

        Args:
            losses: the mean loss of each domain, scalars with their graph.
            head: the classifier's last layer, or its parameters.

        Raises:
            TypeError: `head` is a single tensor.
            ValueError: there is no loss, one is not a scalar with a graph, or the head has nothing to train.
        """
        params = _checked_params(head)
        slopes = [_gradient(loss, params) for loss in _checked_losses(losses)]
        mean = [torch.stack(parts).mean(0) for parts in zip(*slopes, strict=True)]
        penalty = self.beta * self._apart(slopes, mean)
        if self.alpha:
            penalty = penalty + self.alpha * self._curvature(slopes, mean, params)
        return penalty

    def _curvature(self, slopes: list[Slopes], mean: Slopes, params: list[Tensor]) -> Tensor:
        """How far the Hessians are apart, as this penalty sees them."""
        return self._apart([_product(slope, params) for slope in slopes], _product(mean, params))

    def _apart(self, parts: Sequence[Sequence[Tensor]], mean: Sequence[Tensor]) -> Tensor:
        """The domains' mean squared distance from the mean, summed over parameters."""
        centre = [m.detach() if self.detach_mean else m for m in mean]
        distances = [sum_of_squares([a - b for a, b in zip(part, centre, strict=True)]) for part in parts]
        return torch.stack(distances).mean()


class HutchinsonPenalty(HGPPenalty):
    """Alignment of the head's gradients and of its Hessian's diagonal, called as `penalty(losses, head)`.

    All domains are probed with the same signs, so that equal domains cost nothing.

    Args:
        alpha: weight of the diagonals' distances.
        beta: weight of the gradients' distances.
        probes: vectors of signs in an estimate; the authors draw 300.
        detach_mean: whether the domains' means are constants, as in the paper.
        generator: decides the signs; on the CPU.

    Raises:
        ValueError: a weight is negative or `probes` is not positive.

    Example:
        >>> features, head = nn.Linear(4, 3), nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> losses = [nn.functional.cross_entropy(head(features(x)), y)] * 2
        >>> HutchinsonPenalty(probes=2)(losses, head).item()  # the domains are the same
        0.0
    """

    def __init__(
        self,
        alpha: float = 1e-3,
        beta: float = 5e-3,
        probes: int = 50,
        *,
        detach_mean: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(alpha, beta, detach_mean=detach_mean)
        self.probes, self.generator = integer("probes", probes), generator

    def _curvature(self, slopes: list[Slopes], mean: Slopes, params: list[Tensor]) -> Tensor:
        signs = _signs(mean, self.probes, self.generator, None)
        diagonals = [[_diagonal(slope, params, signs)] for slope in slopes]
        return self._apart(diagonals, [torch.cat([d for (d,) in diagonals]).view(len(slopes), -1).mean(0)])


Slopes = Sequence[Tensor]


def sum_of_squares(parts: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Over all entries of all tensors, in float32 at least."""
    return torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)).square().sum() for p in parts]).sum()


def _gradient(loss: Tensor, params: list[Tensor]) -> Slopes:
    return torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)


def _product(slope: Slopes, params: list[Tensor]) -> tuple[Tensor, ...]:
    if not any(g.requires_grad for g in slope):  # the loss is linear in the head
        return tuple(torch.zeros_like(p) for p in params)
    return torch.autograd.grad(0.5 * sum_of_squares(slope), params, create_graph=True, materialize_grads=True)


def _diagonal(slope: Slopes, params: list[Tensor], signs: Tensor) -> Tensor:
    if not any(g.requires_grad for g in slope):
        return torch.cat([torch.zeros_like(p).flatten() for p in params])
    flat = torch.cat([g.flatten() for g in slope])
    found = torch.autograd.grad(
        flat, params, signs.to(flat), is_grads_batched=True, create_graph=True, allow_unused=True
    )
    # The loss may be linear in a parameter; torch's own zeros would lack the probes.
    products = [p.new_zeros(len(signs), *p.shape) if h is None else h for h, p in zip(found, params, strict=True)]
    return (signs.to(flat) * torch.cat([h.reshape(len(signs), -1) for h in products], 1)).mean(0)


def _signs(slope: Slopes, probes: int, generator: torch.Generator | None, given: Tensor | None) -> Tensor:
    width = sum(g.numel() for g in slope)
    if given is not None and not isinstance(given, Tensor):
        raise TypeError(f"signs must be a tensor, got {type(given).__name__}")
    if given is not None:
        if given.ndim != 2 or given.shape[1] != width or len(given) == 0:
            raise ValueError(f"signs must have shape (probes, {width}), got {tuple(given.shape)}")
        return given
    integer("probes", probes)
    return torch.randint(2, (probes, width), generator=generator).float() * 2 - 1


def _checked_losses(losses: Sequence[Tensor]) -> list[Tensor]:
    held = list(losses)
    if not held:
        raise ValueError("losses must hold at least one domain's loss, got none")
    for loss in held:
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
            shown = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"losses must be scalars with a graph, got {shown}")
    return held


def _checked_params(head: Head) -> list[Tensor]:
    if isinstance(head, Tensor):
        raise TypeError("head must be a module or its parameters, got a single tensor")
    params = [p for p in (head.parameters() if isinstance(head, nn.Module) else head) if p.requires_grad]
    if not params:
        raise ValueError("head must have at least one parameter that requires a gradient, got none")
    return params

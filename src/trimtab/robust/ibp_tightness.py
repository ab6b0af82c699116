r"""How tight interval bounds are: the box that a network really makes of a small box, over the one that is propagated.

Interval bound propagation (IBP) bounds a network layer by layer and forgets, at each, which corners belong together.
`propagation_tightness` measures what that costs, in the network's linearisation at an input: 1 where nothing is lost.
Certified training by interval bounds (`IBPLoss`) makes networks tight, at the price of a strong regularisation; this
module measures, predicts (`expected_tightness`) and characterises it (`is_propagation_invariant`).

$$
\tau = \frac{|C W_L D_{L-1} W_{L-1} \cdots D_1 W_1|\, r}{|C W_L|\, D_{L-1} |W_{L-1}| \cdots D_1 |W_1|\, r}
$$

with $r$ the radius of the input box, $D_l$ the pattern of active units and $C$ the margins asked about. For Gaussian
linear networks whose hidden layers are all $w$ wide, the ratio of both expectations is

$$
\Bigl( \frac{\sqrt{\pi}\, \Gamma((w + 1)/2)}{w\, \Gamma(w/2)} \Bigr)^{L - 1}
\approx \Bigl( \frac{\pi}{2w} \Bigr)^{(L-1)/2} .
$$

Bounds of a network themselves are `trimtab.ops.intervals.propagate`.

Reference: Yuhao Mao, Mark Niklas Müller, Marc Fischer, Martin Vechev, "Understanding Certified Training with Interval
Bound Propagation", ICLR 2024, arXiv 2306.10426. The loss is that of Gowal et al., arXiv 1810.12715.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import (
    class_indices,
    finite_tensor,
    in_range,
    integer,
    labels,
    looked_at,
    non_negative,
    one_of,
    out_of_reach,
    positive,
    real_problem,
)
from trimtab.ops.attack import eval_mode
from trimtab.ops.intervals import Interval, Linearised, box_around, margin_rows, propagate
from trimtab.ops.whole_state import WholeState
from trimtab.robust.bounds import in_order

_FLOOR = 1e-8


def propagation_tightness(
    model: nn.Module,
    x: Float[Tensor, "batch ..."],
    eps: float,
    targets: Int[Tensor, " batch"] | None = None,
    *,
    relu: str | None = "local",
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Float[Tensor, "batch outputs"]:
    """The tightness of interval bounds around inputs, in (0, 1], for each margin or each output.

    The model is looked at in eval mode. What takes most of the time is a backward pass for each output.

    Args:
        model: of linear and convolution layers, ReLU or LeakyReLU, batch normalisation, average pooling, sums.
        x: inputs.
        eps: radius of the box, positive.
        targets: labels, for the margins of the target over all other classes; None for the outputs themselves.
        relu: "local" takes the units that are active at `x` (those at 0 count as active); None leaves activations out.
        bounds: smallest and largest value of an input, at which the box is cut off; None for any.

    Returns:
        One number for each sample and each output, or each other class. An output whose box has no width at all has 1.

    Raises:
        NotImplementedError: the model has a layer of another kind.
        TypeError: `x` is not floating point.
        ValueError: `eps` is not positive, `x` is empty or not finite, labels do not fit, `bounds` are not two
            numbers in order, or an input is outside of them by more than `eps`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]])), model[1].weight.copy_(
        ...         torch.tensor([[2.0, -1.0]])
        ...     )
        >>> propagation_tightness(model, torch.tensor([[0.5, 0.5]]), 0.1)  # |[1, -1]| over [2, 1] |W_1| = [3, 1]
        tensor([[0.5000]])
    """
    positive("eps", eps)
    one_of("relu", relu, ("local", None))
    if bounds is not None and not in_order(bounds):
        raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
    x = finite_tensor("x", x, floating=True).detach()
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    radius = box_around(x, eps, bounds).radius
    with eval_mode(model), torch.enable_grad():
        point = x.requires_grad_(True)
        if targets is None:
            spec = None
        else:
            with torch.no_grad():
                classes = propagate(model, Linearised(x, radius, relu is not None)).centre.shape[1]
            spec = margin_rows(labels("targets", targets, classes, len(x)).to(x.device), classes).to(x.dtype)
        walked = propagate(model, Linearised(point, radius, relu is not None), spec)
        out = walked.centre.flatten(1)
        rows = [torch.autograd.grad(out[:, k].sum(), point, retain_graph=True)[0] for k in range(out.shape[1])]
    exact = (torch.stack(rows, dim=1).abs() * radius[:, None]).flatten(2).sum(2)
    propagated = walked.radius.detach().flatten(1)
    # Sums in different orders may leave an exact bound a little above the propagated one.
    return (exact.clamp_min(_FLOOR) / propagated.clamp_min(_FLOOR)).clamp(max=1.0)


def expected_tightness(width: int, depth: int = 2) -> float:
    """Tightness of a Gaussian linear network before training, as the ratio of both radii's expectations.

    It holds at every width, not only for wide networks: given the layers above, each row is Gaussian again. A mean of
    the ratios themselves comes out a little different.

    Args:
        width: units of each hidden layer.
        depth: number of linear layers.

    Raises:
        ValueError: `width` or `depth` is not positive.

    Example:
        >>> [round(expected_tightness(width), 4) for width in (1, 2, 100)]
        [1.0, 0.7854, 0.125]
    """
    w, layers = integer("width", width), integer("depth", depth)
    log_ratio = 0.5 * math.log(math.pi) + math.lgamma((w + 1) / 2) - math.log(w) - math.lgamma(w / 2)
    return math.exp((layers - 1) * log_ratio)


def is_propagation_invariant(weights: Sequence[Float[Tensor, "rows columns"]], *, tol: float = 1e-6) -> bool:
    """Whether interval bounds of a linear network are exact: `|W_L ... W_1|` equals `|W_L| ... |W_1|`.

    So it is exactly where, between any input and any output, the products along all paths share a sign.

    Args:
        weights: matrices of the layers in the order in which they are applied, `W_1` first.
        tol: how much of an entry may be lost, as a share of it.

    Raises:
        TypeError: a weight is not floating point.
        ValueError: there is none, one is not finite, shapes do not chain, or `tol` is negative.

    Example:
        >>> first, last = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -1.0]])
        >>> is_propagation_invariant([first, last]), is_propagation_invariant([first, last.abs()])
        (False, True)
    """
    held = [finite_tensor("weights", w, ndim=2, floating=True).double() for w in weights]
    if not (isinstance(tol, float | Real) and 0 <= tol < math.inf):
        raise ValueError(f"tol must be at least 0 and finite, got {tol!r}")
    if not held:
        raise ValueError("weights must hold at least one matrix, got none")
    for before, after in itertools.pairwise(held):
        if after.shape[1] != before.shape[0]:
            raise ValueError(f"weights must chain, got {tuple(before.shape)} followed by {tuple(after.shape)}")
    exact = functools.reduce(lambda product, w: w @ product, held).abs()
    propagated = functools.reduce(lambda product, w: w @ product, [w.abs() for w in held])
    return bool((propagated - exact <= tol * propagated).all())


def can_be_propagation_invariant(matrix: Float[Tensor, "rows columns"]) -> bool:
    """Whether a linear map can be written as a product of two matrices, every unit in use, with exact bounds.

    It cannot where a 2 x 2 block without zeros has an odd number of negative entries. This is why tight networks are
    strongly regularised: of an m x n matrix only m + n - 1 signs are free.

    Args:
        matrix: the product.

    Raises:
        TypeError: it is not floating point.
        ValueError: it is no finite matrix.

    Example:
        >>> can_be_propagation_invariant(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        False
    """
    found = finite_tensor("matrix", matrix, ndim=2, floating=True)
    plus, minus = (found > 0).double(), (found < 0).double()
    # For each pair of rows: in how many columns their signs agree, and in how many they differ.
    agree = plus @ plus.T + minus @ minus.T
    differ = plus @ minus.T + minus @ plus.T
    return not bool(((agree > 0) & (differ > 0)).any())


def worst_case_logits(
    model: nn.Module, box: Interval, targets: Int[Tensor, " batch"], num_classes: int
) -> Float[Tensor, "batch classes"]:
    """The largest that interval bounds allow each class's logit to be above the target's, 0 at the target itself.

    A sample is certified where all others are negative.

    Args:
        model: see `trimtab.ops.intervals.propagate`.
        box: inputs.
        targets: labels.
        num_classes: number of classes.

    Raises:
        TypeError: `targets` is not int64.
        ValueError: there are fewer than two classes, a label is out of range, or there is not one for each input.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> worst_case_logits(model, box_around(torch.zeros(1, 1), 0.5, None), torch.tensor([0]), 2)
        tensor([[0., -0.]], grad_fn=...)
    """
    class_indices("targets", targets)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int | Integral) or num_classes < 2:
        raise ValueError(f"num_classes must be an integer of at least 2, got {num_classes!r}")
    if targets.shape != box.lower.shape[:1]:
        raise ValueError(f"targets must be of shape ({len(box.lower)},), got {tuple(targets.shape)}")
    if looked_at(targets) and not ((targets >= 0) & (targets < num_classes)).all():
        raise ValueError(f"targets must be in [0, {num_classes}), got others")
    margins = propagate(model, box, margin_rows(targets, num_classes)).lower
    others = torch.arange(num_classes, device=targets.device).expand(len(targets), -1) != targets[:, None]
    return torch.zeros_like(others, dtype=margins.dtype).masked_scatter(others, -margins)


class IBPLoss(WholeState, nn.Module):
    r"""Certified training: cross-entropy of the worst logits that interval bounds allow: `loss(model, x, targets)`.

    $\kappa$ times the cross-entropy of `x` itself and $1 - \kappa$ times that of `worst_case_logits`; while the radius
    rises from 0 to `eps`, $\kappa$ falls from 1. Layers that differ between training and eval mode, batch normalisation
    among them, are refused in training mode.

    Args:
        eps: radius at the end of the rise, at least 0; 0 leaves the cross-entropy.
        kappa: share of the plain cross-entropy at its end, in [0, 1].
        ramp: share of the training that the rise takes, in (0, 1]; see `set_progress`.
        bounds: smallest and largest value of an input; None for any.

    Attributes:
        progress: share of the training that is done, a scalar buffer; 1 until `set_progress` is called.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> model, criterion = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), IBPLoss(eps=0.1)
        >>> criterion.set_progress(0.25)  # half of the way up
        >>> criterion(model, torch.rand(5, 4), torch.arange(5) % 3).backward()
    """

    progress: Tensor

    def __init__(
        self,
        eps: float,
        kappa: float = 0.5,
        *,
        ramp: float = 0.5,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if bounds is not None and not in_order(bounds):
            raise ValueError(f"bounds must be two finite numbers in order, got {bounds}")
        self.eps, self.kappa = non_negative("eps", eps), in_range("kappa", kappa, 0, 1)
        self.ramp, self.bounds = in_range("ramp", ramp, 0, 1, "right"), bounds
        self.register_buffer("progress", torch.tensor(1.0))

    def set_progress(self, fraction: float) -> None:
        """Says how much of the training is done.

        Raises:
            ValueError: `fraction` is outside [0, 1].
        """
        self.progress.fill_(in_range("fraction", fraction, 0, 1))

    def forward(self, model: nn.Module, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"]) -> Tensor:
        """The loss of a batch.

        Raises:
            NotImplementedError: the model has a layer that interval bounds have no rule for.
            TypeError: `targets` is not int64.
            ValueError: the batch is empty, shapes do not fit, a label is out of range, an input is outside of `bounds`
                by more than `eps`, or a layer is in training mode that must not be.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        class_indices("targets", targets)
        if targets.ndim != 1 or len(x) == 0 or targets.shape != x.shape[:1]:
            shapes = f"{tuple(x.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"x and targets must hold the same number of samples, at least one, got {shapes}")
        if self.eps > 0 and out_of_reach(x, self.eps, self.bounds):
            raise ValueError(
                f"x must be within bounds {self.bounds}, got values from {x.min():g} to {x.max():g}: no certificate"
            )
        logits = model(x)
        if looked_at(targets) and not ((targets >= 0) & (targets < logits.shape[1])).all():
            raise ValueError(f"targets must be in [0, {logits.shape[1]}), got others")
        plain = F.cross_entropy(logits, targets)
        if self.eps == 0:
            return plain
        risen = (self.progress / self.ramp).clamp(max=1.0)
        radius = self.eps * risen.to(x.dtype)
        ends = (x - radius, x + radius)
        box = Interval(*(end if self.bounds is None else end.clamp(*self.bounds) for end in ends))
        worst = worst_case_logits(model, box, targets, logits.shape[1])
        kappa = 1 - (1 - self.kappa) * risen
        return kappa * plain + (1 - kappa) * F.cross_entropy(worst, targets)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, kappa={self.kappa:g}, ramp={self.ramp:g}"

r"""Datamodel matching: fine-tunes a model to the outputs that it would have, had it never seen the forget set.

For the deletion of training samples from a classifier or regressor. Data attribution predicts, for every point, what
each training sample adds to the outputs; taking away what the forget set adds gives the outputs of a model that nobody
has trained, and a few epochs of regression on them move the given model there. Unlike gradient ascent there is a
target to arrive at, so that more training does no harm.

$$
\hat y(x) = f_0(x) - c \sum_{j \in F} \beta_j(x), \qquad
\min_\theta \; \frac{1}{|M|} \sum_{x \in M} \bigl\| f_\theta(x) - \hat y(x) \bigr\|^2,
$$

where $\beta(x)$ are the weights of a linear regression of the logits at $x$, over models trained on random subsets, on
which samples were in the subset (a datamodel), and M holds the forget set F, repeated, and some retained samples.
`predict_without` alone is DM-direct, which answers without a changed model; matching the mean outputs of models that
were really retrained is `oracle_matching`, the bound of what matching can do. For ridge regression `ridge_influences`
gives $\beta$ in closed form.

Reference: Kristian Georgiev, Roy Rinberg, Sung Min Park, Shivam Garg, Andrew Ilyas, Aleksander Madry and Seth Neel,
"Attribute-to-Delete: Machine Unlearning via Datamodel Matching", ICLR 2025, arXiv 2410.23232. The matching is that of
the authors' code, its loss averaged over all logits; how they fit datamodels was not at hand, and a ridge regression
takes the place of the lasso that is usual there.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import (
    all_finite,
    finite_tensor,
    floating_tensor,
    in_range,
    integer,
    non_negative,
    number,
    positive,
    tensor,
    tensor_problem,
)
from trimtab.unlearning.matching import forget_rows, match_outputs, matching_indices

M = TypeVar("M", bound=nn.Module)


def subset_masks(
    n: int, m: int, keep: float = 0.5, *, generator: torch.Generator | None = None
) -> Bool[Tensor, "models n"]:
    """Which of n samples each of m models is trained on: each sample is kept by chance, on its own.

    Args:
        n: training samples.
        m: models.
        keep: probability, in (0, 1); 0.5 to 0.9 are usual.
        generator: of the draws.

    Raises:
        TypeError, ValueError: a number is out of range.

    Example:
        >>> subset_masks(1000, 3, 0.9, generator=torch.Generator().manual_seed(0)).sum(1)
        tensor([888, 894, 914])
    """
    integer("n", n)
    integer("m", m)
    in_range("keep", keep, 0, 1, "neither")
    return torch.rand(m, n, generator=generator) < keep


class LinearDatamodel:
    """Ridge regression of models' outputs on which samples they were trained on.

    Solved in float64, in as many dimensions as there are models or samples, whichever are fewer.

    Args:
        alpha: weight of the squared coefficients, beside the sum of squared errors; 0 takes the shortest solution.
        fit_intercept: whether outputs have a part that no sample adds.
        centre: take away the mean over the last dimension of the outputs first: logits may have a constant that means
            nothing.

    Attributes:
        coef_: what each sample adds to each output, (n, points, ...).
        intercept_: outputs of a model that has seen nothing, (points, ...).

    Raises:
        TypeError, ValueError: `alpha` is negative or no number.

    Example:
        >>> masks = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
        >>> outputs = (1 + masks.double() @ torch.tensor([2.0, 5.0]).double())[:, None]
        >>> datamodel = LinearDatamodel(alpha=0.0).fit(masks, outputs)
        >>> datamodel.coef_.flatten().round(decimals=6)
        tensor([2., 5.], dtype=torch.float64)
        >>> datamodel.predict_without(torch.tensor([8.0]), forget=[1]).round(decimals=4)
        tensor([3.])
    """

    coef_: Tensor
    intercept_: Tensor

    def __init__(self, alpha: float = 1.0, *, fit_intercept: bool = True, centre: bool = False) -> None:
        self.alpha = non_negative("alpha", alpha)
        self.fit_intercept = bool(fit_intercept)
        self.centre = bool(centre)

    def fit(self, masks: Any, outputs: Float[Tensor, "models points *output"]) -> LinearDatamodel:
        """Fits all points and outputs at once.

        Args:
            masks: (models, n), 1 or True where a sample was in the subset.
            outputs: of the models at the points, usually logits.

        Raises:
            TypeError: `outputs` is not floating point.
            ValueError: `masks` is not of zeros and ones, an output is NaN or infinite, or the models differ in number
                or are none.
        """
        chosen = tensor("masks", masks, ndim=2)
        if not len(chosen) or not bool(((chosen == 0) | (chosen == 1)).all()):
            raise ValueError("masks must be of zeros and ones, a row for each model, got others or none")
        y = finite_tensor("outputs", outputs, floating=True).double()
        if y.ndim < 2 or len(y) != len(chosen):
            raise ValueError(f"outputs must be (models, points, ...) of {len(chosen)} models, got {tuple(y.shape)}")
        if self.centre:
            y = y - y.mean(-1, keepdim=True)
        x, flat = chosen.to(y), y.flatten(1)
        x_mean, y_mean = x.mean(0), flat.mean(0)
        if not self.fit_intercept:
            x_mean, y_mean = torch.zeros_like(x_mean), torch.zeros_like(y_mean)
        x, flat = x - x_mean, flat - y_mean
        if self.alpha == 0:
            coef = torch.linalg.pinv(x) @ flat
        elif len(x) < x.shape[1]:
            coef = x.T @ torch.linalg.solve(x @ x.T + self.alpha * torch.eye(len(x)).to(x), flat)
        else:
            coef = torch.linalg.solve(x.T @ x + self.alpha * torch.eye(x.shape[1]).to(x), x.T @ flat)
        self.coef_ = coef.unflatten(1, y.shape[1:])
        self.intercept_ = (y_mean - x_mean @ coef).unflatten(0, y.shape[1:])
        return self

    def predict_without(
        self, base_outputs: Float[Tensor, "points *output"], forget: Any, *, scale: float = 1.0
    ) -> Float[Tensor, "points *output"]:
        """`predict_without` of these coefficients."""
        return predict_without(base_outputs, self.coef_, forget, scale=scale)


def predict_without(
    base_outputs: Float[Tensor, "points *output"],
    coef: Float[Tensor, "n points *output"],
    forget: Any,
    *,
    scale: float = 1.0,
) -> Float[Tensor, "points *output"]:
    """What the outputs would be without the forget set: minus what its samples add. This is DM-direct.

    Args:
        base_outputs: the trained model's own outputs, which keep what its own randomness made of them.
        coef: what each sample adds to each output; dimensions of 1 stand for all.
        forget: positions of the samples to forget, each once.
        scale: of what is taken away; 1 as in the paper.

    Raises:
        TypeError: outputs are not floating point, or positions not integers.
        ValueError: shapes do not fit, or a position is out of range or comes twice.

    Example:
        >>> coef = torch.tensor([[[1.0, -1.0]], [[0.5, 0.0]]])  # two samples, one point, two classes
        >>> predict_without(torch.tensor([[3.0, 0.0]]), coef, forget=[0])
        tensor([[2., 1.]])
    """
    base = tensor("base_outputs", base_outputs, floating=True)
    coef = tensor("coef", coef, floating=True)
    number("scale", scale)
    _check_coef(coef, base)
    rows = forget_rows(forget, len(coef)).to(coef.device)
    return base - scale * coef[rows].sum(0).to(base)


def ridge_influences(
    inputs: Float[Tensor, "n features"],
    targets: Float[Tensor, "n outputs"],
    points: Float[Tensor, "points features"],
    penalty: float,
) -> Float[Tensor, "n points outputs"]:
    r"""What each sample adds to a ridge regression's outputs, in closed form: exact for one sample left out.

    With $H = X^\top X + \lambda I$, residual $r_j$ and leverage $h_j = x_j^\top H^{-1} x_j$ it is
    $x^\top H^{-1} x_j\, r_j / (1 - h_j)$; of several samples the sum is a first-order approximation.

    Args:
        inputs: training inputs; give them a column of ones for an intercept.
        targets: what they were regressed on.
        points: where outputs are asked for.
        penalty: weight of the squared coefficients, beside the sum of squared errors; positive.

    Raises:
        TypeError: what comes is not floating point.
        ValueError: shapes do not fit, or the penalty is not positive, or so small that samples are fitted exactly.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])
        >>> ridge_influences(x, y, torch.tensor([[1.0]]), penalty=1.0).flatten()  # 1.5 with both, 0.5 and 1.6 without
        tensor([-0.1000,  1.0000])
    """
    x, y, at = (
        floating_tensor(name, finite_tensor(name, value, ndim=2))
        for name, value in (("inputs", inputs), ("targets", targets), ("points", points))
    )
    penalty = positive("penalty", penalty)
    if len(y) != len(x):
        raise ValueError(f"targets must be {len(x)} as inputs, got {len(y)}")
    if at.shape[1] != x.shape[1]:
        raise ValueError(f"points must have {x.shape[1]} features as inputs, got {at.shape[1]}")
    inner = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    solved = torch.linalg.solve(inner, x.T)  # (features, n)
    weights = solved @ y
    residual = (y - x @ weights) / (1 - (x * solved.T).sum(1, keepdim=True))
    found: Tensor = (at @ solved).T[:, :, None] * residual[:, None, :]
    if not all_finite(found):
        raise ValueError(f"penalty must be large enough for these inputs in {x.dtype}, got {penalty}")
    return found


def datamodel_matching(
    model: M,
    inputs: Float[Tensor, "n ..."],
    coef: Float[Tensor, "n n *output"],
    forget: Any,
    *,
    scale: float = 1.0,
    retain_multiplier: float = 1.0,
    forget_multiplier: float = 3.0,
    generator: torch.Generator | None = None,
    **options: Any,
) -> M:
    """A copy of a model, fine-tuned to what `predict_without` says of the forget set and of some retained samples.

    Args:
        model: trained on all samples; it is left as it is, and asked for its outputs in eval mode.
        inputs: all training samples, not augmented.
        coef: what each sample adds to the outputs at each, as of `LinearDatamodel` or `ridge_influences`.
        forget: positions of the samples to forget, each once. None of them: the copy is the model.
        scale: as in `predict_without`.
        retain_multiplier, forget_multiplier: as in `matching_indices`.
        generator: of retained samples and order.
        **options: of `match_outputs`.

    Raises:
        TypeError, ValueError: as those three.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> coef = torch.zeros(3, 3, 1)
        >>> coef[2] = 0.1 * x  # the third sample raised the slope by 0.1
        >>> model = nn.Linear(1, 1, bias=False)
        >>> without = datamodel_matching(model, x, coef, [2], epochs=300, lr=0.01, decay=0.99)
        >>> (without.weight - model.weight).detach().round(decimals=2)
        tensor([[-0.1000]])
    """
    if problem := tensor_problem(inputs=inputs, coef=coef):
        raise TypeError(problem)
    coef = tensor("coef", coef, floating=True)
    if coef.ndim < 2 or coef.shape[0] != len(inputs):
        raise ValueError(f"coef must be of {len(inputs)} samples as inputs, got shape {tuple(coef.shape)}")
    rows = matching_indices(
        forget,
        len(inputs),
        retain_multiplier=retain_multiplier,
        forget_multiplier=forget_multiplier,
        generator=generator,
    )
    seen = inputs[rows.to(inputs.device)]
    if not len(rows):
        return copy.deepcopy(model)
    at = coef if coef.shape[1] == 1 else coef[:, rows.to(coef.device)]
    targets = predict_without(_outputs(model, seen), at, forget, scale=scale)
    return match_outputs(model, seen, targets, generator=generator, **options)


def oracle_matching(
    model: M,
    inputs: Float[Tensor, "n ..."],
    oracle_outputs: Float[Tensor, "n *output"],
    forget: Any,
    *,
    retain_multiplier: float = 1.0,
    forget_multiplier: float = 5.0,
    generator: torch.Generator | None = None,
    **options: Any,
) -> M:
    """The same with the mean outputs of models that were retrained without the forget set: a bound, not a method.

    Args:
        model: trained on all samples; it is left as it is.
        inputs: all training samples.
        oracle_outputs: what retrained models make of them, on average.
        forget: positions of the samples to forget, each once.
        retain_multiplier, forget_multiplier: as in `matching_indices`.
        generator: of retained samples and order.
        **options: of `match_outputs`.

    Raises:
        TypeError, ValueError: as `matching_indices` and `match_outputs`; there are not as many outputs as inputs.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> matched = oracle_matching(nn.Linear(1, 1, bias=False), x, x, [2], epochs=300, lr=0.05, decay=0.99)
        >>> matched(x).detach().round(decimals=1)[2]
        tensor([2.])
    """
    if problem := tensor_problem(inputs=inputs, oracle_outputs=oracle_outputs):
        raise TypeError(problem)
    if oracle_outputs.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"oracle_outputs must be {len(inputs)} as inputs, got {len(oracle_outputs)}")
    rows = matching_indices(
        forget,
        len(inputs),
        retain_multiplier=retain_multiplier,
        forget_multiplier=forget_multiplier,
        generator=generator,
    )
    targets = oracle_outputs[rows.to(oracle_outputs.device)]
    return match_outputs(model, inputs[rows.to(inputs.device)], targets, generator=generator, **options)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """In eval mode, whatever mode the model is in."""
    found: Tensor = copy.deepcopy(model).eval()(inputs)
    return found


def _check_coef(coef: Tensor, base: Tensor) -> None:
    shape = coef.shape[1:]
    fits = len(shape) == base.ndim and all(a in (1, b) for a, b in zip(shape, base.shape, strict=True))
    if not fits:
        raise ValueError(f"coef must be (n, *{tuple(base.shape)}) as base_outputs, got shape {tuple(coef.shape)}")

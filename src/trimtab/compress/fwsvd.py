r"""FWSVD: factorises weight matrices by an SVD in which every row counts by what it means to the task.

For making the linear layers of a trained model smaller, without data beyond a pass over some of it. A plain SVD keeps
what is large in a matrix; this one keeps what the loss is sensitive to, by the empirical Fisher information of the
weights. Of that only a sum over each row is used, since then the best factors are still an SVD away. For a layer
$z = x W + b$ with $W$ of $N$ inputs and $M$ outputs, and losses $\mathcal L_d$ of samples,

$$
I_i = \Bigl( \sum_j \tfrac{1}{|D|} \sum_d \bigl( \partial \mathcal{L}_d / \partial W_{ij} \bigr)^2 \Bigr)^{1/2},
\qquad
\min_{A, B} \bigl\| \operatorname{diag}(I) (W - A B) \bigr\|_F : \quad
\operatorname{diag}(I)\, W = U S V^{\top}, \quad A = \operatorname{diag}(I)^{-1} U_r S_r, \quad B = V_r^{\top}
$$

`compress_linear` puts two linear layers of $r (N + M)$ weights into the place of one; `LowRank` keeps the layer and
trains its weight as a product. The paper's code was not released: the rows are inputs and the importance is the root
of the sum, as in public work that follows the paper.

Reference: Yen-Chang Hsu, Ting Hua, Sungen Chang, Qian Lou, Yilin Shen and Hongxia Jin, "Language model compression with
weighted low-rank factorization", ICLR 2022, arXiv 2207.00112.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.replacing import with_replaced
from trimtab.ops.arguments import finite_tensor, in_range, integer, one_of, positive, real_problem, tensor_problem

M = TypeVar("M", bound=nn.Module)
Rows = Literal["input", "output"]


def weighted_low_rank(
    matrix: Float[Tensor, "n m"], rank: int, row_weights: Float[Tensor, " n"] | None = None, *, eps: float = 1e-6
) -> tuple[Float[Tensor, "n rank"], Float[Tensor, "rank m"]]:
    """The two factors whose product is nearest to a matrix, each row's error counted by its weight.

    Computed in float64.

    Args:
        matrix: W.
        rank: of the product, 1 to min(n, m).
        row_weights: I, at least 0, not all 0; None is a plain SVD. Their scale does not matter.
        eps: weights are raised to at least this share of the largest one, so that no row is given up.

    Returns:
        A and B; the rows of B are orthonormal.

    Raises:
        TypeError: `matrix` or `row_weights` is not floating point.
        ValueError: `matrix` is not a finite matrix, `rank` is out of range, or `row_weights` are not n finite numbers,
            one of them above 0 and none below.

    Example:
        >>> W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> A, B = weighted_low_rank(W, rank=1)
        >>> (A @ B).abs()  # the larger row
        tensor([[0., 0.],
                [0., 2.]])
        >>> A, B = weighted_low_rank(W, rank=1, row_weights=torch.tensor([4.0, 1.0]))
        >>> (A @ B).abs()  # the one that counts
        tensor([[1., 0.],
                [0., 0.]])
    """
    matrix = finite_tensor("matrix", matrix, ndim=2, floating=True).detach()
    integer("rank", rank, 1, min(matrix.shape))
    positive("eps", eps)
    exact = matrix.double()
    weights = torch.ones(len(matrix), dtype=exact.dtype, device=exact.device)
    if row_weights is not None:
        given = finite_tensor("row_weights", row_weights, ndim=1, floating=True)
        if len(given) != len(matrix) or bool((given < 0).any()) or not bool((given > 0).any()):
            wanted = f"{len(matrix)} numbers of at least 0, not all of them 0"
            raise ValueError(f"row_weights must be {wanted}, got {len(given)} from {given.min()} to {given.max()}")
        weights = given.to(exact) / given.to(exact).max()
        weights = weights.clamp(min=eps)
    left, values, right = torch.linalg.svd(weights[:, None] * exact, full_matrices=False)
    first = left[:, :rank] * values[:rank] / weights[:, None]
    return first.to(matrix.dtype), right[:rank].to(matrix.dtype)


def fisher_information(
    model: nn.Module,
    losses: Callable[[Any, Any], Float[Tensor, " batch"]],
    batches: Iterable[Any],
    layers: Iterable[str] | None = None,
    *,
    per_sample: bool = True,
) -> dict[str, Float[Tensor, "out in"]]:
    """The mean squared gradient of a sample's loss, for each weight of linear layers.

    A sample is what stands at one place of the first dimension of a layer's input: a sequence is one sample, and its
    gradient is summed over the tokens before it is squared, once for all uses of a layer.

    Args:
        model: its mode and its gradients are left as they are; eval mode is what one wants.
        losses: `losses(model, batch)`, the loss of each sample; samples must not mix.
        batches: what `losses` takes.
        layers: names of linear layers; all of the model, if None.
        per_sample: False squares the gradient of a batch's mean loss, a cheaper and biased stand-in.

    Raises:
        ValueError: a name is not that of a linear layer whose weight requires a gradient, there are no batches, or
            `losses` gives something else than a loss a sample.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> fisher_information(model, lambda model, x: model(x)[:, 0], [x], [""])
        {'': tensor([[5.0000, 0.5000]])}
    """
    held = linear_layers(model, layers)
    for name, layer in held.items():
        if not layer.weight.requires_grad:
            raise ValueError(f"model must have weights that require a gradient, got one that does not at {name!r}")
    totals = {name: torch.zeros_like(layer.weight, requires_grad=False) for name, layer in held.items()}
    gradients: dict[str, Tensor] = {}
    count = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def note(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            given = arguments[0].detach()

            def keep(gradient: Tensor) -> None:
                found = torch.einsum("bto,bti->boi", _tokens(gradient), _tokens(given).to(gradient.dtype))
                gradients[name] = gradients[name] + found if name in gradients else found

            output.register_hook(keep)

        return note

    handles = [layer.register_forward_hook(watch(name)) for name, layer in held.items()]
    try:
        for batch in batches:
            gradients.clear()
            with torch.enable_grad():
                values = losses(model, batch)
                if values.ndim != 1 or not len(values):
                    raise ValueError(f"losses must give one number a sample, got shape {tuple(values.shape)}")
                weights = [layer.weight for layer in held.values()]
                torch.autograd.grad(values.sum(), weights, allow_unused=True)
            for name, found in gradients.items():
                if len(found) != len(values):
                    raise ValueError(f"losses must be one for each of {len(found)} samples, got {len(values)}")
                squares = found.square().sum(0) if per_sample else found.mean(0).square() * len(found)
                totals[name] += squares.to(totals[name].dtype)
            count += len(values)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("batches must be at least one, got none")
    return {name: total / count for name, total in totals.items()}


def row_importance(fisher: Float[Tensor, "out in"], rows: Rows = "input") -> Float[Tensor, " rows"]:
    """The root of the Fisher information summed over the weights of each input, or of each output.

    Example:
        >>> row_importance(torch.tensor([[9.0, 1.0], [16.0, 3.0]]))
        tensor([5., 2.])
    """
    if problem := tensor_problem(fisher=fisher):
        raise TypeError(problem)
    one_of("rows", rows, ("input", "output"))
    return fisher.sum(0 if rows == "input" else 1).sqrt()


class LowRank(nn.Module):
    """A weight that is a product of two trained factors, which start from its weighted SVD.

    A parametrization: the layer keeps its name and its class, the factors `original0` and `original1` are its
    parameters, and removing the parametrization leaves the product. `compress_linear` exports the same two factors as
    plain layers, which is what saves multiplications.

    Args:
        rank: of the product.
        row_weights: importance of the rows, as of `row_importance`; None is a plain SVD.
        rows: whether it is that of inputs or of outputs.
        eps: as of `weighted_low_rank`, whose errors apply.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(10, 20)
        >>> layer = parametrize.register_parametrization(layer, "weight", LowRank(rank=2))
        >>> [tuple(factor.shape) for factor in layer.parametrizations.weight.parameters()]
        [(10, 2), (2, 20)]
        >>> layer = parametrize.remove_parametrizations(layer, "weight")
        >>> int(torch.linalg.matrix_rank(layer.weight))
        2
    """

    row_weights: Tensor | None

    def __init__(
        self, rank: int, row_weights: Float[Tensor, " rows"] | None = None, rows: Rows = "input", *, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.rank, self.rows, self.eps = integer("rank", rank), one_of("rows", rows, ("input", "output")), eps
        self.register_buffer("row_weights", row_weights, persistent=False)

    def forward(
        self, first: Float[Tensor, "rows rank"], second: Float[Tensor, "rank others"]
    ) -> Float[Tensor, "out in"]:
        if problem := real_problem(first=first):
            raise TypeError(problem)
        product = first @ second
        return product.mT if self.rows == "input" else product

    def right_inverse(
        self, weight: Float[Tensor, "out in"]
    ) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank others"]]:
        """The factors of a weight."""
        matrix = weight.mT if self.rows == "input" else weight
        return weighted_low_rank(matrix, self.rank, self.row_weights, eps=self.eps)


@dataclass(frozen=True)
class Factorization:
    """What became of a model.

    Attributes:
        ranks: of each layer that was factorised, by its name.
        errors: squared Frobenius norm of what its weights lost.
        parameters_before, parameters_after: of the whole model.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    parameters_before: int
    parameters_after: int


def compress_linear(
    model: M,
    importance: Mapping[str, Float[Tensor, " rows"]] | None = None,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    layers: Iterable[str] | None = None,
    rows: Rows = "input",
    eps: float = 1e-6,
) -> tuple[M, Factorization]:
    """A copy of the model with two linear layers in the place of each of these.

    Args:
        model: stays as it is.
        importance: weights of the rows by the name of the layer, as of `row_importance`; None is a plain SVD.
        ratio: share of a layer's weights that may remain, above 0 and at most 1; the rank follows from it, and is 1 at
            the least.
        rank: instead of `ratio`.
        layers: names of linear layers; None is all.
        rows: whether the importance is that of inputs or of outputs.
        eps: as of `weighted_low_rank`.

    Returns:
        The smaller model, of plain `nn.Sequential` and `nn.Linear`, whose new weights train where the old ones did, and
        what it cost.

    Raises:
        ValueError: both or none of `ratio` and `rank` are given, one of them is out of range, a name is not that of a
            linear layer, or a layer has no importance or one of another length.

    Example:
        >>> small, report = compress_linear(nn.Sequential(nn.Linear(10, 20)), rank=2)
        >>> small[0]
        Sequential(
          (0): Linear(in_features=10, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=20, bias=True)
        )
        >>> report.parameters_before, report.parameters_after
        (220, 80)
    """
    one_of("rows", rows, ("input", "output"))
    if (ratio is None) == (rank is None):
        raise ValueError(f"ratio must be given or else rank, got {ratio} and {rank}")
    if ratio is not None:
        in_range("ratio", ratio, 0, 1, "right")
    changes: dict[str, nn.Module] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for name, layer in linear_layers(model, layers).items():
        if importance is not None and name not in importance:
            raise ValueError(f"importance must be given for every layer, got none for {name!r}")
        n, m = layer.in_features, layer.out_features
        ranks[name] = rank if rank is not None else max(int((ratio or 0.0) * n * m / (n + m) + 1e-9), 1)
        matrix = layer.weight.detach().mT if rows == "input" else layer.weight.detach()
        weights = None if importance is None else importance[name]
        first, second = weighted_low_rank(matrix, ranks[name], weights, eps=eps)
        if rows == "output":
            first, second = second.mT, first.mT
        changes[name] = _pair(layer, first, second)
        errors[name] = float((layer.weight.detach().mT - first @ second).square().sum())
    smaller = with_replaced(model, changes)
    before, after = (sum(p.numel() for p in held.parameters()) for held in (model, smaller))
    return smaller, Factorization(ranks, errors, before, after)


def linear_layers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Linear]:
    """Linear layers by name: those asked for, or all. What is parametrized, or is another kind of layer, is none.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    found = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    if names is None:
        return found
    wanted = list(names)
    for name in wanted:
        if name not in found:
            raise ValueError(f"layers must be names of plain linear layers, got {name!r}")
    return {name: found[name] for name in wanted}


def _tokens(x: Tensor) -> Tensor:
    """(batch, tokens, width) of a layer's input or output."""
    return x[:, None] if x.ndim == 2 else x.flatten(1, -2)


def _pair(layer: nn.Linear, first: Tensor, second: Tensor) -> nn.Sequential:
    where: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    rank, bias = first.shape[1], layer.bias is not None
    inner: nn.Linear = nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **where)
    outer: nn.Linear = nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=bias, **where)
    with torch.no_grad():
        inner.weight.copy_(first.mT)
        outer.weight.copy_(second.mT)
        if bias:
            outer.bias.copy_(layer.bias)
    for p in (inner.weight, outer.weight):
        p.requires_grad_(layer.weight.requires_grad)
    if bias:
        outer.bias.requires_grad_(layer.bias.requires_grad)
    return nn.Sequential(inner, outer).train(layer.training)

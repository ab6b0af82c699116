r"""Singular Values and Orthonormal Regularized Singular Vectors Adaptation (SORSA).

Fine-tunes only the largest singular triplets of each weight and keeps their vectors near orthonormal, so that scale
is learned in the singular values. It suits tasks on which LoRA converges slowly or drifts from what was pre-trained;
merged, it costs nothing at inference.

$$
W = U \Sigma V^\top, \qquad
W_{\text{eff}} = \underbrace{W - \beta\, U_r \Sigma_r V_r^\top}_{W_\text{res},\ \text{frozen}}
    + \beta\, B\, \mathrm{diag}(s)\, A, \qquad (B, s, A) \leftarrow (U_r, \Sigma_r, V_r^\top)
$$
$$
L_{\text{ortho}} = \operatorname{mean}_{\text{factors}}
    \left( \lVert A A^\top - I \rVert_F,\ \lVert B^\top B - I \rVert_F \right)
$$

Yang Cao and Zhao Song, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
Language Models", 2024, arXiv 2409.00055. The paper writes the regulariser for one adapter; its mean over all of them
is what the authors' `gamma` is meant for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.finetune.adapter import AdapterConfig, LoRADelta
from trimtab.finetune.svd import svd_factors
from trimtab.ops.arguments import integer, positive, real_problem, tensor_problem


class SORSAWeight(nn.Module):
    """Parametrization of a weight by its trained principal triplets and its frozen rest.

    The initial triplets are kept as buffers and the pre-trained weight is left as it is: the residual follows from
    both, so the base is restored exactly and an adapter's state dict is complete.

    Args:
        weight: the pre-trained weight; kernels count as (out, in * height * width) matrices.
        r: number of triplets, 1 to min(out, in).
        alpha: the adapter is scaled by alpha / r; by 1 without it.

    Attributes:
        A: right singular vectors (r, in), trained.
        s: singular values (r,), trained.
        B: left singular vectors (out, r), trained.

    Raises:
        TypeError: `weight` is not floating-point.
        ValueError: `weight` is not a finite matrix, `r` is out of range, or `alpha` is not positive.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> sorsa = SORSAWeight(weight, r=1)
        >>> sorsa.s.data, sorsa.residual(weight)
        (tensor([3.]), tensor([[0., 0.],
                [0., 1.]]))
    """

    A0: Tensor
    s0: Tensor
    B0: Tensor

    def __init__(self, weight: Float[Tensor, "out ..."], r: int, alpha: float | None = None) -> None:
        super().__init__()
        if alpha is not None:
            positive("alpha", alpha)
        U, S, Vh = svd_factors(weight, r)
        self.scale = 1.0 if alpha is None else alpha / r
        self.A, self.s, self.B = nn.Parameter(Vh), nn.Parameter(S), nn.Parameter(U)
        for name, factor in (("A0", Vh), ("s0", S), ("B0", U)):
            self.register_buffer(name, factor.clone())

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The effective weight, in the type of the pre-trained one."""
        # autocast would round the small learned change away before it is added
        with torch.autocast(weight.device.type, enabled=False):
            matrix = torch.addmm(self.residual(weight), self.B * self.s, self.A, alpha=self.scale)
        return matrix.to(weight.dtype).view_as(weight)

    def residual(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out in"]:
        """W_res: the pre-trained weight without its principal part."""
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        matrix = weight.flatten(1).to(self.A0.dtype)
        return torch.addmm(matrix, self.B0 * self.s0, self.A0, alpha=-self.scale)

    def to_lora_delta(self) -> LoRADelta:
        """The change from the pre-trained weight as factors of rank 2 r, which gradients reach.

        They are B s - B0 s0 with A, and B0 s0 with A - A0: nothing large cancels in their product, so the change is
        as exact in half precision as it is small.
        """
        left, left0 = self.B * self.s, self.B0 * self.s0
        return LoRADelta(torch.cat([self.A, self.A - self.A0]), torch.cat([left - left0, left0], dim=1) * self.scale)

    def extra_repr(self) -> str:
        return f"r={len(self.s)}, scale={self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class SORSAConfig(AdapterConfig):
    """Where SORSA goes, and its rank; for `apply_adapter`.

    Attributes:
        r: number of trained singular triplets of each weight (the paper's models: 128).
        alpha: the adapter is scaled by alpha / r; by 1 without it.
        dropout: only 0 is possible: it would act on the input of the adapter's branch alone, and a function of the
            weight does not see the input. The paper's models use none.

    Raises:
        ValueError: `r`, `alpha` or `dropout` is out of range.

    Example:
        >>> from trimtab.finetune import apply_adapter
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> adapters = apply_adapter(model, SORSAConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=3e-5, weight_decay=0.0)
        >>> model(torch.ones(4, 6)).square().mean().backward()
        >>> (4e-4 / 3e-5 * orthonormality_penalty(model)).backward()  # gamma / base lr, once per step
        >>> optimizer.step()
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        integer("r", self.r)
        if self.alpha is not None:
            positive("alpha", self.alpha)
        if self.dropout != 0:
            raise ValueError(
                f"dropout must be 0, got {self.dropout}: it belongs on the input of the adapter's branch, which an "
                "adapter that is a function of the weight does not see; put nn.Dropout before the module instead"
            )

    def build(self, weight: Float[Tensor, "out ..."]) -> SORSAWeight:
        return SORSAWeight(weight, self.r, self.alpha)


def orthonormality(vectors: Float[Tensor, "r n"], eps: float = 1e-4) -> Float[Tensor, ""]:
    """Frobenius norm of `vectors @ vectors.T - I`, smoothed where it is within `eps` of zero.

    The norm is not squared, so its gradient has unit size however small the deviation: at initialisation that is
    rounding noise, and at exactly zero NaN. `sqrt(norm^2 + eps^2) - eps` differs from the norm by at most `eps`.

    Args:
        vectors: the vectors to be orthonormal, as rows.
        eps: width of the smoothing, positive.

    Example:
        >>> orthonormality(2 * torch.eye(4))
        tensor(5.9999)
    """
    if problem := tensor_problem(vectors=vectors):
        raise TypeError(problem)
    positive("eps", eps)
    with torch.autocast(vectors.device.type, enabled=False):
        rows = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        gram = rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
        return (gram.square().sum() + eps**2).sqrt() - eps


def orthonormality_penalty(model: nn.Module, eps: float = 1e-4) -> Float[Tensor, ""]:
    """L_ortho: how far the singular vectors of all SORSA adapters in a model are from orthonormal, on average.

    As in the paper's training, back-propagate `gamma / base_lr * orthonormality_penalty(model)` once per optimizer
    step, after gradients are accumulated and clipped, with the base (not the scheduled) learning rate and
    gamma = 4e-4. The step it takes under SGD is then gamma times the schedule, whatever the learning rate.

    Args:
        model: a model with SORSA adapters, not merged.
        eps: see `orthonormality`.

    Raises:
        ValueError: the model has no SORSA adapter, or `eps` is not positive.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(4, 4)
        >>> _ = parametrize.register_parametrization(layer, "weight", SORSAWeight(layer.weight, r=2))
        >>> bool(orthonormality_penalty(layer) < 1e-5)
        True
    """
    adapters = [module for module in model.modules() if isinstance(module, SORSAWeight)]
    if not adapters:
        raise ValueError("model must have a SORSA adapter, applied and not merged, got none")
    return torch.stack([orthonormality(rows, eps) for a in adapters for rows in (a.A, a.B.T)]).mean()

r"""Dynamic pruning: each input has only those filters computed that will be most active for it.

For faster convolutional networks of unchanged size. A small predictor sees what comes into a layer and says which of
its filters will respond; what it should have said is read off the layer's own response, so that no sparsity term is
weighed against the task. With the activity $a_c = \max_{h, w} |\mathrm{out}_c|$ of the channels, sorted, the target is

$$
g_c = 1 \iff \sum_{c' :\, a_{c'} \ge a_c} a_{c'} \le r \sum_{c'} a_{c'} ,
$$

the most active filters that together hold a share $r$ of the activity, and the predictor is trained by the binary
cross-entropy of its logits with $g$. It sees channel means of the input as constants and is linear; its binary mask,
1 where a logit is positive, multiplies the response. The mask is a constant for the loss of the task, as in the
authors' release, unless `straight_through` is set.

The release drops even the most active filter where it alone holds more than $r$; here one filter always stays, in the
targets as in the predictions. $r = 1$ drops filters with a share of 1e-5 or less alone.

Reference: Sara Elkerdawy, Mostafa Elhoushi, Hong Zhang and Nilanjan Ray, "Fire Together Wire Together: A Dynamic
Pruning Approach with Self-Supervised Mask Prediction", CVPR 2022, arXiv 2110.08232.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Collection, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, tensor

_SLACK = 1e-5

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def mass_mask(activity: Float[Tensor, "batch channels"], mass: float) -> Bool[Tensor, "batch channels"]:
    """The most active channels of each sample that together hold a share of its activity; always at least one.

    Args:
        activity: not negative.
        mass: the share; at 1 all but dead channels stay.

    Raises:
        TypeError: `activity` is not floating point.
        ValueError: `activity` is no matrix, or `mass` is not in (0, 1].

    Example:
        >>> mass_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0.7)
        tensor([[ True,  True, False, False]])
    """
    if not isinstance(activity, Tensor):
        raise TypeError(f"activity must be a tensor, got {type(activity).__name__}")
    tensor("activity", activity, ndim=2, floating=True)
    in_range("mass", mass, 0, 1, "right")
    values, order = activity.float().sort(dim=1, descending=True, stable=True)
    share = values / values.sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    stays = share > _SLACK if mass == 1 else share.cumsum(1) - mass <= _SLACK
    stays[:, :1] = True
    return torch.zeros_like(stays).scatter(1, order, stays)


@torch.no_grad()
def uniform_mask(activity: Float[Tensor, "batch channels"], ratio: float) -> Bool[Tensor, "batch channels"]:
    """All channels of each sample but the share that is least active, rounded down: equal numbers for all samples.

    Raises:
        TypeError: `activity` is not floating point.
        ValueError: `activity` is no matrix, or `ratio` is not in [0, 1).

    Example:
        >>> uniform_mask(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0.25)
        tensor([[ True,  True,  True, False]])
    """
    if not isinstance(activity, Tensor):
        raise TypeError(f"activity must be a tensor, got {type(activity).__name__}")
    tensor("activity", activity, ndim=2, floating=True)
    in_range("ratio", ratio, 0, 1, "left")
    weakest = activity.argsort(dim=1, stable=True)[:, : int(ratio * activity.shape[1])]
    return torch.ones_like(activity, dtype=torch.bool).scatter(1, weakest, False)


def mask_loss(
    logits: Iterable[Float[Tensor, "batch channels"]], targets: Iterable[Bool[Tensor, "batch channels"]]
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the predictors, summed over layers.

    Raises:
        ValueError: there is no layer, or shapes differ.

    Example:
        >>> mask_loss([torch.zeros(2, 3)], [torch.ones(2, 3, dtype=torch.bool)])
        tensor(0.6931)
    """
    parts = []
    for logit, target in zip(logits, targets, strict=True):
        if logit.shape != target.shape:
            raise ValueError(f"targets must be of shape {tuple(logit.shape)}, got {tuple(target.shape)}")
        parts.append(F.binary_cross_entropy_with_logits(logit.float(), target.float()))
    if not parts:
        raise ValueError("logits must be of at least one layer, got none")
    return torch.stack(parts).sum()


class MaskPredictor(nn.Module):
    """Logits of a layer's filters from what comes in: channel means, a softmax over them, and a linear layer.

    Args:
        in_channels, out_channels: of the layer.
        softmax: whether the means are put on one scale.
        decoupled: whether the input is a constant, so that the layers before do not learn to be predicted from.

    Example:
        >>> MaskPredictor(4, 8)(torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, *, softmax: bool = True, decoupled: bool = True) -> None:
        if not all(isinstance(part, numbers.Integral) and part > 0 for part in (in_channels, out_channels)):
            raise ValueError(
                f"in_channels and out_channels must be whole numbers of at least 1, got {(in_channels, out_channels)}"
            )
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.softmax, self.decoupled = softmax, decoupled

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch filters"]:
        """The logits."""
        means = (x.detach() if self.decoupled else x).flatten(2).mean(2)
        logits: Tensor = self.linear(means.softmax(1) if self.softmax else means)
        return logits


class DynamicConv(nn.Module):
    """A convolution with its norm and activation, and a predictor that masks its channels for each sample.

    In training mode and in eval mode the whole layer is computed and masked; with `skipping` set, one sample at a time
    in eval mode is computed by its active filters alone, from the active channels of the layer before.

    Args:
        conv: ungrouped, of two dimensions.
        norm: batch normalisation or None.
        activation: element-wise, with 0 at 0 for `skipping`.
        mass: share of the activity that the targets keep.
        softmax, decoupled: of the predictor.
        straight_through: let the loss of the task train the predictor too, through the sigmoid.

    Attributes:
        masked: whether the mask is applied; off, the layer is what it was, and logits and targets are still kept.
        logits, targets: of the latest batch; `logits` with a gradient.

    Raises:
        ValueError: `mass` is not in (0, 1], or the convolution is grouped.

    Example:
        >>> layer = DynamicConv(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), mass=0.8)
        >>> layer(torch.ones(2, 1, 5, 5)).shape, layer.targets.shape
        (torch.Size([2, 4, 3, 3]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None,
        activation: nn.Module,
        mass: float,
        *,
        softmax: bool = True,
        decoupled: bool = True,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        self.mass = in_range("mass", mass, 0, 1, "right")
        if conv.groups != 1:
            raise ValueError(f"conv must be ungrouped, got {conv.groups} groups")
        self.conv, self.norm, self.activation = conv, norm, activation
        self.predictor = MaskPredictor(conv.in_channels, conv.out_channels, softmax=softmax, decoupled=decoupled)
        self.predictor.to(conv.weight.device, conv.weight.dtype)
        self.straight_through = straight_through
        self.masked, self.skipping = True, False
        self.logits: Tensor = torch.empty(0)
        self.targets: Tensor = torch.empty(0, dtype=torch.bool)
        self.before: tuple[DynamicConv, ...] = ()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch filters rows columns"]:
        """The masked response.

        Raises:
            ValueError: `x` is not of four dimensions, with the convolution's channels.
        """
        if x.dim() != 4 or x.shape[1] != self.conv.in_channels:
            raise ValueError(f"x must be (batch, {self.conv.in_channels}, height, width), got {tuple(x.shape)}")
        self.logits = self.predictor(x)
        if self.skipping and self.masked and len(x) == 1 and not self.training:
            return self._of_active_filters(x)
        out: Tensor = self.conv(x)
        out = self.activation(out if self.norm is None else self.norm(out))
        self.targets = mass_mask(out.detach().abs().amax((2, 3)), self.mass)
        if not self.masked:
            return out
        mask = self.active().to(out.dtype)
        if self.straight_through:
            soft = self.logits.sigmoid().to(out.dtype)
            mask = mask + (soft - soft.detach())
        return out * mask[:, :, None, None]

    @torch.no_grad()
    def active(self) -> Bool[Tensor, "batch filters"]:
        """Which filters the predictor wants, of the latest batch: positive logits, and the largest one in any case."""
        return (self.logits > 0) | F.one_hot(self.logits.argmax(1), self.logits.shape[1]).bool()

    def _of_active_filters(self, x: Tensor) -> Tensor:
        filters = self.active()[0].nonzero()[:, 0]
        weight, conv = self.conv.weight[filters], self.conv
        if self.before and self.before[0].masked:
            channels = self.before[0].active()[0].nonzero()[:, 0]
            x, weight = x[:, channels], weight[:, channels]
        bias = None if conv.bias is None else conv.bias[filters]
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ValueError(f"conv must have padding with zeros, in numbers, to skip, got {conv.padding_mode}")
        out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)
        if (norm := self.norm) is not None:
            mean, variance, scale, shift = (
                None if part is None else part[filters]
                for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            out = F.batch_norm(out, mean, variance, scale, shift, eps=norm.eps)
        out = self.activation(out)
        whole = out.new_zeros(1, conv.out_channels, *out.shape[2:])
        whole[:, filters] = out
        found: Tensor = whole
        return found

    def multiply_adds(self, x: Tensor, out: Tensor) -> float:
        """Of the latest batch, whose input and output these are, with the predictor's: it is what `model_cost` asks."""
        per_pair = out[0, 0].numel() * self.conv.weight[0, 0].numel()
        everything = torch.full((len(x),), float(self.conv.in_channels), device=x.device)
        inputs = self.before[0].active().sum(1) if self.before and self.before[0].masked else everything
        filters = self.active().sum(1) if self.masked else torch.full_like(everything, self.conv.out_channels)
        predictor = self.predictor.linear.weight.numel() * len(x) if self.masked else 0
        return float((inputs * filters).sum() * per_pair) + predictor

    def __getstate__(self) -> dict[str, Any]:
        # What the latest batch left hangs on its graph, which can be neither copied nor saved.
        return {**self.__dict__, "logits": torch.empty(0), "targets": torch.empty(0, dtype=torch.bool)}


def make_dynamic(model: M, mass: float, skip: Collection[str] = (), **options: bool) -> M:
    """A copy of a model in which convolutions predict their masks.

    In every `nn.Sequential`, a convolution, the batch normalisation after it, if there is one, and the ReLU after that
    become one `DynamicConv`, and identities; layers are taken to act in order, so that each knows which channels reach
    it.

    Args:
        model: it is left as it is.
        mass: share of the activity that the targets keep.
        skip: names of convolutions that stay as they are.
        options: of `DynamicConv`.

    Raises:
        ValueError: `mass` is not in (0, 1], a name is unknown, a convolution is grouped, or there is none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU())
        >>> [type(layer).__name__ for layer in make_dynamic(model, 0.8)]
        ['DynamicConv', 'Identity', 'Identity', 'DynamicConv', 'Identity']
    """
    changed = copy.deepcopy(model)
    convolutions = {name for name, layer in changed.named_modules() if isinstance(layer, nn.Conv2d)}
    if stray := set(skip) - convolutions:
        raise ValueError(f"skip must be names of convolutions of the model, got {', '.join(sorted(stray))}")
    last: DynamicConv | None = None
    found = 0
    for name, chain in list(changed.named_modules()):
        if not isinstance(chain, nn.Sequential):
            continue
        for n in range(len(chain)):
            if not isinstance(conv := chain[n], nn.Conv2d):
                continue
            normed = n + 1 < len(chain) and isinstance(chain[n + 1], nn.BatchNorm2d)
            end = n + 1 + normed
            label = f"{name}.{n}" if name else str(n)
            if label in skip or end >= len(chain) or not isinstance(chain[end], nn.ReLU):
                last = None
                continue
            norm = cast(nn.BatchNorm2d, chain[n + 1]) if normed else None
            layer = DynamicConv(conv, norm, chain[end], mass, **options)
            if last is not None and last.conv.out_channels == conv.in_channels:
                layer.before = (last,)
            chain[n], last, found = layer, layer, found + 1
            for gone in range(n + 1, end + 1):
                chain[gone] = nn.Identity()
    if not found:
        raise ValueError("model must have convolutions with ReLU in an nn.Sequential, got none")
    return changed


def dynamic_layers(model: nn.Module) -> list[DynamicConv]:
    """The layers that predict masks, in order."""
    return [layer for layer in model.modules() if isinstance(layer, DynamicConv)]


@torch.no_grad()
def estimate_reduction(model: nn.Module, batches: Iterable[Float[Tensor, "batch ..."]], mass: float) -> float:
    """The share of the convolutions' multiply-adds that masks would save, measured on a trained network beforehand.

    It is what perfect predictors would save if masking changed no response; the predictors' own cost is left out.

    Args:
        model: plain, or one that is dynamic already, whose predictors then play no part.
        batches: inputs, at least one batch.
        mass: share of the activity that the targets keep.

    Raises:
        ValueError: there is no batch, or what `make_dynamic` refuses.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> 0 <= estimate_reduction(model, [torch.ones(2, 1, 5, 5)], 0.5) < 1
        True
    """
    measured = copy.deepcopy(model) if dynamic_layers(model) else make_dynamic(model, mass)
    layers = dynamic_layers(measured.eval())
    for layer in layers:
        layer.mass, layer.masked = in_range("mass", mass, 0, 1, "right"), False
    sizes: dict[DynamicConv, int] = {}
    for layer in layers:
        layer.register_forward_hook(lambda held, given, out: sizes.update({held: out[0, 0].numel()}))
    left = whole = 0.0
    for x in batches:
        measured(x)
        for layer in layers:
            filters = layer.targets.sum(1).double()
            channels = layer.before[0].targets.sum(1) if layer.before else layer.conv.in_channels
            each = sizes[layer] * layer.conv.weight[0, 0].numel()
            left += float((filters * channels).sum()) * each
            whole += float(len(x) * layer.conv.in_channels * layer.conv.out_channels * each)
    if not whole:
        raise ValueError("batches must be at least one, got none")
    return 1 - left / whole

"""The next-scale transformer with its masked head."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.generative.blocks import Attend, Block, draw, in_groups, up_to_groups
from trimtab.generative.hmar.pyramid import Context, Schedule, Weighting, check_schedule, scale_loss_weights
from trimtab.generative.quantize import MultiScaleQuantizer
from trimtab.ops.arguments import class_indices, in_range, integer, looked_at, number, one_of, real_problem
from trimtab.ops.arguments import indices as check_indices
from trimtab.ops.callbacks import StepCallback
from trimtab.ops.ordering import told_tokens


@dataclass(frozen=True)
class Generated:
    """What `HierarchicalMaskedAR.generate` makes.

    Attributes:
        indices: tokens of the scales that were generated, of shape (batch, tokens).
        features: the feature map they make up, to be decoded, of shape (batch, dim, side, side).
    """

    indices: Int[Tensor, "batch tokens"]
    features: Float[Tensor, "batch dim side side"]


class HierarchicalMaskedAR(nn.Module):
    """A class-conditional next-scale transformer over the tokens of a pyramid, and its masked head.

    Train it with `next_scale_loss`; then call `start_masked_head()`, which copies the last blocks, and train
    `masked_parameters()` alone with `masked_loss`. Layer norms take scale and shift from the class; one projection of
    it serves all blocks.

    Args:
        quantizer: the trained pyramid; its parameters stay as they are.
        num_classes: number of classes; one more embedding stands for none.
        dim: width of the transformer.
        depth: blocks.
        masked_depth: blocks at the end of which the masked head has its own copies.
        heads: attention heads; they divide the width.
        label_drop: share of the labels that training replaces by none, for classifier-free guidance.
        weighting: of scales in the loss, see `scale_loss_weights`.
        context: "own scale", or "coarser scales" too, which is VAR and costs more.

    Raises:
        ValueError: the pyramid has one scale alone, a number is out of its range, or `heads` do not divide `dim`.

    Example:
        >>> quantizer = MultiScaleQuantizer((1, 2, 4), num_codes=16, dim=3)
        >>> model = HierarchicalMaskedAR(quantizer, num_classes=10, dim=32, depth=2, masked_depth=1, heads=2)
        >>> labels, tokens = torch.tensor([3, 7]), torch.zeros(2, 21, dtype=torch.int64)
        >>> model.next_scale_loss(labels, tokens).backward()
        >>> model.start_masked_head()
        >>> model.masked_loss(labels, tokens).backward()
        >>> made = model.generate(labels, schedule=[[1], [1, 3], [4, 12]], cfg=1.5)
        >>> made.indices.shape, made.features.shape
        (torch.Size([2, 21]), torch.Size([2, 3, 4, 4]))
    """

    token_weights: Tensor

    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        num_classes: int,
        *,
        dim: int = 128,
        depth: int = 4,
        masked_depth: int = 2,
        heads: int = 4,
        label_drop: float = 0.1,
        weighting: Weighting = "middle",
        context: Context = "own scale",
    ) -> None:
        super().__init__()
        if len(quantizer.scales) < 2:
            raise ValueError(f"quantizer must have at least two scales, got {quantizer.scales}")
        if integer("dim", dim) % integer("heads", heads):
            raise ValueError(f"dim must be divisible by heads, {heads}, got {dim}")
        integer("masked_depth", masked_depth, 1, integer("depth", depth))
        self.scales, self.num_classes = quantizer.scales, integer("num_classes", num_classes)
        self.label_drop = in_range("label_drop", label_drop, 0, 1, "left")
        self.sizes, self.context = [side**2 for side in self.scales], one_of("context", context, get_args(Context))
        self.quantizer = copy.deepcopy(quantizer).requires_grad_(False)
        deviation = math.sqrt(1 / dim / 3)
        self.classes = nn.Embedding(num_classes + 1, dim)
        self.places = nn.Parameter(deviation * torch.randn(sum(self.sizes), dim))
        self.start = nn.Parameter(deviation * torch.randn(self.sizes[0], dim))
        self.levels = nn.Embedding(len(self.scales), dim)
        self.words = nn.Linear(quantizer.dim, dim)
        self.hidden = nn.Parameter(deviation * torch.randn(dim))
        self.condition = nn.Linear(dim, 8 * dim)
        for embedding in (self.classes, self.levels):
            nn.init.normal_(embedding.weight, std=deviation)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, unit_queries=True) for _ in range(count))

        self.shared, self.last = blocks(depth - masked_depth), blocks(masked_depth)
        self.masked_last = blocks(masked_depth)
        self.head, self.masked_head = (nn.Linear(dim, quantizer.num_codes) for _ in range(2))
        self.register_buffer("token_weights", scale_loss_weights(self.scales, weighting), persistent=False)

    def next_scale_logits(
        self, labels: Int[Tensor, " batch"], inputs: Float[Tensor, "batch later dim"]
    ) -> Float[Tensor, "batch tokens codes"]:
        """Scores of all tokens, each scale's from the coarser ones.

        Args:
            labels: classes; `num_classes` for none.
            inputs: what `MultiScaleQuantizer.inputs` gives.
        """
        if problem := real_problem(labels=labels, inputs=inputs):
            raise TypeError(problem)
        x = self._embed(labels, self.words(inputs))
        return self._decide(x, labels, self.last, self.head, self._context(x.shape[1]))

    def next_scale_loss(
        self,
        labels: Int[Tensor, " batch"],
        indices: Int[Tensor, "batch tokens"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Weighted cross-entropy of all tokens, given those of coarser scales.

        Args:
            labels: classes.
            indices: the images' tokens, coarse to fine.
            generator: of the labels that are dropped.

        Raises:
            TypeError: if labels or indices are not int64.
            ValueError: if they do not fit each other, or one is out of range.
        """
        labels = self._training_labels(labels, indices, generator)
        logits = self.next_scale_logits(labels, self.quantizer.inputs(indices))
        losses = F.cross_entropy(logits.transpose(1, 2), indices, reduction="none")
        return (losses * self.token_weights).sum(1).mean()

    def start_masked_head(self) -> None:
        """Let the masked head begin where next-scale training has come to."""
        self.masked_last.load_state_dict(self.last.state_dict())
        self.masked_head.load_state_dict(self.head.state_dict())

    def masked_parameters(self) -> list[nn.Parameter]:
        """What is trained for masked prediction, while the rest is frozen."""
        return [*self.masked_last.parameters(), *self.masked_head.parameters(), self.hidden]

    def masked_logits(
        self,
        labels: Int[Tensor, " batch"],
        inputs: Float[Tensor, "batch later dim"],
        indices: Int[Tensor, "batch tokens"],
        hidden: Bool[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens codes"]:
        """Scores of all tokens from the coarser scales and from those of their own scale that are not hidden.

        The first scale has no tokens to look at. Tokens enter by their codes; the authors' release puts them through
        the quantizer's convolutions first, by which a hidden token shows in its neighbours.
        """
        if problem := real_problem(labels=labels, inputs=inputs, hidden=hidden):
            raise TypeError(problem)
        first = self.sizes[0]
        later = self._unhidden(inputs, indices[:, first:], hidden[:, first:])
        alone = partial(in_groups, sizes=self.sizes)
        return self._decide(self._embed(labels, later), labels, self.masked_last, self.masked_head, alone)

    def masked_loss(
        self,
        labels: Int[Tensor, " batch"],
        indices: Int[Tensor, "batch tokens"],
        *,
        generator: torch.Generator | None = None,
        hidden: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of hidden tokens, of all scales but the first.

        Args:
            labels: classes.
            indices: the images' tokens.
            generator: of the labels that are dropped and the tokens that are hidden.
            hidden: which tokens are; by default a share of each scale that is drawn evenly from (0, 1) a batch.

        Raises:
            TypeError: if labels or indices are not int64, or `hidden` is not bool.
            ValueError: if they do not fit each other, one is out of range, or no token after the first scale is hidden.
        """
        labels = self._training_labels(labels, indices, generator)
        if hidden is not None and (not isinstance(hidden, Tensor) or hidden.dtype != torch.bool):
            raise TypeError(f"hidden must be bool, got {getattr(hidden, 'dtype', type(hidden).__name__)}")
        if hidden is not None and hidden.shape != indices.shape:
            raise ValueError(f"hidden must be of shape {tuple(indices.shape)}, got {tuple(hidden.shape)}")
        if hidden is not None and looked_at(hidden) and not bool(hidden[:, self.sizes[0] :].any()):
            raise ValueError("hidden must hold a token of a scale after the first, got none")
        if hidden is None:
            hidden = self._draw_hidden(len(labels), generator).to(indices.device)
        counted = hidden.clone()
        counted[:, : self.sizes[0]] = False
        logits = self.masked_logits(labels, self.quantizer.inputs(indices), indices, hidden)
        return F.cross_entropy(logits[counted], indices[counted])

    @torch.no_grad()
    def generate(
        self,
        labels: Int[Tensor, " batch"],
        *,
        schedule: Schedule | None = None,
        num_scales: int | None = None,
        cfg: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        keep: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
    ) -> Generated:
        r"""Draw images of some classes.

        Args:
            labels: classes.
            schedule: passes; None takes one a scale. Counts of a scale sum to its tokens, the first scale has one pass.
            num_scales: stop after so many scales; None goes on to the last.
            cfg: guidance w. At scale k of K the logits are $(1+t)\ell_c - t\ell_u$ with $t = w (k-1)/(K-1)$; masked
                passes are not guided.
            top_k, top_p: draw among the most probable codes alone, see `draw`.
            keep: tokens of an image to edit, (batch, tokens), and a mask that is True where they must stay.
            generator: of randomness.
            callback: called after every scale as `callback(scale, time, tokens)`, with the scale's tokens and the share
                of an image's tokens that finer scales hold as the time; tokens that it returns replace these.

        Raises:
            TypeError: if labels or tokens, also those that the callback returns, are not int64, or a mask is not bool.
            ValueError: if counts do not sum to a scale's tokens, there are no labels, a label or a token is out of
                range, or `keep` is not of shape (batch, tokens).
        """
        if isinstance(labels, Tensor) and (labels.ndim != 1 or not len(labels)):
            raise ValueError(f"labels must be a vector of at least one, got shape {tuple(labels.shape)}")
        class_indices("labels", labels)
        check_indices("labels", labels, self.num_classes)
        if keep is not None:
            self._check_kept(keep, len(labels))
        plan = check_schedule(self.scales, schedule)
        draws = partial(draw, top_k=top_k, top_p=top_p, generator=generator)
        count = len(plan) if num_scales is None else integer("num_scales", num_scales, 1, len(plan))
        none = torch.full_like(labels, self.num_classes)
        side = self.scales[-1]
        features = self.places.new_zeros(len(labels), self.quantizer.dim, side, side)
        seen: list[Tensor] = []
        found: list[Tensor] = []
        for k, passes in enumerate(plan[:count]):
            seen += [self.quantizer.shrink(features, k)] if k else []
            strength = number("cfg", cfg) * k / max(1, len(plan) - 1)
            logits = self._scale_logits(labels, seen, k)
            if strength:
                logits = (1 + strength) * logits - strength * self._scale_logits(none, seen, k)
            tokens = draws(logits)
            given = None if keep is None else tuple(self.quantizer.split(part)[k] for part in keep)
            if given is not None:
                tokens = torch.where(given[1], given[0], tokens)
            sure = _confidence(logits, tokens, given)
            hidden = torch.ones_like(tokens, dtype=torch.bool)
            for settled in passes[:-1]:
                hidden = _settle_best(sure, hidden, settled)
                hidden = hidden if given is None else hidden & ~given[1]
                x = self._unhidden(seen[-1], tokens, hidden) + self._address(k, k + 1)
                logits = self._decide(x, labels, self.masked_last, self.masked_head)
                tokens = torch.where(hidden, draws(logits), tokens)
                sure = _confidence(logits, tokens, given)
            if callback is not None:
                tokens = told_tokens(callback, k, sum(self.sizes[k + 1 :]) / sum(self.sizes), tokens)
                check_indices("the callback's tokens", tokens, self.quantizer.num_codes)
            found.append(tokens)
            features = features + self.quantizer.contribution(k, tokens)
        return Generated(torch.cat(found, 1), features)

    def _check_kept(self, keep: tuple[Tensor, Tensor], batch: int) -> None:
        tokens, stay = keep
        class_indices("tokens to keep", tokens)
        if not isinstance(stay, Tensor) or stay.dtype != torch.bool:
            raise TypeError(f"keep must have a mask that is bool, got {getattr(stay, 'dtype', type(stay).__name__)}")
        for value in keep:
            if value.shape != (batch, sum(self.sizes)):
                raise ValueError(f"keep must be of shape ({batch}, {sum(self.sizes)}), got {tuple(value.shape)}")
        check_indices("tokens to keep", tokens[stay], self.quantizer.num_codes)

    def _scale_logits(self, labels: Tensor, seen: list[Tensor], k: int) -> Tensor:
        """Of one scale. Its own input is enough where tokens attend to their scale alone."""
        if self.context == "own scale" and k:
            return self._decide(self.words(seen[-1]) + self._address(k, k + 1), labels, self.last, self.head)
        later = self.words(torch.cat(seen, 1)) if seen else self.places.new_zeros(len(labels), 0, self.places.shape[1])
        x = self._embed(labels, later)
        return self._decide(x, labels, self.last, self.head, self._context(x.shape[1]))[:, -self.sizes[k] :]

    def _embed(self, labels: Tensor, later: Tensor) -> Tensor:
        first = self.classes(labels)[:, None] + self.start
        x = torch.cat([first, later], 1)
        return x + self._address(0, len(self.sizes))[: x.shape[1]]

    def _address(self, first: int, stop: int) -> Tensor:
        """Level and place of the tokens of some scales."""
        sizes = torch.tensor(self.sizes[first:stop], device=self.places.device)
        level = torch.repeat_interleave(self.levels.weight[first:stop], sizes, 0)
        start = sum(self.sizes[:first])
        return level + self.places[start : start + len(level)]

    def _unhidden(self, inputs: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        codes = F.linear(self.quantizer.lookup(indices), self.words.weight)
        return self.words(inputs) + torch.where(hidden[..., None], self.hidden, codes)  # type: ignore[no-any-return]

    def _decide(
        self,
        x: Tensor,
        labels: Tensor,
        last: nn.ModuleList,
        head: nn.Linear,
        attend: Attend = F.scaled_dot_product_attention,
    ) -> Tensor:
        """Logits of embedded tokens."""
        cond = self.condition(F.silu(self.classes(labels))).unflatten(-1, (8, -1))
        for block in [*self.shared, *last]:
            x = block(x, cond[:, :6], attend)
        scale, shift = cond[:, 6:, None].unbind(1)
        out: Tensor = head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        return out

    def _context(self, tokens: int) -> Attend:
        """Attention among the first tokens, as many as there are whole scales."""
        sizes = self.sizes[: next(k for k in range(len(self.sizes) + 1) if sum(self.sizes[:k]) == tokens)]
        return partial(in_groups if self.context == "own scale" else up_to_groups, sizes=sizes)

    def _training_labels(self, labels: Tensor, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        for name, value in (("labels", labels), ("indices", indices)):
            class_indices(name, value)
        if labels.ndim != 1 or indices.shape != (len(labels), sum(self.sizes)) or not len(labels):
            raise ValueError(
                f"indices must be of shape (batch, {sum(self.sizes)}) and labels of shape (batch,), "
                f"got {tuple(indices.shape)} and {tuple(labels.shape)}"
            )
        check_indices("labels", labels, self.num_classes)
        check_indices("indices", indices, self.quantizer.num_codes)
        dropped = torch.rand(len(labels), generator=generator).to(labels.device) < self.label_drop
        return labels.masked_fill(dropped, self.num_classes)

    def _draw_hidden(self, batch: int, generator: torch.Generator | None) -> Tensor:
        share = torch.rand((), generator=generator)
        order = [torch.rand(batch, size, generator=generator).argsort(1) for size in self.sizes]
        return torch.cat([ranks < math.ceil(share.item() * ranks.shape[1]) for ranks in order], 1)


def _confidence(logits: Tensor, tokens: Tensor, given: tuple[Tensor, ...] | None) -> Tensor:
    """The probability of the tokens; what was given is certain."""
    sure = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return sure if given is None else sure.masked_fill(given[1], torch.inf)


def _settle_best(sure: Tensor, hidden: Tensor, settled: int) -> Tensor:
    """Of the tokens that are hidden, settle the most confident; the others stay so."""
    best = sure.masked_fill(~hidden, -torch.inf).topk(settled, 1).indices
    return hidden.scatter(1, best, False)

"""What codes are worth: a small autoregressive model on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.generative.blocks import Block, causal, draw
from trimtab.ops.arguments import class_indices, in_range, integer, looked_at, number
from trimtab.ops.arguments import indices as check_indices
from trimtab.ops.callbacks import StepCallback
from trimtab.ops.ordering import told_tokens


class AutoregressiveProbe(nn.Module):
    """A class-conditional transformer that predicts each token from those before it.

    Its loss on held-out codes says how hard they are to model, its samples, decoded, what can be generated from them,
    and a linear classifier on its features what they tell of the images.

    Args:
        num_codes: size of the codebook.
        length: tokens of an image.
        num_classes: number of classes; one more embedding stands for none.
        dim, depth, heads: of the transformer.
        label_drop: share of the labels that training replaces by none.

    Example:
        >>> probe = AutoregressiveProbe(num_codes=64, length=8, num_classes=10, dim=32)
        >>> labels, codes = torch.tensor([3, 7]), torch.zeros(2, 8, dtype=torch.int64)
        >>> probe.loss(codes, labels).backward()
        >>> probe.sample(labels).shape, probe.features(codes).shape
        (torch.Size([2, 8]), torch.Size([2, 32]))
    """

    def __init__(
        self,
        num_codes: int,
        length: int,
        num_classes: int,
        *,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_codes, self.length = integer("num_codes", num_codes, 2), integer("length", length)
        self.num_classes = integer("num_classes", num_classes)
        self.label_drop = in_range("label_drop", label_drop, 0, 1, "left")
        self.classes, self.words = nn.Embedding(num_classes + 1, dim), nn.Embedding(num_codes, dim)
        self.places = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(integer("depth", depth)))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_codes))
        for embedding in (self.classes, self.words):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self, codes: Int[Tensor, "batch known"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch next codes"]:
        """Scores of the first tokens, one more than are known, or of all.

        Args:
            codes: the first tokens of each image, none to all of them.
            labels: classes; `num_classes` for none.
        """
        scores: Tensor = self.head(self._hidden(codes, labels, len(self.blocks)))
        return scores

    def loss(
        self,
        codes: Int[Tensor, "batch length"],
        labels: Int[Tensor, " batch"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Cross-entropy in nats a token; in training mode some labels are left out.

        Raises:
            TypeError: if codes or labels are not int64.
            ValueError: if they do not fit each other, there are none, or one is out of range.
        """
        if not len(codes) or not len(labels):
            raise ValueError(f"codes and labels must be at least one, got {len(codes)} and {len(labels)}")
        for name, value, size in (("codes", codes, self.num_codes), ("labels", labels, self.num_classes)):
            class_indices(name, value)
            check_indices(name, value, size)
        if codes.shape != (len(labels), self.length) or labels.ndim != 1:
            raise ValueError(
                f"codes must be of shape (batch, {self.length}) and labels of shape (batch,), "
                f"got {tuple(codes.shape)} and {tuple(labels.shape)}"
            )
        if self.training:
            dropped = torch.rand(len(labels), generator=generator).to(labels.device) < self.label_drop
            labels = labels.masked_fill(dropped, self.num_classes)
        return F.cross_entropy(self(codes, labels).transpose(1, 2), codes)

    @torch.no_grad()
    def sample(
        self,
        labels: Int[Tensor, " batch"],
        *,
        cfg: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        callback: StepCallback | None = None,
    ) -> Int[Tensor, "batch length"]:
        r"""Codes of some classes, drawn token by token.

        Args:
            labels: classes.
            cfg: guidance w, for logits $(1 + w)\ell_c - w\ell_u$; it costs a second pass a token.
            top_k, top_p: draw among the most probable codes alone.
            generator: of randomness.
            callback: called after every token as `callback(step, time, codes)`, with the codes so far, of shape
                (batch, step + 1), and the share of the tokens still to be drawn as the time; codes that it returns
                replace these.

        Raises:
            TypeError: labels, or codes that the callback returns, are not int64, or a number is none.
            ValueError: there are no labels, one is out of range, or `cfg` is not finite.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels must be a vector of at least one, got shape {tuple(labels.shape)}")
        if looked_at(labels) and not bool(((labels >= 0) & (labels <= self.num_classes)).all()):
            raise ValueError(f"labels must be in [0, {self.num_classes}], the last for none, got others")
        if abs(number("cfg", cfg)) == float("inf"):
            raise ValueError(f"cfg must be finite, got {cfg}")
        none = torch.full_like(labels, self.num_classes)
        codes = labels.new_empty(len(labels), 0)
        for step in range(self.length):
            logits = self(codes, labels)[:, -1]
            if cfg:
                logits = (1 + cfg) * logits - cfg * self(codes, none)[:, -1]
            codes = torch.cat([codes, draw(logits, top_k=top_k, top_p=top_p, generator=generator)[:, None]], 1)
            if callback is not None:
                codes = told_tokens(callback, step, 1 - (step + 1) / self.length, codes)
                check_indices("the callback's codes", codes, self.num_codes)
        return codes

    @torch.no_grad()
    def features(self, codes: Int[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """What half of the blocks make of codes without their class, averaged over tokens.

        Raises:
            TypeError: codes are not int64.
            ValueError: they are not of shape (batch, length), or one is out of range.
        """
        if not isinstance(codes, Tensor):
            raise TypeError(f"codes must be a tensor, got {type(codes).__name__}")
        if codes.dtype != torch.int64:
            raise TypeError(f"codes must be int64, got {codes.dtype}")
        if codes.ndim != 2 or codes.shape[1] != self.length:
            raise ValueError(f"codes must be of shape (batch, {self.length}), got {tuple(codes.shape)}")
        if looked_at(codes) and not bool(((codes >= 0) & (codes < self.num_codes)).all()):
            raise ValueError(f"codes must be in [0, {self.num_codes}), got others")
        none = torch.full((len(codes),), self.num_classes, device=codes.device)
        return self._hidden(codes, none, max(1, len(self.blocks) // 2), whole=True).mean(1)

    def _hidden(self, codes: Tensor, labels: Tensor, depth: int, *, whole: bool = False) -> Tensor:
        known = codes if whole else codes[:, : self.length - 1]
        x = torch.cat([self.classes(labels)[:, None], self.words(known) + self.places[: known.shape[1]]], 1)
        for block in self.blocks[:depth]:
            x = block(x, None, causal)
        return x

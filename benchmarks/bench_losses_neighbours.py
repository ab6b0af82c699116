"""NACL beside MONAI's and beside its repository's way; nested dropout beside torch's Dropout, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from monai.losses import NACLLoss as MonaiNACLLoss
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.losses import NACLLoss, NestedDropout, truncated_accuracy


class UnfoldedNACL(nn.Module):
    """NACL as its repository has it: the label map's windows unfolded, and a loop over the classes."""

    def __init__(self, num_classes: int, alpha: float = 0.1) -> None:
        super().__init__()
        self.num_classes, self.alpha = num_classes, alpha

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        windows = F.unfold(targets[:, None].float(), 3, padding=1)
        shares = torch.stack([(windows == k).sum(1) / 9 for k in range(self.num_classes)], dim=1)
        gap = shares.view_as(logits) - logits
        return F.cross_entropy(logits, targets) + self.alpha * gap.abs().mean()


def masked_accuracy(features: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The accuracy at every length as the authors' repository has it: one masked product after the other."""
    width = features.shape[1]
    masks = (torch.arange(width) < torch.arange(1, width + 1)[:, None]).float()
    with torch.no_grad():
        return torch.stack([(head(features * mask).argmax(1) == targets).float().mean() for mask in masks])


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of forward and backward, except for the evaluation."""
    repeats = 3 if quick else 25
    for shape in [(1, 16, 16), (1, 8, 8, 8)] if quick else [(8, 128, 128), (2, 48, 48, 48)]:
        yield from _nacl(shape, 5, repeats)
    yield from _dropout(*((16, 64) if quick else (320, 2048)), repeats)
    yield from _evaluation(*((50, 16) if quick else (1000, 512)), 10, repeats if quick else 5)


def _nacl(shape: tuple[int, ...], classes: int, repeats: int) -> Iterator[dict[str, object]]:
    generator, dims = torch.Generator().manual_seed(0), len(shape) - 1
    targets = torch.randint(classes, shape, generator=generator)
    logits = torch.randn(shape[0], classes, *shape[1:], generator=generator, requires_grad=True)
    losses: dict[str, nn.Module] = {"": NACLLoss(classes), "MONAI's NACLLoss": MonaiNACLLoss(classes, dims)}
    if dims == 2:
        losses["NACL of its repository"] = UnfoldedNACL(classes)
    seconds = medians({name: _stepped(loss, logits, targets) for name, loss in losses.items()}, repeats)
    for peer in list(losses)[1:]:
        yield compared(f"NACLLoss against {peer}, {dims}-D", seconds, 1.0, f"{tuple(logits.shape)}", ours="", peer=peer)


def _dropout(batch: int, width: int, repeats: int) -> Iterator[dict[str, object]]:
    features = torch.randn(batch, width, requires_grad=True)
    layers = {"": NestedDropout(width, sigma=100.0), "torch's Dropout": nn.Dropout(0.3)}
    seconds = medians({name: _stepped(layer, features) for name, layer in layers.items()}, repeats)
    yield compared(
        "NestedDropout against torch's Dropout",
        seconds,
        1.0,
        f"{batch} x {width} features",
        ours="",
        peer="torch's Dropout",
    )


def _evaluation(samples: int, width: int, classes: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    features, head = torch.randn(samples, width, generator=generator), nn.Linear(width, classes)
    targets = torch.randint(classes, (samples,), generator=generator)
    peer = "a product per length"
    calls: dict[str, Callable[[], object]] = {
        "": lambda: truncated_accuracy(features, head, targets),
        peer: lambda: masked_accuracy(features, head, targets),
    }
    note = f"{samples} samples, {width} features, {classes} classes"
    yield compared(f"truncated_accuracy against {peer}", medians(calls, repeats), 0.2, note, ours="", peer=peer)


def _stepped(module: nn.Module, first: Tensor, *rest: Tensor) -> Callable[[], None]:
    def call() -> None:
        first.grad = None
        module(first, *rest).sum().backward()

    return call

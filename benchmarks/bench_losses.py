"""Losses, forward and backward, beside torch's cross-entropy and the peer a user would take instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.passes import Sweep, sweeps
from benchmarks.timing import compared, compiling, medians
from trimtab import losses

SAMPLES = 50_000  # the size of CIFAR's training set
AIM = 1.3
MEMORY = "cross-entropy and its further passes"
# Passes beyond cross-entropy's, of arrays as large as the logits. A memory of predictions takes only finite rows: old
# and new ones are gone through to the end of each before its first entry may be written. It is then read and written;
# what the gradient needs of it is kept aside, for the next batch may write it first, and read again. PS-KD's gradient
# needs the sum of each soft label before its first entry. Where scores are brought to a common scale, their mean must
# be known before the first exponential, and in the gradient a sum of the row before its first entry; a softplus has an
# exponential and a logarithm, and an exponential in its gradient. ALDR-KL takes a second softmax, of which it needs the
# entropy.
PASSES = {
    "LDRKL": [Sweep(1, 1, exponentials=1, logarithms=1), Sweep(1, 0, exponentials=1), Sweep(1, 0, exponentials=1)],
    "PSKD": [Sweep(2), Sweep(1, 2), Sweep(1), Sweep(1)],
    "ELR": [Sweep(2), Sweep(1, 2), Sweep(1)],
    "ALDRKL": [Sweep(1), Sweep(1, 0, exponentials=1), Sweep(1, 0, exponentials=1)],
}
DRAWS = "its draws and two sorts"  # what EnsLoss must add to a binary loss: noise, in the order of the margins


class PlainGCE(nn.Module):
    """Generalised cross-entropy as its repositories have it."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        right = logits.softmax(1).gather(1, targets[:, None])
        return ((1 - right**0.7) / 0.7).mean()


class PlainELR(nn.Module):
    """Early-learning regularisation with a tensor that is indexed, as its repository has it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(SAMPLES, num_classes))

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        seen = probs.detach()
        self.past[index] = 0.7 * self.past[index] + 0.3 * seen / seen.sum(1, keepdim=True)
        agreement = (self.past[index] * probs).sum(1)
        return F.cross_entropy(logits, targets) + 3 * (1 - agreement).log().mean()


class PlainALDRKL(nn.Module):
    """The adaptive LDR-KL loss with one-hot targets and an explicit log-mean-exp, as its repository has it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("lam", torch.full((SAMPLES, 1), 10.0))
        self.log_k = torch.tensor(float(num_classes)).log()

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor) -> Tensor:
        classes = logits.shape[1]
        onehot = F.one_hot(targets, classes)
        scores = logits / (logits.abs().sum(1, keepdim=True) / classes)
        probs = F.normalize((scores / self.lam[index]).softmax(1) + 1e-5, p=1.0)
        divergence = (probs * (classes * probs).log()).sum(1, keepdim=True)
        self.lam[index] = (10 - 10 * divergence / (2 * self.log_k)).detach()
        lam = self.lam[index]
        excess = (0.1 * (1 - onehot) + scores - (scores * onehot).sum(1, keepdim=True)) / lam
        largest = excess.max(1, keepdim=True).values.detach()
        value = lam * ((excess - largest).exp().mean(1, keepdim=True).log() + largest)
        return (value - 0.1 * self.log_k * (lam - 10).square()).mean()


def _pskd(num_classes: int) -> nn.Module:
    loss = losses.PSKD(SAMPLES, num_classes, total_epochs=10)
    loss.set_epoch(5)
    return loss


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of forward and backward at batch 1024 and 1000 classes, eager and compiled."""
    batch, classes, repeats = (64, 100, 5) if quick else (1024, 1000, 40)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator, requires_grad=True)
    targets = torch.randint(classes, (batch,), generator=generator)
    index = torch.randperm(SAMPLES, generator=generator)[:batch]
    plain, indexed = (logits, targets), (logits, targets, index)
    scores = torch.randn(batch, generator=generator, requires_grad=True)
    binary = (scores, targets % 2)
    contestants: list[tuple[str, nn.Module, tuple[Tensor, ...], str, nn.Module]] = [
        ("CompSumLoss(1.7)", losses.CompSumLoss(tau=1.7), plain, "plain GCE", PlainGCE()),
        ("LDRKL", losses.LDRKL(), plain, "", nn.CrossEntropyLoss()),
        ("LDRKL(normalize=None)", losses.LDRKL(normalize=None), plain, "", nn.CrossEntropyLoss()),
        ("PSKD", _pskd(classes), indexed, "label smoothing", nn.CrossEntropyLoss(label_smoothing=0.1)),
        ("ELR", losses.ELR(SAMPLES, classes), indexed, "plain ELR", PlainELR(classes)),
        ("ALDRKL", losses.ALDRKL(SAMPLES, classes), indexed, "plain ALDR-KL", PlainALDRKL(classes)),
        ("EnsLoss", losses.EnsLoss(), binary, "BCE with logits", _BinaryCrossEntropy()),
    ]
    for mode in ("eager",) if quick else ("eager", "compiled"):
        for name, ours, arguments, peer_name, peer in contestants:
            baseline = _BinaryCrossEntropy() if arguments is binary else nn.CrossEntropyLoss()
            sides = {"ours": (ours, arguments), "cross-entropy": (baseline, arguments[:2])}
            if peer_name:
                sides["peer"] = (peer, arguments if isinstance(peer, PlainELR | PlainALDRKL) else arguments[:2])
            calls = {side: _forward_backward(loss, given, mode) for side, (loss, given) in sides.items()}
            passes = PASSES.get(name) if mode == "compiled" else None
            if passes:
                calls["memory"] = sweeps([logits.shape], passes)
            if arguments is binary:
                calls["draws"] = lambda: (torch.randn(batch).sort(), scores.detach().argsort())
            note = f"batch {batch}" + ("" if arguments is binary else f", {classes} classes")
            if mode == "compiled":
                note += f"; {compiling(calls['ours'])}"
            seconds = medians(calls, repeats)
            if passes:
                seconds["memory"] += seconds["cross-entropy"]
                needed = f"{note}; {'; '.join(map(str, passes))}"
                yield compared(f"{name} against {MEMORY}, compiled", seconds, 1.2, needed, peer="memory")
            if arguments is binary:
                seconds["draws"] += seconds["peer"]
                yield compared(f"{name} against {peer_name} and {DRAWS}, {mode}", seconds, 1.2, note, peer="draws")
            for side, label in (("cross-entropy", "cross-entropy"), ("peer", peer_name)):
                if side not in seconds or (arguments is binary and side == "cross-entropy"):
                    continue
                ratio = seconds["ours"] / seconds[side]
                aim = AIM if side == "cross-entropy" else 1.0
                yield {
                    "what": f"{name} against {label}, {mode}",
                    "ours": 1e3 * seconds["ours"],
                    "peer": 1e3 * seconds[side],
                    "ratio": ratio,
                    "unit": "ms",
                    "aim": f"at most {aim:g}",
                    "met": ratio <= aim,
                    "note": note,
                }


class _BinaryCrossEntropy(nn.Module):
    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype))


def _forward_backward(loss: nn.Module, arguments: tuple[Tensor, ...], mode: str) -> Callable[[], None]:
    called = torch.compile(loss) if mode == "compiled" else loss
    (first, *rest) = arguments

    def call() -> None:
        first.grad = None
        called(first, *rest).backward()

    return call

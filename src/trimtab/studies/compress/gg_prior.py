"""Priors for weights: does BackSlash shorten their code at no more cost than L1, and what are the other three worth?

The paper trains language models of up to billions of weights; here a character transformer of two blocks learns 3,000
windows of Python's sources twice over, and a network of 24,000 weights learns small Fashion-MNIST images in four
epochs. Every way to shrink acts in the first three quarters of the training, at one of four strengths (DeepShape: of
four pairs of factors), chosen on held-out images; then all weights are rounded to one step, chosen so that their
exponential Golomb code takes 1.5 bits a weight (2 in the language model). The image networks start from Gaussian
weights, the transformer from torch's own. Where weights are much smaller than 1, as here, the slope of BackSlash is
nearly that of L1, by the shape as a factor. Starting weights have the release's variance, 2 over the number of outputs.
A trial of plain training alone, on a seed of its own, timed 4,000 windows, which were too many.

On the shared task the matrices of a transformer's blocks are kept in RF8, each in a window of exponents of its own, and
trained on with gradients that pass straight through; the claim there, of a loss at most 0.005 above that of integers of
8 bits, was written before any run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab import nets
from trimtab.compress import RF8, BackSlash, code_length, deep_shape, estimate_shape, gg_init_
from trimtab.compress.transformer import Transformer
from trimtab.data.text import python_sources
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.compress_transformer import (
    Commission,
    CompressTransformer,
    block_layers,
    loss_on,
    to_a_half,
    windows_of,
)
from trimtab.studies.tasks.compress_transformer import Shrinking as TransformerEntrant
from trimtab.studies.tools import baselines
from trimtab.studies.tools.images import Images, some_clothes
from trimtab.studies.tools.training import PenaltyFactory, Plan, Training, accuracy, fitted, predict

BITS = (1.1, 1.25, 1.5, 2.0, 3.0)
TEXT_BITS = (1.25, 1.5, 2.0, 3.0, 4.0)
After = Callable[[nn.Module], None]


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    """All matrices."""
    return [p for p in network.parameters() if p.dim() > 1]


class Shrinking:
    """Changes the weights after every step of the first three quarters of a training; it adds nothing to the loss."""

    def __init__(self, make: Callable[[list[nn.Parameter]], After], network: nn.Module, plan: Plan) -> None:
        self.network, self.after = network, make(weights_of(network))
        self.left = plan.epochs * plan.steps_per_epoch * 3 // 4

    def __call__(self, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return logits.new_zeros(())

    def update(self) -> None:
        self.left -= 1
        if self.left >= 0:
            self.after(self.network)


class Reshaping:
    """Reshapes the weights once, after three quarters of a training."""

    def __init__(self, shape_scale: float, std_scale: float, network: nn.Module, plan: Plan) -> None:
        self.network, self.scales, self.at = network, (shape_scale, std_scale), plan.epochs * 3 // 4

    def __call__(self, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return logits.new_zeros(())

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        if epoch == self.at:
            weights = weights_of(self.network)
            for weight, new in zip(weights, deep_shape(weights, *self.scales, step=2.0**-9, tail_count=0), strict=True):
                weight.copy_(new)


def back_slash(strength: float, shape: float | None, weights: list[nn.Parameter]) -> After:
    """By `strength` per step times the law's slope; with shape 1 it is L1."""
    rule = BackSlash(weights, strength * sum(w.numel() for w in weights), shape)
    return lambda network: rule.post_step()


def decay(strength: float, weights: list[nn.Parameter]) -> After:
    """L2, after the step."""

    @torch.no_grad()
    def after(network: nn.Module) -> None:
        for weight in weights:
            weight.mul_(1 - strength)

    return after


def trained(
    trial: Trial, images: Images, start: After | None = None, penalty: PenaltyFactory | None = None
) -> tuple[nn.Module, list[float]]:
    """A network of two hidden layers after four epochs of Adam, and its loss on the training images after each."""

    def network() -> nn.Module:
        made = nets.mlp(images.x[0].numel(), (96, 48), images.num_classes)
        if start is not None:
            start(made)
        return made

    made, losses = trial.seeded(network).to(trial.device), list[float]()
    fitted(
        trial,
        Training(optimizer=baselines.adam, penalty=penalty),
        made,
        (images.x, images.y),
        num_classes=images.num_classes,
        epochs=trial.pick(smoke=4, laptop=4, paper=40),
        lr=2e-3,
        batch_size=64,
        after_epoch=lambda epoch: losses.append(F.cross_entropy(predict(made, images.x), images.y).item()),
    )
    return made, losses


@torch.no_grad()
def coded(network: nn.Module, bits: float) -> nn.Module:
    """A copy whose weights are multiples of one step, the smallest with which they take so many bits on average."""
    small = copy.deepcopy(network)
    weights = weights_of(small)
    count = sum(w.numel() for w in weights)
    low, high = 1e-4, 2.0
    for _ in range(25):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if code_length(weights, middle) <= bits * count else (middle, high)
    for weight in weights:
        weight.copy_((weight / high).round() * high)
    return small


def shortened(choices: Sequence[PenaltyFactory], trial: Trial) -> Result:
    """The training among some that is most accurate on held-out images when its weights take 1.5 bits."""
    images = some_clothes(trial)
    found: list[tuple[float, nn.Module]] = []
    for n, penalty in enumerate(choices):
        network, _ = trained(trial, images, partial(_draw, 2.0, trial.generator(3)), penalty=penalty)
        found.append((accuracy(coded(network, 1.5), images.x_held, images.y_held), network))
        trial.report((n + 1) / len(choices))
    _, best = max(found, key=lambda pair: pair[0])
    at = [accuracy(coded(best, bits), images.x_test, images.y_test) for bits in BITS]
    return Result(
        {
            "accuracy": at[BITS.index(1.5)],
            "accuracy_short": at[BITS.index(1.25)],
            "uncoded": accuracy(best, images.x_test, images.y_test),
            "shape": estimate_shape(weights_of(best)),
        },
        {"accuracy": Curve(list(BITS), at, "bits per weight")},
    )


class EveryCharacter(nn.Module):
    """Cross-entropy of all characters of all windows."""

    def forward(self, scores: Tensor, after: Tensor) -> Tensor:
        return F.cross_entropy(scores.flatten(0, 1), after.flatten())


def shortened_text(choices: Sequence[PenaltyFactory], trial: Trial) -> Result:
    """The training among some whose language model has the lowest held-out loss when its weights take 2 bits."""
    text = python_sources()
    train = windows_of(text.train, trial.pick(smoke=64, laptop=3_000, paper=40_000), 32, trial)
    held = windows_of(text.train, trial.pick(smoke=16, laptop=500, paper=5_000), 32, trial, 1)
    test = windows_of(text.test, trial.pick(smoke=16, laptop=1_000, paper=5_000), 32, trial, 2)
    found: list[tuple[float, nn.Module]] = []
    for n, penalty in enumerate(choices):
        network = fitted(
            trial,
            Training(optimizer=baselines.adam, loss=lambda plan: EveryCharacter(), penalty=penalty),
            trial.seeded(lambda: Transformer(len(text.characters), 32, depth=2)).to(trial.device),
            train,
            num_classes=len(text.characters),
            epochs=trial.pick(smoke=2, laptop=2, paper=20),
            lr=3e-3,
            batch_size=32,
        )
        found.append((loss_on(coded(network, 2.0), held), network))
        trial.report((n + 1) / len(choices))
    _, best = min(found, key=lambda pair: pair[0])
    at = [loss_on(coded(best, bits), test) for bits in TEXT_BITS]
    return Result(
        {
            "loss": at[TEXT_BITS.index(2.0)],
            "loss_short": at[TEXT_BITS.index(1.5)],
            "uncoded": loss_on(best, test),
            "shape": estimate_shape(weights_of(best)),
        },
        {"loss": Curve(list(TEXT_BITS), at, "bits per weight")},
    )


def started(shape: float | None, trial: Trial) -> Result:
    """Training from weights of one law; torch's own start if None."""
    images = some_clothes(trial)
    start = None if shape is None else partial(_draw, shape, trial.generator(3))
    network, losses = trained(trial, images, start)
    return Result(
        {"early_loss": losses[0], "accuracy": accuracy(network, images.x_test, images.y_test)},
        {"training_loss": Curve(list(range(1, len(losses) + 1)), losses)},
    )


def _draw(shape: float, generator: torch.Generator, network: nn.Module) -> None:
    gg_init_(network, shape, generator=generator)


def stored(form: Callable[[Tensor], Tensor], trial: Trial) -> Result:
    """An ordinarily trained network whose weights are kept in eight bits each."""
    images = some_clothes(trial)
    network, _ = trained(trial, images)
    small = copy.deepcopy(network)
    noise = power = 0.0
    with torch.no_grad():
        for weight in weights_of(small):
            rounded = form(weight.detach())
            noise, power = noise + float((rounded - weight).square().sum()), power + float(weight.square().sum())
            weight.copy_(rounded)
    before, after = (accuracy(model, images.x_test, images.y_test) for model in (network, small))
    return Result({"decibels": 10 * torch.tensor(power / noise).log10().item(), "lost": before - after})


def e4m3(weight: Tensor) -> Tensor:
    """Scaled, so that the largest weight is 256."""
    scale = 256 / weight.abs().max()
    return (weight * scale).to(torch.float8_e4m3fn).to(weight.dtype) / scale


def int8(weight: Tensor) -> Tensor:
    """One step for each matrix."""
    step = weight.abs().max() / 127
    return (weight / step).round() * step


class _InEightBits(nn.Module):
    """A weight that acts as what RF8 keeps of it; its gradient passes straight through."""

    bits = 8

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.form = RF8(int(weight.abs().max().log2().floor()) + 1)

    def forward(self, weight: Tensor) -> Tensor:
        kept = self.form.decode(self.form.encode(weight.detach()), weight.dtype)
        return weight + (kept - weight.detach())

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def in_eight_bits(commission: Commission) -> nn.Module:
    """Every matrix of the blocks in RF8, in a window of exponents of its own."""
    for name in block_layers(commission.model):
        layer = commission.model.get_submodule(name)
        made = _InEightBits(layer.get_parameter("weight").detach())
        parametrize.register_parametrization(layer, "weight", made)
    return commission.model


def fewer_bits(task: CompressTransformer) -> str:
    """Why RF8 cannot enter a variant."""
    return "" if task.share >= 0.5 else f"its numbers have 8 bits, and no more than {16 * task.share:g} are left"


STRENGTHS = (3e-6, 1e-5, 3e-5, 1e-4)
TEXT_STRENGTHS = (1e-5, 3e-5, 1e-4, 3e-4)

rate = Experiment(
    name="short codes",
    arms={
        "BackSlash": partial(
            shortened, [partial(Shrinking, partial(back_slash, strength, None)) for strength in STRENGTHS]
        ),
        "L1": partial(shortened, [partial(Shrinking, partial(back_slash, strength, 1.0)) for strength in STRENGTHS]),
        "L2": partial(shortened, [partial(Shrinking, partial(decay, 30 * strength)) for strength in STRENGTHS]),
        "DeepShape": partial(shortened, [partial(Reshaping, *scales) for scales in product((0.6, 0.8), (0.6, 0.8))]),
        "plain training": partial(shortened, [partial(Shrinking, partial(decay, 0.0))]),
    },
    metrics={
        "accuracy": Metric("accuracy at 1.5 bits per weight (%)", percent=True),
        "accuracy_short": Metric("accuracy at 1.25 bits per weight (%)", percent=True),
        "uncoded": Metric("accuracy of the uncoded network (%)", percent=True),
        "shape": Metric("shape of the weights' law", best=None),
    },
    reads=("digits", "fashion_mnist"),
    cost=2.5,
)

language = Experiment(
    name="short codes of a language model",
    arms={
        "BackSlash": partial(
            shortened_text, [partial(Shrinking, partial(back_slash, strength, None)) for strength in TEXT_STRENGTHS]
        ),
        "L1": partial(
            shortened_text, [partial(Shrinking, partial(back_slash, strength, 1.0)) for strength in TEXT_STRENGTHS]
        ),
        "L2": partial(
            shortened_text, [partial(Shrinking, partial(decay, 30 * strength)) for strength in TEXT_STRENGTHS]
        ),
        "plain training": partial(shortened_text, [partial(Shrinking, partial(decay, 0.0))]),
    },
    metrics={
        "loss": Metric("test loss at 2 bits per weight (nats per character)", best="min"),
        "loss_short": Metric("test loss at 1.5 bits per weight (nats per character)", best="min"),
        "uncoded": Metric("test loss of the uncoded model (nats per character)", best="min"),
        "shape": Metric("shape of the weights' law", best=None),
    },
    reads=("python_sources",),
    cost=24.0,
)

start = Experiment(
    name="starting weights",
    arms={
        "shape 0.5": partial(started, 0.5),
        "shape 1": partial(started, 1.0),
        "shape 2 (Gaussian)": partial(started, 2.0),
        "torch's own": partial(started, None),
    },
    metrics={
        "early_loss": Metric("training loss after the first of four epochs", best="min"),
        "accuracy": Metric("test accuracy (%)", percent=True),
    },
    reads=("digits", "fashion_mnist"),
    cost=0.7,
)

storage = Experiment(
    name="eight bits a weight",
    arms={"RF8": partial(stored, RF8().quantize), "float8 e4m3": partial(stored, e4m3), "int8": partial(stored, int8)},
    metrics={
        "decibels": Metric("ratio of weights to their error (dB)"),
        "lost": Metric("accuracy lost (points)", best="min", percent=True),
    },
    reads=("digits", "fashion_mnist"),
    cost=0.7,
)

study = Study(
    paper="gg_prior",
    entrants={"RF8": TransformerEntrant(compress=in_eight_bits, unfit=fewer_bits)},
    on=[to_a_half],
    experiments=[language, rate, start, storage],
    headline=Claim(
        "BackSlash",
        below="L1",
        on="loss",
        at=language,
        text="At 2 bits per weight, a language model trained with BackSlash has a lower test loss than with L1",
    ),
    claims=[
        Claim("BackSlash", below="L2", on="loss", at=language),
        Claim("BackSlash", below="plain training", on="loss", by=0.05, at=language),
        Claim("BackSlash", below="plain training", on="uncoded", by=-0.02, at=language),
        Claim(
            "BackSlash",
            beats="L1",
            on="accuracy",
            by=-0.002,
            at=rate,
            text="At 1.5 bits per weight, BackSlash is at most 0.2 points less accurate than L1",
        ),
        Claim("BackSlash", beats="L2", on="accuracy", at=rate),
        Claim("BackSlash", beats="plain training", on="accuracy", by=0.01, at=rate),
        Claim("BackSlash", beats="plain training", on="uncoded", by=-0.01, at=rate),
        Claim("BackSlash", beats="L1", on="accuracy_short", at=rate),
        Claim("DeepShape", beats="plain training", on="accuracy", at=rate),
        Claim("shape 0.5", below="shape 2 (Gaussian)", on="early_loss", at=start),
        Claim("shape 1", below="shape 2 (Gaussian)", on="early_loss", at=start),
        Claim("RF8", beats="float8 e4m3", on="decibels", at=storage),
        Claim("RF8", at_most=0.002, on="lost", at=storage),
        Claim("RF8", below="round to nearest", on="test_loss", by=-0.005, at=to_a_half),
    ],
)

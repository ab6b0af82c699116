"""Soft shrinkage: does a mask that stays free until the end make better sparse networks from scratch than hard cuts?

The paper prunes EDSR, SwinIR and CAT on natural images, in hundreds of thousands of steps; here a network of two
residual blocks, or of two transformer layers, learns twice the resolution of Fashion-MNIST images, from crops, in 1,200
steps, 900 of them with shrinkage. All methods have the same steps, learning rate and annealing, and keep equally many
weights. In a trial of 300 steps, on a seed that is in no result, the selection hardly moved after a quarter of them,
and the steps were made four times as many. They are still few, and the authors' shrinkage of 1 % is gentle, hence the
arm with 10 %. On the task the network is trained before, and all layers but the first and the last are pruned as much.
In the transformer all matrices of the blocks are, in 160 steps before the task's own further training; the claim there
was written before any run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress import SoftShrinkage, mask_overlap
from trimtab.compress.cost import model_cost
from trimtab.data import load
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.compress_classifier import CompressClassifier, Compression, four_bits
from trimtab.studies.tasks.compress_transformer import Commission, block_layers, cross_entropy, to_a_half, to_a_quarter
from trimtab.studies.tasks.compress_transformer import Shrinking as TransformerEntrant
from trimtab.studies.tools import baselines
from trimtab.studies.tools.compressing import CompressionData, Target, fine_tune
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench, fit, predict

MakeRule = Callable[[nn.Module, Plan], SoftShrinkage]


class SuperResolver(nn.Module):
    """Twice the resolution: a convolution, two residual blocks, a convolution to 2 x 2 pixels; bicubic beside it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(2)
        )
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 twice twice"]:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return F.pixel_shuffle(self.last(h), 2) + F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)


class AttentiveResolver(SuperResolver):
    """The same with two transformer layers, in which every pixel is a token, in place of the blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 twice twice"]:
        h = self.first(x)
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        h = tokens.transpose(1, 2).reshape(h.shape)
        return F.pixel_shuffle(self.last(h), 2) + F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)


class Shrinking:
    """The rule after every step; it adds nothing to the loss, and notes how far its selection is from the last one."""

    def __init__(self, make: MakeRule, network: nn.Module, plan: Plan) -> None:
        self.rule = make(network, plan)
        self.quarter = plan.epochs * plan.steps_per_epoch // 4
        self.early: dict[str, Tensor] = {}

    def __call__(self, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return logits.new_zeros(())

    def update(self) -> None:
        self.rule.post_step()
        if self.rule.steps == self.quarter:
            self.early = self.rule.selected()

    def overlap(self) -> float:
        """Of the weights selected after a quarter of the training, the share that is pruned in the end."""
        masks = self.rule.masks or self.rule.selected()
        return sum(mask_overlap(self.early[name], mask) for name, mask in masks.items()) / len(masks)


def shrunk(sparsity: float, factor: float, network: nn.Module, plan: Plan) -> SoftShrinkage:
    """In the first three quarters of the training; the first and the last layer stay whole."""
    phase = plan.epochs * plan.steps_per_epoch * 3 // 4
    return SoftShrinkage(network, sparsity, factor, phase, skip=["first", "last"])


def random_mask(sparsity: float, network: nn.Module, plan: Plan) -> SoftShrinkage:
    """Fixed from the start, as many weights as the others keep."""
    rule, generator = shrunk(sparsity, 0.0, network, plan), plan.generator()
    masks = {}
    for name, mask in rule.selected().items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        masks[name] = mask.flatten()[order].view_as(mask)
    rule.load_state_dict({"steps": 0, "masks": masks})
    return rule


def resolved(make: MakeRule, trial: Trial, network: Callable[[], nn.Module] = SuperResolver) -> Result:
    """Train from scratch on crops, and measure on whole images."""
    data = load("digits" if trial.budget == "smoke" else "fashion_mnist")
    count = trial.pick(smoke=64, laptop=1600, paper=50_000)
    data = data.subset(count, trial.pick(smoke=32, laptop=200, paper=5000), generator=trial.generator())
    x, target = pairs(data.x_train.to(trial.device), trial.generator(1), 16)
    low, high = pairs(data.x_test.to(trial.device))
    bench = Workbench(
        Training(loss=lambda plan: nn.L1Loss(), optimizer=baselines.adam, penalty=partial(Shrinking, make)),
        network,
        (x, target),
        (x[:16], target[:16]),
        num_classes=1,
        epochs=trial.pick(smoke=4, laptop=12, paper=60),
        trial=replace(trial, setting={"lr": 5e-3}),
        batch_size=16,
    )
    rule = Supervised(bench)
    scores: list[float] = []

    def psnr(epoch: int) -> None:
        error = (predict(rule, low, batch_size=100) - high).square().mean()
        scores.append(float(20 * (high.max() - high.min()).log10() - 10 * error.log10()))

    fit(bench, rule, after_epoch=psnr)
    shrinking = rule.penalty
    overlap = shrinking.overlap() if isinstance(shrinking, Shrinking) else 1.0
    return Result({"psnr": scores[-1], "overlap": overlap}, {"psnr": Curve(list(range(1, len(scores) + 1)), scores)})


def pairs(images: Tensor, generator: torch.Generator | None = None, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images at half their resolution, and the images; of each a random square at even places, if a size is given."""
    if generator is not None and size is not None and size < images.shape[-1]:
        places = (images.shape[-1] - size) // 2 + 1
        corner = 2 * torch.randint(places, (2, len(images), 1), generator=generator).to(images.device)
        span, every = torch.arange(size, device=images.device), torch.arange(len(images), device=images.device)
        rows, columns = corner + span
        images = images[every[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return F.avg_pool2d(images, 2), images


def pruned(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """The trained network, shrunk in 60 % of the steps at the setting's factor, all layers but the ends as much."""
    small = copy.deepcopy(model)
    layers = model_cost(model, data.sample[:1]).layers
    total, ends = sum(layer.weights for layer in layers), layers[0].weights + layers[-1].weights
    kept = (target.size - total) / 32 - ends  # with one bit a weight that says which are there
    factor, phase, skip = float(trial.setting["shrink"]), data.steps * 3 // 5, [layers[0].name, layers[-1].name]
    rule = SoftShrinkage(small, 1 - kept / (total - ends), factor, phase, skip=skip)
    fine_tune(small, data, trial, after_step=lambda step: rule.post_step())
    return small


def pruned_transformer(commission: Commission) -> nn.Module:
    """The trained transformer's blocks, shrunk in as many steps as AutoDistil makes passes, at the setting's factor."""
    model, trial = commission.model, commission.trial
    sparsity = 1 - (commission.share - 1 / 16)  # of 16 bits a weight one says whether it is there
    factor, steps = float(trial.setting["shrink"]), trial.pick(smoke=8, laptop=160, paper=8_000)
    rule = SoftShrinkage(model, {f"{name}.weight": sparsity for name in block_layers(model)}, factor)

    def objective(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rule.post_step()  # after the step before; before the first there is little to lose
        return cross_entropy(model, teacher, x, y)

    commission.train(model.train(), objective, steps)
    rule.post_step()
    rule.finalize()
    return model


def arms(sparsity: float) -> dict[str, Callable[[Trial], Result]]:
    """All ways to the same number of weights."""
    return {
        "ISS-P": partial(resolved, partial(shrunk, sparsity, 0.99)),
        "ISS-P, shrinkage of 10 %": partial(resolved, partial(shrunk, sparsity, 0.9)),
        "IHT": partial(resolved, partial(shrunk, sparsity, 0.0)),
        "dense, then cut": partial(resolved, partial(shrunk, sparsity, 1.0)),
        "random mask": partial(resolved, partial(random_mask, sparsity)),
    }


METRICS = {
    "psnr": Metric("PSNR of test images (dB)"),
    "overlap": Metric("share of the early selection that is pruned in the end (%)", best=None, percent=True),
}

most = Experiment(
    name="95 % pruned",
    arms={**arms(0.95), "dense": partial(resolved, partial(shrunk, 0.0, 1.0))},
    metrics=METRICS,
    reads=("digits", "fashion_mnist"),
    cost=5.0,
)
nearly_all = Experiment(
    name="98 % pruned",
    arms={name: arm for name, arm in arms(0.98).items() if name in ("ISS-P", "ISS-P, shrinkage of 10 %", "IHT")},
    metrics=METRICS,
    reads=("digits", "fashion_mnist"),
    cost=5.0,
)
attention = Experiment(
    name="95 % pruned, transformer",
    arms={
        name: partial(arm, network=AttentiveResolver)  # type: ignore[call-arg]
        for name, arm in most.arms.items()
        if name in ("ISS-P", "IHT", "dense, then cut", "dense")
    },
    metrics=METRICS,
    reads=("digits", "fashion_mnist"),
    cost=8.0,
)


def no_room(task: CompressClassifier) -> str:
    """Why it cannot enter a variant."""
    if task.of == "operations":
        return "it is told how many weights may stay, and not how many operations"
    return "" if task.bits > 2 else "the positions of its weights alone take as much as 2 bits a weight"


study = Study(
    paper="iss_p",
    entrants={
        "ISS-P": {
            four_bits: Compression(compress=pruned, search={"lr": (3e-3,), "shrink": (0.99, 0.9)}, unfit=no_room),
            **dict.fromkeys(
                (to_a_half, to_a_quarter),
                TransformerEntrant(compress=pruned_transformer, search={"lr": (3e-3, 1e-2), "shrink": (0.99, 0.9)}),
            ),
        }
    },
    controls={"IHT": Compression(compress=pruned, search={"lr": (1e-3, 3e-3), "shrink": (0.0,)})},
    on=[four_bits, to_a_half, to_a_quarter],
    experiments=[most, nearly_all, attention],
    headline=Claim("ISS-P", beats="IHT", on="psnr", by=0.05, at=most),
    claims=[
        Claim("ISS-P", beats="IHT", on="psnr", by=0.05, at=nearly_all),
        Claim("ISS-P", beats="IHT", on="psnr", by=0.05, at=attention),
        Claim("ISS-P, shrinkage of 10 %", beats="IHT", on="psnr", at=most),
        Claim("ISS-P", beats="dense, then cut", on="psnr", at=most),
        Claim("ISS-P", beats="random mask", on="psnr", at=most),
        Claim("ISS-P", beats="dense", on="psnr", by=-0.5, at=most),
        Claim("ISS-P", below="IHT", on="overlap", at=most),
        Claim("ISS-P", beats="magnitude pruning", on="accuracy", at=four_bits),
        Claim("ISS-P", below="magnitude pruning", on="test_loss", at=to_a_quarter),
    ],
)

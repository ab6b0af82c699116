"""Fine-tuning a pre-trained network on few samples of a shifted task: what is gained, how fast, what is forgotten."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data import load
from trimtab.finetune.svd import singular_drift
from trimtab.nets import Classifier, mlp
from trimtab.optim.two_pass import SAM, frozen_norm_stats
from trimtab.studies.engine.study import Curve, Metric, Result, Task, Trial
from trimtab.studies.tools import baselines
from trimtab.studies.tools.training import (
    Parameters,
    Plan,
    Rule,
    Supervised,
    Training,
    Workbench,
    accuracy,
    fit,
    predict,
)


@dataclass(frozen=True)
class _Images:
    """Disjoint training images for pre-training, fine-tuning and choosing, and the test images, all upright."""

    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


@dataclass(frozen=True)
class FineTuning(Task[Training]):
    """Pre-train an MLP on 10,000 upright images, fine-tune it on a few turned ones, and test it at many angles.

    Everybody chooses among at most eight settings by the accuracy on held-out images at the angle of fine-tuning; no
    other angle is looked at. Two were added for everybody when most had chosen an end of the first six. What an
    entrant's `prepare` leaves without gradients is frozen. Steps to the loss are interpolated between epochs; a run
    that never reaches it counts its length.

    Attributes:
        dataset: "mnist" or "fashion_mnist"; at the smoke budget digits.
        angle: rotation of the fine-tuning images in degrees.
        samples: number of fine-tuning images at the laptop budget.
        target_loss: the loss on all fine-tuning images that `steps_to_loss` waits for.
    """

    dataset: str = "mnist"
    angle: float = 45.0
    samples: int = 1000
    target_loss: float = 0.1

    name: ClassVar[str] = "fine-tuning"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "target_accuracy": Metric("accuracy on the new task (%)", percent=True),
        "ood_accuracy": Metric("accuracy at other angles (%)", percent=True),
        "retention": Metric("accuracy on the old task (%)", percent=True),
        "steps_to_loss": Metric("steps to the training loss", best="min"),
        "trainable_parameters": Metric("trainable parameters", best="min"),
        "ms_per_step": Metric("time per step (ms)", best="min"),
        "vector_drift": Metric("drift of singular vectors", best="min"),
        "singular_value_drift": Metric("drift of singular values", best="min"),
    }
    accepts: ClassVar[type[Training]] = Training
    tries: ClassVar[int] = 8
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)}
    seeds: ClassVar[Mapping[Any, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 3.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "turned by 45 degrees": turned_45,
            "turned by 30 degrees": turned_30,
            "few clothes turned by 60 degrees": far_turned_clothes,
        }

    @classmethod
    def references(cls) -> Mapping[str, Training]:
        decay = {"lr": (1e-3, 3e-3), "weight_decay": (0.0, 0.01, 0.1, 1.0)}
        return {
            "full fine-tuning": Training(optimizer=baselines.adamw, search=decay),
            "linear probe": Training(prepare=linear_probe, optimizer=baselines.adamw),
            "LoRA": Training(prepare=partial(lora, True), optimizer=undecayed, requires=("peft",)),
            "PiSSA": Training(prepare=partial(lora, "pissa"), optimizer=undecayed, requires=("peft",)),
            "SAM": Training(optimizer=sam, search={"lr": (1e-3, 3e-3), "rho": (0.01, 0.05, 0.1, 0.2)}),
            "R3F": Training(
                penalty=R3F, optimizer=undecayed, search={"lr": (1e-3, 3e-3), "weight": (0.1, 1.0, 5.0, 20.0)}
            ),
        }

    def run(self, trial: Trial, entrant: Training) -> Result:
        images = self._images(trial)
        base = self._pretrained(images, trial)
        x, y = rotate(images.target[0], self.angle), images.target[1]
        held_out = rotate(images.held_out[0], self.angle), images.held_out[1]
        bench = Workbench(
            entrant,
            lambda: copy.deepcopy(base),
            (x, y),
            held_out,
            num_classes=images.num_classes,
            epochs=trial.pick(smoke=3, laptop=20, paper=60),
            trial=trial,
            batch_size=50,
        )
        rule = bench.rule()
        if trial.searching:
            fit(bench, rule)
            return Result(score=accuracy(rule, *held_out))
        losses = [F.cross_entropy(predict(rule, x), y).item()]
        done = fit(bench, rule, after_epoch=lambda epoch: losses.append(F.cross_entropy(predict(rule, x), y).item()))
        steps = [float(bench.plan.steps_per_epoch * epoch) for epoch in range(len(losses))]
        at = {
            angle: accuracy(rule, rotate(images.test[0], angle), images.test[1])
            for angle in sorted({0.0, 15.0, 60.0, 75.0, self.angle})
        }
        others = [value for angle, value in at.items() if angle not in (0.0, self.angle)]
        return Result(
            {
                "target_accuracy": at[self.angle],
                "ood_accuracy": statistics.mean(others),
                "retention": at[0.0],
                "steps_to_loss": first_below(self.target_loss, steps, losses),
                "ms_per_step": 1e3 * done.seconds / done.steps,
                **_of_the_weights(base, rule),
            },
            {
                "training_loss": Curve(steps, losses, "step"),
                "accuracy": Curve(list(at), list(at.values()), "angle (degrees)"),
            },
        )

    def _images(self, trial: Trial) -> _Images:
        data = load(self.datasets(trial.budget)[0])
        sizes = trial.pick(
            smoke=(600, 200, 200), laptop=(10_000, self.samples, 1000), paper=(50_000, self.samples, 5000)
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        order = torch.randperm(len(y), generator=trial.generator())[: sum(sizes)].to(x.device)
        source, target, held_out = ((x[part], y[part]) for part in order.split(sizes))
        test = (data.x_test[:4000].to(trial.device), data.y_test[:4000].to(trial.device))
        return _Images(source, target, held_out, test, data.num_classes)

    def _pretrained(self, images: _Images, trial: Trial) -> Classifier:
        x, y = images.source
        epochs = trial.pick(smoke=8, laptop=6, paper=30)
        quiet = replace(trial, report=lambda fraction: None, setting={"lr": 0.05})

        def network() -> Classifier:
            return mlp(x[0].numel(), num_classes=images.num_classes)

        def train() -> dict[str, Tensor]:
            classes = images.num_classes
            bench = Workbench(Training(), network, (x, y), (x, y), num_classes=classes, epochs=epochs, trial=quiet)
            rule = Supervised(bench)
            fit(bench, rule)
            return {name: tensor.cpu() for name, tensor in rule.network.state_dict().items()}

        key = f"{self.name} mlp {self.dataset} {len(y)} samples {epochs} epochs seed {trial.seed}"
        model = trial.seeded(network).to(trial.device)
        model.load_state_dict(trial.cached(train, key=key))
        return model


def first_below(target: float, steps: Sequence[float], losses: Sequence[float]) -> float:
    """The step at which a falling loss reaches a target, interpolated in its logarithm; the last step if never.

    Example:
        >>> first_below(0.1, [0.0, 10.0, 20.0], [1.0, 0.2, 0.05])
        15.0
    """
    for i in range(1, len(losses)):
        if losses[i] <= target:
            before, after = math.log(max(losses[i - 1], target)), math.log(max(losses[i], 1e-12))
            share = (before - math.log(target)) / (before - after) if before > after else 1.0
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return steps[-1]


def _of_the_weights(base: Classifier, rule: Rule) -> dict[str, float]:
    """What is measured where one network is tuned."""
    if not isinstance(rule, Supervised):
        return {}
    network = cast(Classifier, rule.network)
    drifts = [singular_drift(effective_weight(base, n), effective_weight(network, n)) for n in hidden_layers(base)]
    return {
        "trainable_parameters": float(sum(p.numel() for p in network.parameters() if p.requires_grad)),
        "vector_drift": statistics.mean(drift.vectors for drift in drifts),
        "singular_value_drift": statistics.mean(drift.values for drift in drifts),
    }


def undecayed(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """AdamW without weight decay, which would pull adapters, not weights, to zero."""
    return torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)


def sam(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """SAM around AdamW; the setting has its radius."""
    return SAM(undecayed(parameters, plan), rho=float(plan.setting["rho"]))


class R3F:
    """The trust region as a penalty: symmetric divergence under input noise, with the setting's weight."""

    def __init__(self, network: nn.Module, plan: Plan, std: float = 0.1) -> None:
        self.network, self.weight, self.std = network, float(plan.setting["weight"]), std
        self.generator = plan.generator(2)

    def __call__(self, logits: Tensor, x: Tensor, index: Tensor) -> Tensor:
        noise = self.std * torch.randn(x.shape, generator=self.generator).to(x.device)
        with frozen_norm_stats(self.network):
            noisy = self.network(x + noise).log_softmax(1)
        clean = logits.log_softmax(1)
        there = F.kl_div(clean, noisy, reduction="batchmean", log_target=True)
        return self.weight * (there + F.kl_div(noisy, clean, reduction="batchmean", log_target=True))


def hidden_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers before the head: what adapters are put on."""
    features = cast(Classifier, network).features
    return [f"features.{name}" for name, layer in features.named_modules() if isinstance(layer, nn.Linear)]


def linear_probe(network: nn.Module, plan: Plan) -> None:
    """Only the head trains."""
    network.requires_grad_(False)
    cast(Classifier, network).head.requires_grad_(True)


def lora(init: bool | str, network: nn.Module, plan: Plan) -> None:
    """peft's LoRA of rank 8 on every hidden layer, and the head; PiSSA with `init="pissa"`.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('the LoRA baselines need peft: pip install "trimtab[peft]"') from error
    config = LoraConfig(r=8, lora_alpha=8, target_modules=hidden_layers(network), init_lora_weights=init)
    inject_adapter_in_model(config, network)
    cast(Classifier, network).head.requires_grad_(True)


@torch.no_grad()
def effective_weight(network: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The matrix that a linear layer applies, whatever an adapter has made of it."""
    layer = cast(nn.Linear, network.get_submodule(name))
    identity = torch.eye(layer.in_features, device=layer.weight.device)
    matrix: Tensor = layer(identity) - layer(torch.zeros_like(identity[:1]))
    return matrix.T


def rotate(x: Float[Tensor, "n channels height width"], degrees: float) -> Float[Tensor, "n channels height width"]:
    """Images turned about their centre, bilinearly, with zeros from outside."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


turned_45 = FineTuning()
turned_30 = FineTuning(angle=30.0)
far_turned_clothes = FineTuning(dataset="fashion_mnist", angle=60.0, samples=400)

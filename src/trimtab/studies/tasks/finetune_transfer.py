"""Fine-tuning a pre-trained network on few samples of a shifted task: what is gained, how fast, what is forgotten."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data import load
from trimtab.finetune import singular_drift
from trimtab.nets import Classifier, mlp
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import fit, predict

Adapt = Callable[[Classifier], object]
StepPenalty = Callable[[nn.Module, float], Tensor]


@dataclass(frozen=True)
class _Split:
    """Three disjoint parts of the training images and the test images; the last three are also used rotated."""

    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


@dataclass(frozen=True)
class _Tuned:
    """One fine-tuning run: loss on the training images at some steps, and what it came to."""

    model: Classifier
    lr: float
    steps: list[float]
    losses: list[float]
    accuracy: float
    ms_per_step: float
    trainable: int


@dataclass(frozen=True)
class FinetuneTransfer(Task):
    """Pre-train an MLP on upright images, then fine-tune it on a few rotated ones.

    The head goes on from its pre-trained weights and trains in every arm. Every arm has the same grid of learning
    rates and keeps the one with the best accuracy on rotated validation images (AdamW without weight decay, linear
    warm-up over a tenth of the steps, then cosine decay). The old task is judged with the pre-trained head.

    Attributes:
        dataset: "mnist" or "fashion_mnist"; at the smoke budget always digits.
        angle: rotation of the target images in degrees.
        samples: number of rotated training images.
        target_loss: the loss on all rotated training images that `steps_to_loss` waits for; a run that never reaches
            it counts its length.
    """

    dataset: str = "mnist"
    angle: float = 45.0
    samples: int = 1000
    target_loss: float = 0.1

    name: ClassVar[str] = "finetune-transfer"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "target_accuracy": Metric("accuracy on the new task (%)", percent=True),
        "retention": Metric("accuracy on the old task (%)", percent=True),
        "steps_to_loss": Metric("steps to the training loss", best="min"),
        "trainable_parameters": Metric("trainable parameters", best="min"),
        "ms_per_step": Metric("time per step (ms)", best="min"),
        "vector_drift": Metric("drift of singular vectors", best="min"),
        "singular_value_drift": Metric("drift of singular values", best="min"),
        "learning_rate": Metric("learning rate chosen", best=None),
    }

    def tune(self, adapt: Adapt | None = None, penalty: StepPenalty | None = None) -> Arm:
        """A contestant; without options it is full fine-tuning.

        Args:
            adapt: changes the pre-trained model in place, so that what shall train requires gradients.
            penalty: `(model, base learning rate) -> scalar`, back-propagated once per step beside the loss.
        """
        return self.arm(adapt=adapt, penalty=penalty)

    def run(self, trial: Trial, **options: Any) -> Result:
        split = self._split(trial)
        base = self._pretrained(split, trial)
        rates = trial.pick(smoke=[1e-3, 1e-2], laptop=RATES, paper=RATES)
        runs = []
        for done, lr in enumerate(rates):
            runs.append(self._tuned(base, split, lr, trial, **options))
            trial.report((done + 1) / len(rates))
        best = max(runs, key=lambda run: run.accuracy)
        old = copy.deepcopy(base)
        old.features = best.model.features
        drifts = [
            singular_drift(effective_weight(base, name), effective_weight(best.model, name))
            for name in hidden_layers(base)
        ]
        x, y = split.test
        reached = (step for step, loss in zip(best.steps, best.losses, strict=True) if loss <= self.target_loss)
        return Result(
            {
                "target_accuracy": _accuracy(best.model, rotate(x, self.angle), y),
                "retention": _accuracy(old, x, y),
                "steps_to_loss": next(reached, best.steps[-1]),
                "trainable_parameters": float(best.trainable),
                "ms_per_step": best.ms_per_step,
                "vector_drift": statistics.mean(drift.vectors for drift in drifts),
                "singular_value_drift": statistics.mean(drift.values for drift in drifts),
                "learning_rate": best.lr,
            },
            {"training_loss": Curve(best.steps, best.losses)},
        )

    def _split(self, trial: Trial) -> _Split:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        sizes = trial.pick(
            smoke=(600, 200, 200), laptop=(20_000, self.samples, 1000), paper=(50_000, self.samples, 5000)
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        order = torch.randperm(len(y), generator=trial.generator())[: sum(sizes)].to(x.device)
        source, target, validation = ((x[part], y[part]) for part in order.split(sizes))
        test = (data.x_test.to(trial.device), data.y_test.to(trial.device))
        return _Split(source, target, validation, test, data.num_classes)

    def _pretrained(self, split: _Split, trial: Trial) -> Classifier:
        x, y = split.source
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = mlp(x[0].numel(), num_classes=split.num_classes).to(trial.device)
        epochs = trial.pick(smoke=8, laptop=6, paper=30)

        def train() -> dict[str, Tensor]:
            quiet = Trial(seed=trial.seed, budget=trial.budget, device=trial.device)
            fit(model, x, y, num_classes=split.num_classes, epochs=epochs, trial=quiet)
            return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

        key = f"{self.name} mlp {self.dataset} {trial.budget} {len(y)} samples {epochs} epochs seed {trial.seed}"
        model.load_state_dict(trial.cached(train, key=key))
        return model

    def _tuned(
        self,
        base: Classifier,
        split: _Split,
        lr: float,
        trial: Trial,
        adapt: Adapt | None = None,
        penalty: StepPenalty | None = None,
    ) -> _Tuned:
        model = copy.deepcopy(base)
        if adapt is not None:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                adapt(model)
        model.head.requires_grad_(True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        steps, batch_size = trial.pick(smoke=40, laptop=300, paper=1000), 64
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
        x, y = rotate(split.target[0], self.angle), split.target[1]
        x_val, y_val = rotate(split.validation[0], self.angle), split.validation[1]
        draws, times, seen, losses = trial.generator(1), [], [], []
        for step in range(steps + 1):
            if step % 5 == 0:
                seen.append(float(step))
                losses.append(F.cross_entropy(predict(model, x), y).item())
            if step == steps:
                break
            index = torch.randint(len(y), (batch_size,), generator=draws).to(x.device)
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            if penalty is not None:
                penalty(model, lr).backward()
            optimizer.step()
            schedule.step()
            times.append(time.perf_counter() - started)
        return _Tuned(
            model=model,
            lr=lr,
            steps=seen,
            losses=losses,
            accuracy=_accuracy(model, x_val, y_val),
            ms_per_step=1e3 * statistics.quantiles(times, n=10)[0],  # the rest is what else the machine does
            trainable=sum(p.numel() for p in parameters),
        )


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def hidden_layers(model: Classifier) -> list[str]:
    """Names of the linear layers before the head: what adapters are put on."""
    return [f"features.{name}" for name, layer in model.features.named_modules() if isinstance(layer, nn.Linear)]


def linear_probe(model: Classifier) -> None:
    """Baseline: only the head trains."""
    model.requires_grad_(False)


def lora(model: Classifier, r: int = 8, init: bool | str = True) -> None:
    """Baseline: peft's LoRA on every hidden layer; PiSSA with `init="pissa"`.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('the LoRA baselines need peft: pip install "trimtab[peft]"') from error
    config = LoraConfig(r=r, lora_alpha=r, target_modules=hidden_layers(model), init_lora_weights=init)
    inject_adapter_in_model(config, model)


@torch.no_grad()
def effective_weight(model: Classifier, name: str) -> Float[Tensor, "out in"]:
    """The matrix that a linear layer applies, whatever an adapter has made of it."""
    layer = cast(nn.Linear, model.get_submodule(name))
    identity = torch.eye(layer.in_features, device=layer.weight.device)
    matrix: Tensor = layer(identity) - layer(torch.zeros_like(identity[:1]))
    return matrix.T


def rotate(x: Float[Tensor, "n channels height width"], degrees: float) -> Float[Tensor, "n channels height width"]:
    """Images turned about their centre, bilinearly, with zeros from outside."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def warm_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: linear over the first tenth, then down a cosine to zero."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _accuracy(model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    return (predict(model, x).argmax(1) == y).float().mean().item()

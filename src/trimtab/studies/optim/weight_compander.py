"""Do companded weights raise accuracy on few images, and do they have the shape the paper says they have?"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations

from trimtab import optim
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.small_data_classification import SmallDataClassification

few = SmallDataClassification(size=1000, epochs=40)
many = SmallDataClassification(size=10_000, epochs=6)
digits = SmallDataClassification(dataset="digits", net="mlp", size=1000, epochs=40)


def fixed(model: nn.Module) -> None:
    """Companded weights with the library's defaults."""
    optim.apply_weight_compander(model)


def learned(model: nn.Module) -> None:
    """Companded weights whose curves are trained."""
    optim.apply_weight_compander(model, learnable=True)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on all but the curves, which learn at a tenth of the rate."""
    return optim.compander_param_groups(model, weight_decay=weight_decay, lr=0.005)


def weight_norm(model: nn.Module) -> None:
    """Direction and length of each unit's weights apart, as torch does it."""
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrizations.weight_norm(layer)


def arms(task: SmallDataClassification, suffix: str, all_of_them: bool = True) -> dict[str, Arm]:
    """The contestants on a task."""
    main = {
        f"plain{suffix}": task.train(),
        f"WC{suffix}": task.train(prepare=fixed, groups=groups),
        f"WC, learned{suffix}": task.train(prepare=learned, groups=groups),
        # Near zero the curve multiplies a step by the square of its slope: this is what that does alone.
        f"plain, longer steps{suffix}": task.train(lr=0.05 * 1.5**2),
    }
    if not all_of_them:
        return main
    return main | {
        f"weight norm{suffix}": task.train(prepare=weight_norm),
        f"plain, no decay{suffix}": task.train(weight_decay=0.0),
        f"WC, no decay{suffix}": task.train(prepare=fixed, groups=groups, weight_decay=0.0),
    }


study = Study(
    paper="weight_compander",
    arms={**arms(few, ""), **arms(many, ", 10k", all_of_them=False), **arms(digits, ", digits")},
    claims=[
        *(Claim(f"WC{on}", below=f"plain{on}", on="kurtosis") for on in ("", ", 10k")),
        *(Claim(f"WC{on}", below=f"plain{on}", on="near_zero") for on in ("", ", 10k")),
        *(Claim(f"WC{on}", beats=f"plain{on}", on="test_accuracy") for on in ("", ", 10k", ", digits")),
        *(Claim(f"WC{on}", beats=f"plain, longer steps{on}", on="test_accuracy") for on in ("", ", 10k")),
        *(Claim(f"WC, learned{on}", beats=f"plain{on}", on="test_accuracy") for on in ("", ", 10k", ", digits")),
        *(Claim(f"WC{on}", beats=f"plain{on}", on="pruned_accuracy") for on in ("", ", 10k")),
    ],
    seeds={"laptop": 5},
    leaderboard=["plain", "plain, longer steps", "WC", "WC, learned", "weight norm", "plain, no decay", "WC, no decay"],
    notes=(
        "A small CNN with batch normalisation on 1,000 Fashion-MNIST images for 40 epochs and on 10,000 for 6, and an "
        "MLP on 1,000 digits for 40; SGD with momentum at a cosine-annealed learning rate of 0.05, and a weight decay "
        "of 5e-4 unless it says otherwise. Learned curves have a tenth of that learning rate: at the whole of it, "
        "trainings on digits diverged, two of three on seeds that the study does not use and one on a seed that it "
        "does. Nothing else was tried. The "
        "curve's slope of 1.5 makes steps near zero 2.25 times as long, which a plain network has too where it says "
        "longer steps. The curve is the library's reconstruction from the paper's abstract; the paper's formula may "
        "differ from it."
    ),
)

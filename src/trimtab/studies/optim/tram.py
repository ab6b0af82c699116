"""Does a radius set by the trust region keep more of other domains in fine-tuning than SAM's best radius?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import optim
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.rotated_finetuning import RotatedFinetuning, Stepper, consistency

rotated = RotatedFinetuning()


def sam(model: nn.Module, base: torch.optim.Optimizer, rho: float, generator: torch.Generator) -> Stepper:
    """SAM; the knob is its radius."""
    optimizer = optim.SAM(base, rho=rho, model=model)

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def tram(model: nn.Module, base: torch.optim.Optimizer, anchor: Callable[[Tensor], Tensor]) -> Stepper:
    """TRAM with an anchor."""
    optimizer = optim.TRAM(base, model)

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> tuple[Tensor, Callable[[], Tensor]]:
            optimizer.zero_grad()
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
            return loss, lambda: optim.trust_region_divergence(anchor(x), logits)

        optimizer.step(closure)

    return step


def tram_theta(model: nn.Module, base: torch.optim.Optimizer, decay: float, generator: torch.Generator) -> Stepper:
    """TRAM from past weights; the knob is how far back they reach."""
    return tram(model, base, optim.ParameterAnchor(model, decay, optimizer=base))


def tram_x(model: nn.Module, base: torch.optim.Optimizer, std: float, generator: torch.Generator) -> Stepper:
    """TRAM from noisy inputs; the knob is the size of the noise."""
    return tram(model, base, optim.InputNoiseAnchor(model, std, generator=generator))


study = Study(
    paper="tram",
    arms={
        "AdamW": rotated.tune(),
        "R3F": rotated.tune(method=consistency, knob=(0.1, 1.0, 5.0)),
        "SAM": rotated.tune(method=sam, knob=(0.01, 0.05, 0.1)),
        "TRAM-theta": rotated.tune(method=tram_theta, knob=(0.0, 0.9, 1.0)),
        "TRAM-x": rotated.tune(method=tram_x, knob=(0.01, 0.1, 0.3)),
    },
    claims=[
        Claim("TRAM-theta", beats="AdamW", on="ood_accuracy", by=0.003),
        Claim("TRAM-theta", beats="R3F", on="ood_accuracy"),
        Claim("TRAM-theta", beats="SAM", on="ood_accuracy"),
        Claim("TRAM-x", beats="AdamW", on="ood_accuracy", by=0.003),
        Claim("TRAM-x", beats="R3F", on="ood_accuracy"),
        Claim("TRAM-x", beats="SAM", on="ood_accuracy"),
        Claim(
            "TRAM-theta",
            below="AdamW",
            on="ms_per_step",
            times=1 / 2.4,
            text="TRAM-theta: a step takes no more than 2.4 times AdamW's",
        ),
    ],
    seeds={"laptop": 5},
    plot=[],
    notes=(
        "A small CNN, pre-trained for 2 epochs on 10,000 upright MNIST digits and fine-tuned for 5 on 1,000 others "
        "turned by 30 degrees; tested at 0, 45 and 60. The learning rate is AdamW's best of four, for every arm. Then "
        "every arm has three values of one setting: weight decay of AdamW, weight of R3F's penalty, radius of SAM, "
        "decay of TRAM-theta's anchor, input noise of TRAM-x. Both are chosen by the accuracy on held-out images at 30 "
        "degrees, and no other angle is looked at. Step times are processor time on one thread."
    ),
)

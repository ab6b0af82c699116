"""Does it help a network to rely on two views in inverse proportion to their variance?

2,000 training images. MNIST is seen twice, once clean and once with noise of deviation 1.5; of Fashion-MNIST one view
has the left half with noise of 0.1, the other the right half with 0.5. The encoders are MLPs (64-32) under one linear
head, trained for 16 epochs by SGD with momentum. Every arm chooses on 1,000 held-out images among three learning rates
and two values of its own: weight decay (joint, one view), alpha (OGM-GE), or the weight of the unimodal losses, 1 or
the authors' 4. ARL has the authors' temperature of 8, and a warm-up of 5 % of the epochs as theirs. ARL's factors of
the encoders' gradients add up to 3, whatever the views: the arm 'gradients times 1.5' shares them out evenly, and has
everything of ARL except its asymmetry. OGM-GE modulates in the first half of training, as in its release. The variance
of a view is judged by the entropy of its predictions, as in the paper; imbalance is the distance between the logarithms
of the dependence ratio and the inverse entropy ratio on the test images.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.losses import AsymmetricLearning
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.losses.arl.two_views import (
    METRICS,
    WEIGHT_DECAYS,
    Objective,
    TwoViewNet,
    TwoViews,
    Views,
    joint,
    ogm_ge,
    one_view,
    scaled_unimodal_losses,
    unimodal_losses,
)

# Of as many values for every arm: the strength of OGM-GE, and the weight of the unimodal losses.
ALPHAS, GAMMAS = (0.1, 0.8), (1.0, 4.0)


def arl(model: TwoViewNet, optimizer: torch.optim.Optimizer, gamma: float, generator: torch.Generator) -> Objective:
    """ARL; the knob is the weight of its unimodal losses."""
    criterion = AsymmetricLearning(gamma=gamma)

    def objective(views: Views, y: Tensor, progress: float) -> None:
        criterion.set_epoch(int(100 * progress))  # the authors train for 100 epochs
        logits, alone = model.fusion(criterion.modulate(model.features(views), model.fusion))
        criterion(logits, alone, y).backward()

    return objective


def experiment(name: str, views: TwoViews, seeds: int) -> Experiment:
    """Contestants on one pair of views."""
    return Experiment(
        name,
        {
            "joint": partial(views.train, method=joint, knob=WEIGHT_DECAYS),
            "clearer view alone": partial(views.train, method=one_view, knob=WEIGHT_DECAYS, judged=0),
            "OGM-GE": partial(views.train, method=ogm_ge, knob=ALPHAS),
            "unimodal losses": partial(views.train, method=unimodal_losses, knob=GAMMAS),
            "unimodal losses, gradients times 1.5": partial(views.train, method=scaled_unimodal_losses, knob=GAMMAS),
            "ARL": partial(views.train, method=arl, knob=GAMMAS),
        },
        METRICS,
        seeds={"smoke": 1, "laptop": seeds, "paper": 5},
        reads=(views.dataset,),
        cost=5.5,
    )


copies = experiment("clean and noisy copy", TwoViews("mnist", "copies", (0.0, 1.5)), seeds=6)
halves = experiment("left and right half", TwoViews("fashion_mnist", "halves", (0.1, 0.5)), seeds=5)

study = Study(
    paper="arl",
    experiments=[copies, halves],
    headline=Claim("ARL", beats="unimodal losses, gradients times 1.5", on="accuracy", at=copies),
    claims=[
        Claim("ARL", beats="clearer view alone", on="accuracy", at=copies),
        Claim("ARL", beats="OGM-GE", on="accuracy", at=copies),
        Claim("ARL", beats="joint", on="accuracy", by=0.005, at=copies),
        Claim("ARL", below="unimodal losses", on="imbalance", at=copies),
        Claim("ARL", beats="unimodal losses, gradients times 1.5", on="accuracy", at=halves),
        Claim("ARL", beats="OGM-GE", on="accuracy", at=halves),
    ],
)

"""Can clients train longer between rounds with FedSpeed than with FedAvg, FedProx or a sharpness-aware FedAvg?"""

from __future__ import annotations

from trimtab.federated import FedAvg, FedSpeed
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.federated_images import FederatedImages

images = FederatedImages(fraction=0.2)

# All with the authors' learning rate and its decay, weight decay and clipping.
contestants = {
    "FedAvg": lambda epochs: FedAvg(0.1, epochs, weight_decay=1e-3, max_norm=10.0, lr_decay=0.998),
    "FedProx": lambda epochs: FedAvg(0.1, epochs, prox=0.1, weight_decay=1e-3, max_norm=10.0, lr_decay=0.998),
    "FedSAM": lambda epochs: FedSpeed(0.1, prox=0.0, local_epochs=epochs),
    "FedSpeed": lambda epochs: FedSpeed(0.1, local_epochs=epochs),
}

study = Study(
    paper="fedspeed",
    arms={
        f"{name}, {epochs} epochs" if epochs > 1 else f"{name}, 1 epoch": images.train(make, local_epochs=epochs)
        for epochs in (1, 5, 10)
        for name, make in contestants.items()
    },
    claims=[
        Claim(f"FedSpeed, {epochs} epochs", beats=f"{other}, {epochs} epochs", on="late_accuracy", by=0.02)
        for epochs in (5, 10)
        for other in ("FedAvg", "FedProx", "FedSAM")
    ],
    plot=["test_accuracy"],
    leaderboard=[f"{name}, 5 epochs" for name in contestants],
    notes=(
        "20 clients of 500 images, 4 of them in a round, for 30 rounds; the paper has 100 clients, 10 in a round, and "
        "800 to 1500 rounds of a ResNet-18 on CIFAR. With so few participants the accuracy swings from round to round, "
        "so the claims are about the mean of the last five."
    ),
)

"""FedSpeed against FedAvg, FedProx and FedSAM as clients train longer between rounds."""

from __future__ import annotations

from trimtab.federated import FedAvg, FedSpeed
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.federated_images import FederatedImages

images = FederatedImages(fraction=0.2)

"""Networks that several contestants of a run want: trained by the first of them, and read back by the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from trimtab.studies.engine.study import Trial

M = TypeVar("M", bound=nn.Module)


def trained_once(trial: Trial, network: M, train: Callable[[], object], *, key: str) -> M:
    """The network with the weights that training gives it, in place.

    Args:
        trial: the run.
        network: is changed.
        train: trains it in place, or returns another network whose weights it takes, such as an average.
        key: names what the training depends on, the seed included where it matters; see `Trial.cached`.
    """

    def weights() -> dict[str, Tensor]:
        found = train()
        trained = found if isinstance(found, nn.Module) else network
        return {name: part.cpu() for name, part in trained.state_dict().items()}

    network.load_state_dict(trial.cached(weights, key=key))
    return network

"""How runs are to be done: the budget, the seeds, and where they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from trimtab.studies.engine.study import BUDGETS, Budget

Backend = Literal["loky", "dask", "ray"]


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        budget: the budget of every run.
        seeds: number of seeds; None leaves it to each study.
        jobs: parallel runs; None means one for each core (of the cluster, where there is one).
        backend: "loky" (processes on this machine), "dask" or "ray".
        address: of the cluster's scheduler; None starts one on this machine.
        device: a torch device string.
        rerun: run again what is stored.
    """

    budget: Budget = "laptop"
    seeds: int | None = None
    jobs: int | None = None
    backend: Backend = "loky"
    address: str | None = None
    device: str = "cpu"
    rerun: bool = False

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}")
        for name, value in (("seeds", self.seeds), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.address is not None and self.backend == "loky":
            raise ValueError("address names a cluster's scheduler: give it with backend 'dask' or 'ray'")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"device must be one that PyTorch has here, got {self.device!r} ({why})") from None

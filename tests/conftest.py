"""What all tests share."""

import os

# pytest-xdist runs a process for each core; more threads in each would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def same_draws_every_time() -> None:
    """A test that draws without a generator draws the same whatever ran before it."""
    seed = int(os.environ.get("TRIMTAB_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)

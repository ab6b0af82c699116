"""The most memory that a piece of work holds at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(work: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors allocated by `work` that are alive at the same time; what was there before is left out.

    On a GPU it is the allocator's own peak; on a CPU it comes from the profiler's record of every allocation.

    Example:
        >>> peak_memory(lambda: torch.empty(1000) + torch.empty(1000))
        12000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _quiet_start_and_end():
        recorder.__enter__()
    try:
        work()
    finally:
        with _quiet_start_and_end():
            recorder.__exit__(None, None, None)
    # The profiler's public events give a sum for each operator; its record has every allocation and release.
    record = cast(Any, recorder.profiler).kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in record if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_start_and_end() -> Iterator[None]:
    """Some builds of the profiler write a line to the process's standard error when it starts and when it ends."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

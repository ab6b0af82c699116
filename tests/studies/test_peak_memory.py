"""Peak memory of work whose allocations are known."""

import torch
from torch import nn

from trimtab.studies.tools.peak_memory import peak_memory


def test_what_is_freed_does_not_count_twice():
    def work():
        for _ in range(3):
            torch.empty(1000)

    assert peak_memory(work) == 4000


def test_what_was_held_before_is_left_out():
    held = torch.ones(10_000)
    assert peak_memory(lambda: held.add_(1)) < 4000


def test_a_training_step_holds_activations_gradients_and_state():
    model, x = nn.Linear(100, 50, bias=False), torch.ones(8, 100)

    def step(optimizer):
        (model(x).square().sum()).backward()
        optimizer.step()

    plain = peak_memory(lambda: step(torch.optim.SGD(model.parameters(), lr=0.1)))
    model.zero_grad()
    adam = peak_memory(lambda: step(torch.optim.Adam(model.parameters(), lr=0.1, foreach=False)))
    assert plain >= 4 * 50 * 100
    assert adam - plain >= 2 * 4 * 50 * 100


def test_standard_error_is_kept(capfd):
    def work():
        import sys

        print("said", file=sys.stderr)

    peak_memory(work)
    assert "said" in capfd.readouterr().err

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.federated import average_states, flatten, unflatten
from trimtab.federated.state_dicts import model_state


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_flatten_and_back() -> None:
    state = network().state_dict()
    vector = flatten(state)
    assert vector.shape == (3 * 4 + 4 + 4 * 4,)
    back = unflatten(2 * vector, state)
    assert back.keys() == state.keys()
    assert torch.equal(back["0.weight"], 2 * state["0.weight"])
    assert torch.equal(back["1.running_var"], 2 * state["1.running_var"])
    assert back["1.num_batches_tracked"].dtype == torch.int64


def test_integers_are_the_first_ones_and_floats_are_averaged() -> None:
    one = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([5.0]), "n": torch.tensor(8)}
    mean = average_states([one, two], [3, 1])
    assert mean == {"w": torch.tensor([2.0]), "n": torch.tensor(3)}
    assert one["w"].item() == 1.0


def test_complex_entries_are_averaged_and_stand_in_the_vector_as_pairs() -> None:
    one = {"w": torch.tensor([1 + 1j, 2 - 2j]), "b": torch.ones(1), "on": torch.tensor(True)}
    two = {"w": torch.tensor([3 + 5j, -2 + 2j]), "b": torch.zeros(1), "on": torch.tensor(False)}
    mean = average_states([one, two], [1, 3])
    assert torch.equal(mean["w"], torch.tensor([2.5 + 4j, -1 + 1j]))
    assert (mean["b"].item(), mean["on"].item()) == (0.25, True)
    vector = flatten(one)
    assert vector.tolist() == [1, 1, 2, -2, 1]
    assert torch.equal(unflatten(2 * vector, one)["w"], 2 * one["w"])
    assert torch.equal(flatten({"w": one["w"].conj()}), torch.tensor([1.0, -1.0, 2.0, 2.0]))


def test_the_order_is_kept_in_the_sum() -> None:
    states = [{"w": torch.tensor([v], dtype=torch.float32)} for v in (1e8, 1.0, -1e8)]
    assert average_states(states)["w"].item() != average_states([states[0], states[2], states[1]])["w"].item()


def test_model_state_is_a_copy() -> None:
    model = network()
    state = model_state(model)
    nn.init.zeros_(model[0].weight)
    assert state["0.weight"].abs().sum() > 0
    assert not state["0.weight"].requires_grad


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: average_states([]), "states"),
        (lambda s: average_states([s, s], [1.0]), "weights"),
        (lambda s: average_states([s, s], [0.0, 0.0]), "weights"),
        (lambda s: average_states([s, s], [2.0, -1.0]), "weights"),
        (lambda s: average_states([s, s], [1.0, float("nan")]), "weights"),
        (lambda s: average_states([s, s], [1.0, float("inf")]), "weights"),
        (lambda s: average_states([s, {}]), "0.weight"),
        (lambda s: average_states([s, s | {"0.bias": torch.zeros(9)}]), "0.bias"),
        (lambda s: unflatten(torch.zeros(5), s), "vector"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(network().state_dict())

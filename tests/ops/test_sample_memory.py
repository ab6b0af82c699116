from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import SampleMemory


def test_rows_start_from_init() -> None:
    memory = SampleMemory(3, 2, init=5.0)
    assert torch.equal(memory.read(torch.tensor([2, 0, 2])), torch.full((3, 2), 5.0))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8), st.floats(0, 0.99))
def test_write_and_average_touch_their_rows_alone(order: list[int], batch: int, momentum: float) -> None:
    memory, index = SampleMemory(8, 3).double(), torch.tensor(order[:batch])
    start = torch.rand(8, 3, dtype=torch.float64)
    memory.write(torch.arange(8), start)
    value = torch.rand(batch, 3, dtype=torch.float64)
    rows = memory.average(index, value, momentum)
    expected = start.clone()
    expected[index] = momentum * start[index] + (1 - momentum) * value
    torch.testing.assert_close(memory.rows, expected)
    torch.testing.assert_close(rows, expected[index])


def test_what_was_read_does_not_change_with_the_memory() -> None:
    memory, index = SampleMemory(4), torch.tensor([1, 2])
    read = memory.read(index)
    memory.write(index, torch.ones(2))
    assert torch.equal(read, torch.zeros(2))


def test_gradient_stops_at_the_memory() -> None:
    memory, value = SampleMemory(4, 2), torch.rand(2, 2, requires_grad=True)
    rows = memory.average(torch.tensor([1, 2]), value, 0.5)
    assert not rows.requires_grad
    assert not memory.rows.requires_grad


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0, 4]), ValueError, r"index must be in \[0, 4\), got 4"),
        (torch.tensor([-1, 2]), ValueError, "index must be .*got -1"),
        (torch.tensor([2, 1, 2]), ValueError, "index must hold a sample once in a batch, got 2"),
        (torch.tensor([1.0]), TypeError, "index must be int64.*got torch.float32"),
        (torch.tensor(1), ValueError, "index must be .*got shape"),
        (torch.tensor([], dtype=torch.int64), ValueError, "index must be .*got shape"),
    ],
)
def test_bad_index_is_refused_and_nothing_written(index: torch.Tensor, error: type, message: str) -> None:
    memory = SampleMemory(4)
    with pytest.raises(error, match=message):
        memory.write(index, torch.ones(index.shape))
    assert torch.equal(memory.rows, torch.zeros(4))


def test_repeats_may_be_read() -> None:
    assert SampleMemory(4).read(torch.tensor([1, 1])).shape == (2,)


def test_value_of_another_shape_is_refused() -> None:
    memory = SampleMemory(4, 3)
    for call in (memory.write, lambda index, value: memory.average(index, value, 0.5)):
        with pytest.raises(ValueError, match="value must be of shape"):
            call(torch.tensor([1, 2]), torch.ones(2, 2))


@pytest.mark.parametrize(("sizes", "name"), [((0,), "num_samples"), ((3, 0), "shape")])
def test_sizes_must_be_positive(sizes: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SampleMemory(*sizes)


def test_an_accelerator_is_never_waited_for() -> None:
    # The meta device has no values: whatever looks at one raises.
    memory, index = SampleMemory(4, 3).to("meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert memory.average(index, torch.ones(2, 3, device="meta"), 0.5).shape == (2, 3)


def test_an_index_on_the_cpu_is_checked_for_a_memory_elsewhere() -> None:
    memory = SampleMemory(4, 3).to("meta")
    assert memory.read(torch.tensor([1, 2])).is_meta
    with pytest.raises(ValueError, match="got 2 more than once"):
        memory.write(torch.tensor([2, 2]), torch.ones(2, 3, device="meta"))


def test_compiled_code_refuses_too() -> None:
    memory = SampleMemory(4)
    write = torch.compile(memory.write, fullgraph=True, backend="aot_eager")
    write(torch.tensor([1, 2]), torch.ones(2))
    assert torch.equal(memory.rows, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    for spoilt in (torch.tensor([3, 3]), torch.tensor([0, 4])):
        with pytest.raises(RuntimeError, match="index"):
            write(spoilt, torch.full((2,), 7.0))
    assert torch.equal(memory.rows, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_rows_that_are_not_finite_are_left_out() -> None:
    memory, index = SampleMemory(4, 2), torch.tensor([2, 0, 1])
    value = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3.0, float("inf")]])
    memory.write(index, value)
    assert memory.rows.tolist() == [[0, 0], [0, 0], [1, 2], [0, 0]]
    assert memory.average(index, value, 0.5).tolist() == [[1, 2], [0, 0], [0, 0]]


def test_an_infinity_that_was_there_may_stay() -> None:
    memory, index = SampleMemory(2, 2, init=float("inf")), torch.tensor([0, 1])
    memory.write(index, torch.tensor([[1.0, float("inf")], [float("nan"), float("inf")]]))
    assert memory.rows.tolist() == [[1.0, float("inf")], [float("inf"), float("inf")]]


def test_repeats_take_the_mean_of_their_finite_values_in_any_order() -> None:
    index, value = torch.tensor([3, 1, 3, 3, 0]), torch.tensor([1.0, 7.0, 3.0, float("nan"), float("nan")])
    for order in (range(5), (4, 2, 0, 3, 1)):
        memory, order = SampleMemory(4, init=5.0, repeats="mean"), torch.tensor(list(order))
        read = memory.update(index[order], lambda rows, order=order: value[order])
        assert memory.rows.tolist() == [5.0, 7.0, 5.0, 2.0]
        assert read.tolist() == memory.rows[index[order]].tolist()


def test_a_running_average_moves_once_for_a_sample_that_comes_twice() -> None:
    memory = SampleMemory(3, 2, repeats="mean")
    memory.average(torch.tensor([1, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.8)
    torch.testing.assert_close(memory.rows[1], torch.tensor([0.1, 0.1]))


def test_repeats_compile_and_change_no_shape() -> None:
    memory = SampleMemory(4, repeats="mean")
    write = torch.compile(memory.write, fullgraph=True, backend="aot_eager")
    write(torch.tensor([1, 1]), torch.tensor([2.0, 4.0]))
    assert memory.rows.tolist() == [0, 3, 0, 0]


def test_an_unknown_rule_for_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be one of"):
        SampleMemory(3, repeats="last")


def test_a_memory_in_half_precision_is_written_under_autocast() -> None:
    memory = SampleMemory(4, 2).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory.update(torch.tensor([1]), lambda rows: rows.index_copy(1, torch.tensor([0]), torch.ones(1, 1).half()))
    assert memory.rows[1].tolist() == [1, 0]


def test_what_is_refused_changes_nothing() -> None:
    memory = SampleMemory(4, 2)
    for call in (
        lambda: memory.update(torch.tensor([0]), lambda rows: rows[:, :1] + 1),
        lambda: memory.check(torch.tensor([1, 1])),
        lambda: memory.check(torch.tensor([4])),
    ):
        with pytest.raises(ValueError, match=r"index|value"):
            call()
    assert not memory.rows.any()


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_that_is_no_share_is_refused_and_moves_nothing(momentum: float) -> None:
    memory = SampleMemory(2)
    with pytest.raises(ValueError, match=r"^momentum must be in \[0, 1\]"):
        memory.average(torch.tensor([0]), torch.ones(1), momentum)
    assert memory.rows.tolist() == [0.0, 0.0]

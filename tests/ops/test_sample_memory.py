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
        (torch.tensor([0, 4]), ValueError, r"index: values from 0 to 4.*\[0, 4\)"),
        (torch.tensor([-1, 2]), ValueError, "index: values from -1"),
        (torch.tensor([2, 1, 2]), ValueError, "index: 2 occurs more than once"),
        (torch.tensor([1.0]), TypeError, "index: dtype torch.float32"),
        (torch.tensor(1), ValueError, "index: shape"),
        (torch.tensor([], dtype=torch.int64), ValueError, "index: shape"),
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
        with pytest.raises(ValueError, match="value: shape"):
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
    with pytest.raises(ValueError, match="index: 2 occurs"):
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

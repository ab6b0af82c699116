from __future__ import annotations

import itertools

import pytest
import torch

from trimtab.domain import domain_batches
from trimtab.domain.environments import checked_domains


def numbered(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Domains whose samples are numbered: x is 100 times the domain plus the row."""
    return [(torch.arange(size).float()[:, None] + 100 * d, torch.arange(size) % 3) for d, size in enumerate(sizes)]


def test_as_many_of_each_domain_and_labels_stay_with_their_samples() -> None:
    draws = torch.Generator().manual_seed(0)
    for batch in itertools.islice(domain_batches(numbered(10, 7, 4), 4, generator=draws), 9):
        assert [len(y) for _, y in batch] == [4, 4, 4]
        for d, (x, y) in enumerate(batch):
            row = x[:, 0].long() - 100 * d
            assert ((row >= 0) & (row < (10, 7, 4)[d])).all()
            assert torch.equal(y, row % 3)


def test_no_sample_comes_twice_before_the_order_is_drawn_anew() -> None:
    batches = domain_batches(numbered(9), 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        seen = torch.cat([next(batches)[0][0] for _ in range(3)])[:, 0]
        assert sorted(seen.tolist()) == list(range(9))


def test_a_small_domain_gives_all_it_has() -> None:
    batch = next(domain_batches(numbered(8, 2), 4, generator=torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in batch] == [4, 2]


def test_the_generator_decides() -> None:
    first, again, other = (
        torch.cat([x for x, _ in next(domain_batches(numbered(50, 50), 8, generator=torch.Generator().manual_seed(s)))])
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_batches_are_refused_by_name() -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    for wrong, error, words in (
        ([], ValueError, "at least 1 domain"),
        ([(x, y.float())], TypeError, "int64"),
        ([(x, y[:3])], ValueError, "batches.0."),
        ([(x[:0], y[:0])], ValueError, "at least one sample"),
        ([(x, y), (x[:, :1], y)], ValueError, "one shape"),
        ([x], TypeError, "pair"),
    ):
        with pytest.raises(error, match=words):
            checked_domains(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2 domains"):
        checked_domains([(x, y)], least=2)
    with pytest.raises(ValueError, match="as many samples"):
        checked_domains([(x, y), (x[:2], y[:2])], even=True)
    with pytest.raises(ValueError, match="batch_size"):
        domain_batches([(x, y)], 0)

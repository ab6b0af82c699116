from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.federated import dirichlet_partition, long_tailed, shard_partition


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def class_shares(targets: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    counts = torch.stack([torch.bincount(targets[p], minlength=int(targets.max()) + 1) for p in parts]).double()
    return counts / counts.sum(1, keepdim=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.floats(0.01, 100), st.booleans(), st.integers(0, 1000), st.integers(1, 6),
)  # fmt: skip
def test_dirichlet_deals_each_sample_once(clients: int, alpha: float, balanced: bool, seed: int, classes: int) -> None:
    targets = torch.randint(classes, (97,), generator=seeded(seed))
    parts = dirichlet_partition(targets, clients, alpha, balanced=balanced, min_size=0, generator=seeded(seed))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(97))
    if balanced:
        assert {len(p) for p in parts} <= {97 // clients, 97 // clients + 1}


@pytest.mark.parametrize("balanced", [True, False])
def test_alpha_decides_how_alike_clients_are(balanced: bool) -> None:
    targets = torch.arange(10).repeat_interleave(400)
    largest = {
        alpha: class_shares(
            targets, dirichlet_partition(targets, 10, alpha, balanced=balanced, generator=seeded(), min_size=1)
        )
        .amax(1)
        .mean()
        .item()
        for alpha in (0.05, 0.5, 1000.0)
    }
    assert largest[0.05] > 0.6
    assert largest[0.05] > largest[0.5] > largest[1000.0]
    assert largest[1000.0] < 0.13


def test_unbalanced_shares_have_dirichlet_moments() -> None:
    # Of one class, client i's share is Beta(a, (N-1)a): mean 1/N, variance (1/N)(1 - 1/N) / (Na + 1).
    targets, n, alpha = torch.zeros(1000, dtype=torch.long), 4, 0.5
    draw = seeded()
    shares = (
        torch.tensor(
            [[len(p) for p in dirichlet_partition(targets, n, alpha, min_size=0, generator=draw)] for _ in range(500)]
        ).double()
        / 1000
    )
    assert shares.mean(0).sub(0.25).abs().max() < 0.04
    assert shares.var() == pytest.approx(0.25 * 0.75 / (n * alpha + 1), rel=0.1)


def test_tiny_alpha_does_not_underflow() -> None:
    targets = torch.arange(3).repeat(30)
    parts = dirichlet_partition(targets, 3, 1e-4, balanced=True, generator=seeded())
    assert [len(p) for p in parts] == [30, 30, 30]


def test_min_size() -> None:
    targets = torch.arange(10).repeat(50)
    parts = dirichlet_partition(targets, 10, 0.3, min_size=20, generator=seeded())
    assert min(map(len, parts)) >= 20


@pytest.mark.parametrize("split", ["dirichlet", "balanced", "shards"])
def test_reproducible(split: str) -> None:
    targets = torch.arange(10).repeat(20)

    def draw(seed: int) -> torch.Tensor:
        if split == "shards":
            return torch.cat(shard_partition(targets, 5, generator=seeded(seed)))
        return torch.cat(dirichlet_partition(targets, 5, 0.5, balanced=split == "balanced", generator=seeded(seed)))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_bound_the_classes_of_a_client(shards: int) -> None:
    targets = torch.arange(10).repeat(60)[torch.randperm(600, generator=seeded())]
    parts = shard_partition(targets, 10, shards, generator=seeded())
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(600))
    assert {len(p) for p in parts} == {60}
    # 600 samples cut into 10 * shards pieces: a piece lies within one class, or touches two where they do not divide.
    limit = shards if shards != 3 else 2 * shards
    assert max(len(targets[p].unique()) for p in parts) <= limit


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda t: dirichlet_partition(t, 0, 1.0), "num_clients"),
        (lambda t: dirichlet_partition(t, 31, 1.0), "num_clients"),
        (lambda t: dirichlet_partition(t, 3, 0.0), "alpha"),
        (lambda t: dirichlet_partition(t, 3, float("nan")), "alpha"),
        (lambda t: dirichlet_partition(t, 3, 1.0, min_size=11), "min_size"),
        (lambda t: dirichlet_partition(t, 4, 1e-3, min_size=7), "min_size"),
        (lambda t: dirichlet_partition(t.float(), 3, 1.0), "targets"),
        (lambda t: dirichlet_partition(t[None], 3, 1.0), "targets"),
        (lambda t: shard_partition(t, 3, 0), "shards_per_client"),
        (lambda t: shard_partition(t, 3, 11), "shards_per_client"),
    ],
)
def test_bad_arguments_are_named(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.arange(3).repeat(10))


def test_arrays_and_numpys_integers_are_taken() -> None:
    targets = torch.arange(3).repeat(10)
    for deal in (dirichlet_partition, shard_partition):
        for array in (targets.numpy(), targets.numpy().astype(np.uint8)):
            found = deal(array, np.int64(3), np.int64(2), generator=seeded())
            for part, expected in zip(found, deal(targets, 3, 2, generator=seeded()), strict=True):
                assert torch.equal(part, expected)
    with pytest.raises(TypeError, match="targets must be"):
        dirichlet_partition(np.array(["a", "b"]), 2, 1.0)


class TestLongTailed:
    targets = torch.arange(4).repeat(200)

    def test_sizes_fall_exponentially_in_the_order_given(self) -> None:
        order = torch.tensor([2, 0, 3, 1])
        kept = long_tailed(self.targets, 0.008, most=125, order=order, generator=torch.Generator().manual_seed(0))
        assert torch.bincount(self.targets[kept])[order].tolist() == [125, 25, 5, 1]
        assert len(kept.unique()) == len(kept)

    def test_without_imbalance_everything_is_kept(self) -> None:
        assert torch.equal(long_tailed(self.targets, 1.0).sort().values, torch.arange(800))

    def test_the_generator_decides(self) -> None:
        one, two = (long_tailed(self.targets, 0.1, generator=torch.Generator().manual_seed(i)) for i in (0, 0))
        assert torch.equal(one, two)
        assert not torch.equal(one, long_tailed(self.targets, 0.1, generator=torch.Generator().manual_seed(1)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"imbalance": 0.0}, "imbalance must be in"),
            ({"imbalance": 0.5, "most": 201}, "targets must hold 201 samples of class 0"),
            ({"imbalance": 0.5, "order": torch.tensor([0, 1, 2, 2])}, "order must be each of the labels"),
        ],
    )
    def test_refusals(self, options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            long_tailed(self.targets, **options)

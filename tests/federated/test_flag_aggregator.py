from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.federated import FlagAggregator, flag_aggregate, flag_subspace


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(updates: torch.Tensor) -> torch.Tensor:
    return updates / updates.norm(dim=1, keepdim=True)


class TestByHand:
    def test_equal_rows_give_their_direction(self) -> None:
        row = drawn(7)
        got = flag_aggregate(torch.outer(torch.tensor([1.0, 3.0, 0.2, 5.0], dtype=torch.float64), row))
        torch.testing.assert_close(got, row / row.norm())

    def test_a_reversed_long_row_counts_as_one(self) -> None:
        rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-10.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(flag_aggregate(rows, rank=1), torch.tensor([1 / 3, 0], dtype=torch.float64))

    def test_full_rank_is_the_mean_of_directions(self) -> None:
        rows = drawn(5, 20)
        torch.testing.assert_close(flag_aggregate(rows, rank=5), directions(rows).mean(0))
        torch.testing.assert_close(flag_aggregate(rows, rank=5, normalize=False), rows.mean(0))

    def test_one_step_is_the_leading_singular_subspace(self) -> None:
        rows = drawn(6, 9)
        found = flag_subspace(rows, rank=2, n_iter=1)
        right = torch.linalg.svd(directions(rows), full_matrices=False).Vh[:2].T
        torch.testing.assert_close(found.basis @ found.basis.T, right @ right.T)
        torch.testing.assert_close(flag_aggregate(rows, rank=2, n_iter=1), right @ right.T @ directions(rows).mean(0))

    def test_two_steps_as_written_out(self) -> None:
        rows, lam, eps, p = drawn(5, 8), 0.7, 1e-7, 5
        x = directions(rows)
        pairs = [(x[i] - x[j]) / (x[i] - x[j]).norm() for i in range(p) for j in range(p) if i != j]
        columns = torch.stack([*x, *pairs])
        share = torch.tensor([1.0] * p + [lam / (p * (p - 1))] * len(pairs), dtype=torch.float64)
        weights, values = share, []
        for _ in range(2):
            basis = torch.linalg.svd((weights.sqrt()[:, None] * columns), full_matrices=False).Vh[:2].T
            left = 1 - (columns @ basis).square().sum(1) + eps
            values.append((share * left.sqrt()).sum().item())
            weights = share / left.sqrt()
        found = flag_subspace(rows, rank=2, lam=lam, n_iter=2)
        torch.testing.assert_close(found.basis @ found.basis.T, basis @ basis.T)
        assert found.history == pytest.approx(values)
        torch.testing.assert_close(found.captured, (x @ basis).square().sum(1))

    def test_divisor_and_scale(self) -> None:
        rows = drawn(7, 12)
        plain = flag_aggregate(rows, rank=3)
        torch.testing.assert_close(flag_aggregate(rows, rank=3, divisor="rank"), plain * 7 / 3)
        torch.testing.assert_close(
            flag_aggregate(rows, rank=3, rescale="median_norm"), plain * rows.norm(dim=1).median()
        )

    def test_the_default_rank_is_the_first_whole_number_above_half(self) -> None:
        assert flag_subspace(drawn(15, 40)).basis.shape[1] == 8
        assert flag_subspace(drawn(4, 40)).basis.shape[1] == 3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0]))
def test_the_objective_never_rises_and_the_basis_is_orthonormal(seed: int, lam: float) -> None:
    found = flag_subspace(drawn(8, 15, seed=seed), rank=3, lam=lam, n_iter=20)
    assert all(b <= a for a, b in zip(found.history, found.history[1:], strict=False))
    assert len(found.history) > 1
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0)


class TestInvariance:
    rule = staticmethod(lambda rows: flag_aggregate(rows, rank=2, lam=0.5))

    def test_order_of_workers(self) -> None:
        rows = drawn(6, 10)
        torch.testing.assert_close(self.rule(rows.flip(0)), self.rule(rows))

    def test_length_of_a_row(self) -> None:
        rows = drawn(6, 10)
        scales = torch.tensor([1e-4, 1.0, 1e4, 3.0, 0.5, 7.0], dtype=torch.float64)
        torch.testing.assert_close(self.rule(rows * scales[:, None]), self.rule(rows))

    def test_rotation(self) -> None:
        rows, turn = drawn(6, 10), torch.linalg.qr(drawn(10, 10, seed=1)).Q
        torch.testing.assert_close(self.rule(rows @ turn), self.rule(rows) @ turn)


def test_noise_of_a_few_workers_is_kept_out() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(500, generator=draw)
    rows = truth + 0.3 * torch.randn(15, 500, generator=draw)
    rows[:3] = 100 * torch.randn(3, 500, generator=draw)
    found = flag_subspace(rows, rank=1, n_iter=5)
    assert found.captured[:3].max() < 0.05
    assert found.captured[3:].min() > 0.8
    got = flag_aggregate(rows, rank=1, rescale="median_norm")
    assert torch.cosine_similarity(got, truth, dim=0) > 0.98
    assert torch.cosine_similarity(rows.mean(0), truth, dim=0) < 0.5


def test_updates_of_zeros_count_as_nothing() -> None:
    rows = drawn(4, 6)
    rows[1] = 0
    assert flag_subspace(rows, rank=2).captured[1] == 0
    torch.testing.assert_close(flag_aggregate(rows, rank=2) * 4, flag_aggregate(rows[[0, 2, 3]], rank=2) * 3)
    assert not flag_aggregate(torch.zeros(3, 5)).any()
    assert flag_subspace(torch.zeros(3, 5)).basis.shape == (5, 0)


def test_float32_agrees_with_float64_and_half_precision_is_kept() -> None:
    rows = drawn(15, 3000)
    torch.testing.assert_close(
        flag_aggregate(rows.float(), lam=1.0).double(), flag_aggregate(rows, lam=1.0), atol=1e-6, rtol=1e-4
    )
    assert flag_aggregate(rows.bfloat16()).dtype == torch.bfloat16


def test_the_holder_is_the_function() -> None:
    rows = drawn(6, 9)
    rule = FlagAggregator(2, lam=0.5, n_iter=3, divisor="rank", rescale="median_norm")
    assert torch.equal(rule(rows), flag_aggregate(rows, 2, lam=0.5, n_iter=3, divisor="rank", rescale="median_norm"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"lam": -1.0}, "lam"),
        ({"n_iter": 0}, "n_iter"),
        ({"divisor": "clients"}, "divisor"),
        ({"rescale": "mean_norm"}, "rescale"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FlagAggregator(**options)
    with pytest.raises(ValueError, match=named):
        flag_aggregate(drawn(3, 4), **options)


def test_bad_updates_are_named() -> None:
    rows = drawn(3, 4)
    with pytest.raises(ValueError, match="rank must be in"):
        flag_aggregate(rows, rank=4)
    for wrong in (rows[:1], rows[0], rows.index_fill(0, torch.tensor([1]), float("nan"))):
        with pytest.raises(ValueError, match="updates must be"):
            flag_aggregate(wrong)

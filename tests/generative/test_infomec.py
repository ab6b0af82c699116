"""InfoMEC, MIG and DCI: values known in closed form, and what does not matter to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.generative import dci, infomec, mutual_information_gap

GRID = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(3))


def test_latents_that_are_the_sources() -> None:
    found = infomec(GRID, GRID, discrete=True)
    assert found.modularity == pytest.approx(1.0)
    assert found.compactness == pytest.approx(1.0)
    assert found.explicitness == pytest.approx(1.0, abs=1e-2)
    assert np.allclose(found.nmi, np.eye(3), atol=1e-12)


def test_two_latents_that_each_join_two_of_three_sources() -> None:
    """Each column holds two ones: max over sum is 1/2, and (1/2 - 1/3) / (1 - 1/3) = 1/4."""
    joint = torch.stack([GRID[:, 0] * 5 + GRID[:, 1], GRID[:, 1] * 3 + GRID[:, 2]], 1)
    found = infomec(GRID, joint, discrete=True)
    assert found.modularity == pytest.approx(0.25)
    # Source 1 is in both latents alike: its share is 1/2, that of the others 1; (5/6 - 1/2) / (1/2) = 2/3.
    assert found.compactness == pytest.approx(2 / 3)
    assert found.explicitness == pytest.approx(1.0, abs=1e-2)


def test_a_latent_that_codes_a_source_in_parts_is_modular_and_not_compact() -> None:
    source = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    halves = torch.stack([source[:, 0] // 2, source[:, 0] % 2, source[:, 1]], 1)
    found = infomec(source, halves, discrete=True)
    assert found.modularity == pytest.approx(1.0)
    assert found.nmi[0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-12)
    assert found.compactness == pytest.approx(((0.5 + 1) / 2 - 1 / 3) / (1 - 1 / 3))


@pytest.mark.parametrize("discrete", [True, False])
def test_order_and_names_do_not_matter(discrete: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(4, (300, 3), generator=generator)
    latents = sources.float() @ torch.randn(3, 5, generator=generator) + 0.1 * torch.randn(300, 5, generator=generator)
    latents = (latents * 2).round() if discrete else latents
    first = infomec(sources, latents, discrete=discrete)
    order = torch.randperm(300, generator=generator)
    changed = infomec(sources[order].flip(1) * 7 - 3, 1e3 * latents[order][:, [2, 0, 4, 1, 3]] + 50, discrete=discrete)
    tolerance = {"abs": 1e-9} if discrete else {"abs": 2e-3}  # the neighbour estimate breaks ties by tiny noise
    assert changed.modularity == pytest.approx(first.modularity, **tolerance)
    assert changed.compactness == pytest.approx(first.compactness, **tolerance)
    assert changed.explicitness == pytest.approx(first.explicitness, abs=5e-3)


def test_constant_and_nearly_constant_latents_are_left_out() -> None:
    constant = torch.cat([GRID, torch.zeros(len(GRID), 2, dtype=torch.int64)], 1)
    found = infomec(GRID, constant, discrete=True)
    assert found.active.tolist() == [True] * 3 + [False] * 2
    assert (found.modularity, found.compactness) == (pytest.approx(1.0), pytest.approx(1.0))
    noise = 0.01 * torch.rand(len(GRID), 1, generator=torch.Generator().manual_seed(0))
    assert infomec(GRID, torch.cat([GRID.float(), noise], 1), discrete=False).active.tolist() == [True] * 3 + [False]


def test_nothing_active_and_nothing_told() -> None:
    nothing = infomec(GRID, torch.zeros(len(GRID), 4), discrete=True)
    assert (nothing.modularity, nothing.explicitness, nothing.compactness) == (0.0, 0.0, 0.0)
    # A fourth factor on the grid tells nothing of the first two.
    more = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    unrelated = infomec(more[:, :2], more[:, 2:], discrete=True)
    assert unrelated.modularity == pytest.approx(0.0, abs=1e-9)
    assert unrelated.explicitness == pytest.approx(0.0, abs=1e-6)


def test_continuous_latents_that_hold_a_source_each() -> None:
    generator = torch.Generator().manual_seed(1)
    sources = torch.randint(4, (800, 3), generator=generator)
    latents = sources.float() + 0.05 * torch.randn(800, 3, generator=generator)
    found = infomec(sources, latents, discrete=False)
    assert found.modularity > 0.95
    assert found.compactness > 0.95
    mixed = infomec(sources, latents @ torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q, discrete=False)
    assert mixed.modularity < found.modularity - 0.3


def test_what_latents_do_not_tell_of_rare_values_is_nothing_explicit() -> None:
    """A balanced classifier that knows nothing gives every class the same probability, however rare it is."""
    source = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    grid = torch.cartesian_prod(source, torch.arange(2), torch.arange(3))
    found = infomec(grid[:, :2], grid[:, 2:], discrete=True)
    assert found.explicitness == pytest.approx(0.0, abs=1e-4)


def test_every_source_counts_alike_however_many_values_it_has() -> None:
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(3))
    found = infomec(grid[:, :2], grid[:, [0, 2]], discrete=True)  # the first is told, the second is not
    assert found.explicitness == pytest.approx(0.5, abs=1e-3)


def test_latents_are_active_from_a_twentieth_of_the_largest_range_on() -> None:
    spread = torch.rand(len(GRID), 2, generator=torch.Generator().manual_seed(0))
    spread[:2] = torch.tensor([[0.0], [1.0]])  # ranges of one
    latents = torch.cat([GRID.float(), spread * (GRID.max() / torch.tensor([18.0, 22.0]))], 1)
    assert infomec(GRID, latents, discrete=False).active.tolist() == [True] * 4 + [False]


def test_mutual_information_gap() -> None:
    assert mutual_information_gap(np.eye(3)) == 1.0
    assert mutual_information_gap(np.full((2, 4), 0.3)) == 0.0
    # Two copies of a source leave no gap.
    assert mutual_information_gap(infomec(GRID, GRID.repeat(1, 2), discrete=True).nmi) == pytest.approx(0.0)


def test_dci() -> None:
    shuffled = GRID.repeat(6, 1)[torch.randperm(6 * len(GRID), generator=torch.Generator().manual_seed(0))]
    found = dci(shuffled, shuffled)
    assert found.disentanglement > 0.98
    assert found.completeness > 0.98
    assert found.informativeness == 1.0
    doubled = dci(shuffled, torch.stack([shuffled[:, 0] * 5 + shuffled[:, 1], shuffled[:, 2]], 1))
    # The first latent serves two of three sources, and has two thirds of the importance.
    assert doubled.disentanglement == pytest.approx(2 / 3 * (1 - np.log(2) / np.log(3)) + 1 / 3, abs=0.02)
    assert doubled.completeness > 0.98
    assert dci(shuffled, shuffled) == found


def test_dci_weighs_latents_by_their_importance_and_is_told_by_the_last_quarter() -> None:
    draws = torch.Generator().manual_seed(0)
    shuffled = GRID.repeat(6, 1)[torch.randperm(6 * len(GRID), generator=draws)]
    noise = torch.rand(len(shuffled), 1, generator=draws)
    assert dci(shuffled, torch.cat([shuffled.float(), noise], 1)).disentanglement > 0.98  # nobody uses the noise
    latents = shuffled.clone()
    latents[3 * len(latents) // 4 :] = (latents[3 * len(latents) // 4 :] + 1) % torch.tensor([4, 5, 3])
    assert dci(shuffled, latents).informativeness == 0.0  # what held for three quarters holds no more


@pytest.mark.parametrize(
    ("sources", "latents", "message"),
    [
        (GRID[:, :1], GRID, "sources must be at least two, got 1"),
        (GRID, GRID[:-1], "latents must be as many samples as sources"),
        (GRID, torch.full((len(GRID), 2), float("nan")), "latents must be finite"),
        (torch.zeros(9, 2), torch.zeros(9, 2), "sources must be of at least two values each, got a constant one at 0"),
        (GRID[0], GRID, "sources must be a matrix"),
    ],
)
def test_bad_arguments(sources: Tensor, latents: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infomec(sources, latents, discrete=True)


def test_too_few_samples_for_neighbours() -> None:
    with pytest.raises(ValueError, match="sources must be more than 10 samples"):
        infomec(GRID[:10, 1:], torch.rand(10, 2), discrete=False)
    with pytest.raises(ValueError, match="nmi must be of at least two latents"):
        mutual_information_gap(np.ones((2, 1)))
    with pytest.raises(ValueError, match="trees must be at least 1"):
        dci(GRID, GRID, trees=0)

"""Modules with a memory take a saved state whole or not at all; a new class joins by one entry in MEMBERS."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab import domain, losses, optim, robust, semisup, solvers
from trimtab.ops.whole_state import WholeState

LABELS = torch.arange(12) % 3
TEXT = "got other names or shapes"


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


def images() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1)


def image(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.Unflatten(1, (1, 4, 4)))


def adanpc() -> nn.Module:
    held = domain.AdaNPC(net(), 4, 3)
    held.remember(torch.eye(4)[:3], torch.arange(3))
    return held


MEMBERS: dict[str, Callable[[], nn.Module]] = {
    "ALDRKL": lambda: losses.ALDRKL(6, 3),
    "AdaNPC": adanpc,
    "AdaWAC": lambda: losses.AdaWAC(6),
    "AdvStyle": lambda: domain.AdvStyle(3),
    "BlackBoxDefense": lambda: robust.BlackBoxDefense(lambda x: x.flatten(1), images(), method="rge", q=2),
    "CLUB": lambda: semisup.CLUB(5, 3),
    "ClassCovariance": lambda: domain.ClassCovariance(3, 5),
    "DiscriminativeFeatureEnhancement": lambda: semisup.DiscriminativeFeatureEnhancement([4]),
    "DistributionAlignment": lambda: semisup.DistributionAlignment(4),
    "DiversifiedTranslator": lambda: domain.DiversifiedTranslator(
        nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1), num_conditions=1
    ),
    "DomainHeads": lambda: domain.DomainHeads(net(), 4, 3, 2),
    "ELR": lambda: losses.ELR(6, 3),
    "EdgePairLoss": lambda: domain.EdgePairLoss(images(), canny=domain.EnhancedCanny()),
    "EnsLoss": losses.EnsLoss,
    "GraphMatchingLoss": lambda: semisup.GraphMatchingLoss(6, k=2, group_size=4),
    "IBPLoss": lambda: robust.IBPLoss(0.1),
    "LegoGCD": lambda: semisup.LegoGCD(net(), 4, 2, 3, hidden=4, projection=2),
    "LocalEntropyRegularization": lambda: semisup.LocalEntropyRegularization(3, 5),
    "MESA": lambda: optim.MESA(net()),
    "MaskedCrossViewVAE": lambda: semisup.MaskedCrossViewVAE(nn.Flatten(), [image(16), image(16)], 16, 2, patch=2),
    "NeighbourLoss": lambda: domain.NeighbourLoss(4, 3, capacity=20),
    "NestedDropout": lambda: losses.NestedDropout(6),
    "PSKD": lambda: losses.PSKD(6, 3, total_epochs=10),
    "PoseDA": lambda: domain.PoseDA(
        nn.Sequential(nn.Flatten(), nn.Linear(32, 48)),
        domain.PoseAugmenter(hidden=4),
        domain.PartDiscriminator(hidden=4),
    ),
    "QueueDistributionAlignment": lambda: semisup.QueueDistributionAlignment(3),
    "SFDA2": lambda: domain.SFDA2(net(), nn.Linear(4, 3), 12, 10, k=3),
    "ShrinkMatch": lambda: semisup.ShrinkMatch(net(), nn.Linear(4, 3), align=semisup.DistributionAlignment(3)),
    "SimMatchV2": lambda: semisup.SimMatchV2(net(), nn.Linear(4, 3), LABELS, top_n=3, queue_size=8, dim=4),
    "TrajectoryLoss": lambda: optim.TrajectoryLoss(6, 3, start_epoch=1, lag=1),
    "UDC": lambda: solvers.UDC.for_problem(solvers.TSP, 5, 8),
}


def other(held: nn.Module) -> dict[str, Any]:
    """A state of the same form with other numbers in every part."""
    return {name: moved(part) if isinstance(part, Tensor) else part for name, part in held.state_dict().items()}


def moved(part: Tensor) -> Tensor:
    return ~part if part.dtype == torch.bool else part + 1


def assert_holds(held: nn.Module, state: dict[str, Any]) -> None:
    for name, part in held.state_dict().items():
        if isinstance(part, Tensor):
            torch.testing.assert_close(part, state[name], rtol=0, atol=0, equal_nan=True)


def kept(held: nn.Module) -> dict[str, Any]:
    return {name: part.clone() if isinstance(part, Tensor) else part for name, part in held.state_dict().items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_state_that_does_not_fit_in_one_part_changes_none(name: str, place: int, strict: bool) -> None:
    held = MEMBERS[name]()
    before, state = kept(held), other(held)
    tensors = [part for part, value in state.items() if isinstance(value, Tensor)]
    state[tensors[place]] = torch.zeros(7, 7, 7)
    with pytest.raises(ValueError, match=TEXT):
        held.load_state_dict(state, strict=strict)
    assert_holds(held, before)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_state_that_lacks_a_part_is_refused_or_where_it_may_lack_one_keeps_it(name: str, place: int) -> None:
    held = MEMBERS[name]()
    before, state = kept(held), other(held)
    lost = list(state)[place]
    del state[lost]
    with pytest.raises(ValueError, match=TEXT):
        held.load_state_dict(state)
    assert_holds(held, before)
    held.load_state_dict(state, strict=False)
    assert_holds(held, {**state, lost: before[lost]})


@pytest.mark.parametrize("name", MEMBERS)
def test_a_state_that_fits_is_taken_and_one_with_more_is_refused(name: str) -> None:
    held, state = MEMBERS[name](), other(MEMBERS[name]())
    before = kept(held)
    with pytest.raises(ValueError, match=TEXT):
        held.load_state_dict({**state, "another": torch.zeros(1)})
    assert_holds(held, before)
    held.load_state_dict(state)
    assert_holds(held, state)


def test_a_memory_that_grows_takes_any_number_of_rows_and_none_of_another_width() -> None:
    held, larger = adanpc(), adanpc()
    assert isinstance(larger, domain.AdaNPC)
    larger.remember(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    held.load_state_dict(larger.state_dict())
    assert len(held.memory) == 7  # type: ignore[arg-type]
    before = kept(held)
    with pytest.raises(ValueError, match=TEXT):
        held.load_state_dict({**other(held), "memory.features": torch.zeros(9, 5)})
    assert_holds(held, before)


def every_kind(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from every_kind(child)


def test_every_class_that_takes_states_whole_is_here() -> None:
    for module in pkgutil.walk_packages(trimtab.__path__, "trimtab."):
        if not module.name.startswith(("trimtab.cli", "trimtab.site", "trimtab.studies", "trimtab.federated")):
            importlib.import_module(module.name)
    everyone = [kind for kind in every_kind(WholeState) if kind.__module__.startswith("trimtab.")]
    kinds = {kind.__name__ for kind in everyone if not kind.__module__.startswith("trimtab.studies.")}
    assert kinds == MEMBERS.keys()

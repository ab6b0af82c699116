"""What every attack keeps to: it stays in its ball, draws from its generator, and leaves the network as it was.

A new attack joins by one line in MEMBERS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.attack import eval_mode, pgd, random_in_ball
from trimtab.robust import (
    GDUAP,
    FOAAttack,
    IBPLoss,
    auto_attack,
    boundary_attack,
    fooling_rate,
    propagation_tightness,
    single_step_adversary,
    square_attack,
)

EPS = 0.1
Run = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


class Net(nn.Module):
    """A network with parts that differ between modes, and tokens for attacks that look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm, self.drop, self.head = nn.BatchNorm2d(6), nn.Dropout(0.3), nn.Linear(6, 3)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.drop(tokens.mean(1)), tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.look(x)[0])


class Looking(nn.Module):
    """Shows features instead of logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.look(x)


def projected(norm: str) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        start = random_in_ball(x, EPS, norm, generator=generator)  # type: ignore[arg-type]
        with eval_mode(model):
            return pgd(
                lambda moved: F.cross_entropy(model(moved), y, reduction="none"),
                x,
                EPS,
                norm=norm,  # type: ignore[arg-type]
                steps=3,
                start=start,
                bounds=(0.0, 1.0),
            )

    return run


def one_step(noise: str) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with eval_mode(model):
            return single_step_adversary(model, x, y, EPS, noise=noise, generator=generator).x_adv  # type: ignore

    return run


def universal(prior: str | None) -> Run:
    def run(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        found = GDUAP(model, EPS, prior=prior, steps=3, batch_size=2).craft(x.shape[1:], generator=generator)
        return (x + found.delta).clamp(0, 1)

    return run


def automatic(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    return auto_attack(model, x, y, EPS, steps=3, num_targets=1, num_queries=3, generator=generator).adversarial


def aligned(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    attack = FOAAttack([Looking(model)], eps=EPS, steps=2, num_clusters=3)  # type: ignore[arg-type]
    return attack(x, x.flip(2) * 0.9, generator=generator)


class Member(NamedTuple):
    """An attack under contract."""

    run: Run
    """Attacks a batch."""
    reach: float = EPS
    """How far it may move an element."""


MEMBERS = {
    "pgd": Member(projected("inf")),
    "pgd(l2)": Member(projected("l2")),
    "single_step_adversary": Member(one_step("rs")),
    "single_step_adversary(n)": Member(one_step("n"), 3 * EPS),
    "GDUAP": Member(universal(None)),
    "GDUAP(range)": Member(universal("range")),
    "FOAAttack": Member(aligned),
}


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest) -> Member:
    return MEMBERS[request.param]


def scene(batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype)
    model.norm.running_var.fill_(0.7)
    x = torch.rand(batch, 1, 6, 6, generator=seeded(1), dtype=torch.float64).to(dtype)
    return model, x, torch.arange(batch) % 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_stays_in_the_ball_and_within_the_bounds_and_moves(member: Member) -> None:
    model, x, y = scene()
    moved = member.run(model, x, y, seeded())
    assert moved.shape == x.shape
    assert 0.2 * member.reach / 6 < (moved - x).abs().max() <= member.reach + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad


def test_draws_come_from_the_generator_alone(member: Member) -> None:
    model, x, y = scene()
    state = torch.get_rng_state()
    first, again, other = (member.run(model, x, y, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_network_and_the_inputs_are_left_as_they_were(member: Member) -> None:
    model, x, y = scene()
    model.train()
    model.drop.eval()  # each part keeps a mode of its own
    modes = {name: part.training for name, part in model.named_modules()}
    state, inputs = copy.deepcopy(model.state_dict()), x.clone()
    member.run(model, x, y, seeded())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(x, inputs)
    assert not x.requires_grad


def test_it_works_where_gradients_are_switched_off(member: Member) -> None:
    model, x, y = scene()
    expected = member.run(model, x, y, seeded())
    with torch.no_grad():
        torch.testing.assert_close(member.run(model, x, y, seeded()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_input_and_either_precision(member: Member, dtype: torch.dtype) -> None:
    model, x, y = scene(1, dtype)
    moved = member.run(model, x, y, seeded())
    assert moved.shape == (1, 1, 6, 6)
    assert moved.dtype == dtype
    assert moved.isfinite().all()


def test_a_network_without_slopes_gives_finite_images(member: Member) -> None:
    model, x, y = scene()
    for p in model.parameters():
        nn.init.zeros_(p)
    moved = member.run(model, x, y, seeded())
    assert moved.isfinite().all()
    assert (moved - x).abs().max() <= member.reach + 1e-6


BOUNDED: dict[str, Run] = {
    "pgd": projected("inf"),
    "pgd(l2)": projected("l2"),
    "single_step_adversary": one_step("rs"),
    "single_step_adversary(n)": one_step("n"),
    "FOAAttack": aligned,
    "auto_attack": automatic,
    "boundary_attack": lambda model, x, y, generator: boundary_attack(model, x, y, (y + 1) % 3, EPS, steps=2),
    "square_attack": lambda model, x, y, generator: square_attack(model, x, y, EPS, num_queries=2, generator=generator),
    "fooling_rate": lambda model, x, y, generator: torch.tensor(fooling_rate(model, torch.full_like(x[:1], EPS), x)),
    "propagation_tightness": lambda model, x, y, generator: propagation_tightness(model.conv, x, EPS),
    "IBPLoss": lambda model, x, y, generator: IBPLoss(EPS)(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), x, y),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_inputs_of_another_unit_than_the_bounds_are_refused(name: str) -> None:
    """Of an image that was normalised, nothing within [0, 1] is near: what was clipped to it is no small change."""
    model, x, y = scene()
    BOUNDED[name](model, x, y, seeded())
    with pytest.raises(ValueError, match=r"^x must be within bounds \(0.0, 1.0\), got values from"):
        BOUNDED[name](model, 4 * x - 2, y, seeded())


@pytest.mark.parametrize(
    "name", ["pgd", "pgd(l2)", "single_step_adversary", "FOAAttack", "auto_attack", "square_attack"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_in_half_precision_leaves_no_ball(name: str, dtype: torch.dtype) -> None:
    def squares(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return square_attack(model, x, y, EPS, num_queries=5, generator=generator)

    run = {"auto_attack": automatic, "square_attack": squares}.get(name) or MEMBERS[name].run
    model, x, y = scene(8, dtype)
    found = run(model.eval(), x, y, seeded())
    assert found.dtype == dtype
    assert found.min() >= 0
    assert found.max() <= 1
    offset = found.double() - x.double()
    away = offset.flatten(1).norm(dim=1).max() if "l2" in name else offset.abs().max()
    assert 0 < away <= EPS

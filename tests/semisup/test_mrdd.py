from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.semisup import CLUB, MRDD, MaskedCrossViewVAE, ViewSpecificVAE, gaussian_kl

SIDE, V, C, F = 8, 3, 2, 12


def image(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, SIDE * SIDE), nn.Unflatten(1, (1, SIDE, SIDE)))


def first_stage(seed: int = 0, **options: Any) -> MaskedCrossViewVAE:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, F), nn.Tanh())
    return MaskedCrossViewVAE(encoder, [image(F), image(F)], F, C, **{"patch": 2, **options})


def rule(seed: int = 0, **options: Any) -> MRDD:
    consistency = first_stage(seed)
    own = [
        ViewSpecificVAE(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 2 * V)), image(V + C), V) for _ in range(2)
    ]
    return MRDD(consistency, own, **{"generator": torch.Generator().manual_seed(seed), **options})


def views(seed: int = 0, batch: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 1, SIDE, SIDE, generator=generator) for _ in range(2)]


def test_divergence_is_torchs() -> None:
    mean, log_var = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(gaussian_kl(mean, log_var), expected)
    assert float(gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


def test_the_first_loss_is_the_formula() -> None:
    model, batch = first_stage(kl_weight=0.3).double(), [view.double() for view in views()]
    masks = [torch.zeros(6, 1, SIDE, SIDE, dtype=torch.bool) for _ in range(2)]
    masks[0][:, :, :4] = True
    noise = torch.randn(6, C, dtype=torch.float64)
    found = model.loss(batch, masks=masks, noise=noise)
    seen = [batch[0].clone(), batch[1]]
    seen[0][:, :, :4] = 0
    mean, log_var = model.to_code(torch.cat([model.encoder(view) for view in seen], 1)).chunk(2, 1)
    features = model.from_code(mean + (log_var / 2).exp() * noise)
    error = sum(
        (decoder(features) - view).square().sum() / 6 for decoder, view in zip(model.decoders, batch, strict=True)
    )
    torch.testing.assert_close(found["reconstruction"], error.detach())
    torch.testing.assert_close(found["total"], error + 0.3 * gaussian_kl(mean, log_var))
    assert not found["kl"].requires_grad


def test_the_divergence_weighs_as_much_as_in_the_authors_configuration() -> None:
    model, batch = first_stage(mask_ratio=0.0).double(), [view.double() for view in views(batch=512)]
    noise = torch.zeros(512, C, dtype=torch.float64)
    found = model.loss(batch, noise=noise)
    mean, log_var = model.posterior(batch)
    features = model.from_code(mean)
    summed = sum((decoder(features) - view).square().sum() for decoder, view in zip(model.decoders, batch, strict=True))
    torch.testing.assert_close(512 * found["total"], summed + gaussian_kl(mean, log_var))
    own = ViewSpecificVAE(nn.Identity(), nn.Identity(), V)
    assert (1024 * own.kl_weight, 1024 * rule().mi_weight) == (0.5, 1.0)


def test_masks_hide_their_share_of_every_view_by_itself() -> None:
    model = first_stage(mask_ratio=0.75)
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ones = [torch.ones(4, 1, SIDE, SIDE)] * 2
    model.loss(ones, generator=torch.Generator().manual_seed(0))
    for view in seen:
        assert ((view == 0).flatten(1).sum(1) == 0.75 * SIDE * SIDE).all()
        assert (view.view(4, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).var(3) == 0).all()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][0], seen[0][1])
    seen.clear()
    first_stage_off = first_stage(mask_ratio=0.0)
    first_stage_off.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    first_stage_off.loss(ones)
    assert all(torch.equal(view, ones[0]) for view in seen)


def test_the_code_is_the_mean_of_whole_views() -> None:
    model, batch = first_stage(), views()
    torch.testing.assert_close(model.code(batch), model.posterior(batch)[0])
    assert not model.code(batch).requires_grad


class Formula(nn.Module):
    def __init__(self, formula: Any) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def exact(r: float) -> CLUB:
    """With the true q(y | x) of standard normal numbers of correlation r."""
    club = CLUB(1, 1)
    club.mean = Formula(lambda x: r * x)  # type: ignore[assignment]
    club.log_var = Formula(lambda x: torch.full_like(x, math.log(1 - r * r)))  # type: ignore[assignment]
    return club


@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_the_bound_of_correlated_normals(r: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    y = r * x + math.sqrt(1 - r * r) * e
    bound = float(exact(r).upper_bound(x, y, generator=generator))
    assert bound == pytest.approx(r * r / (1 - r * r), abs=0.03)
    assert bound >= -0.5 * math.log(1 - r * r) - 0.03
    loss = float(exact(r).learning_loss(x, y))
    assert loss == pytest.approx(1 + math.log(1 - r * r), abs=0.02)


def test_the_mean_over_permutations_is_the_bound_of_all_pairs() -> None:
    torch.manual_seed(0)
    club = CLUB(2, 3).double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = [club.upper_bound(x, y, torch.tensor(order)) for order in itertools.permutations(range(4))]
    mean, log_var = club.mean(x), club.log_var(x)
    log_q = -0.5 * ((mean[:, None] - y[None]).square() / log_var.exp()[:, None]).sum(2)
    torch.testing.assert_close(torch.stack(found).mean(), log_q.diagonal().mean() - log_q.mean())
    assert float(club.upper_bound(x, y, torch.arange(4)).detach()) == 0
    assert float(club.upper_bound(x, y[:1].expand(4, 3), torch.tensor([1, 0, 3, 2])).detach()) == 0


def test_fitting_the_estimator_raises_the_likelihood_of_pairs() -> None:
    torch.manual_seed(0)
    club, x = CLUB(1, 1), torch.randn(256, 1)
    y = 0.9 * x + 0.3 * torch.randn(256, 1)
    optimizer = torch.optim.Adam(club.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        losses.append(float(club.learning_loss(x, y).detach()))
        optimizer.zero_grad()
        club.learning_loss(x, y).backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert float(club.upper_bound(x, y, generator=torch.Generator().manual_seed(0)).detach()) > 0.5


def test_the_second_stage_leaves_the_first_alone_and_moves_the_rest() -> None:
    made = rule()
    made.step_consistency(views())
    before = {name: [p.clone() for p in part.parameters()] for name, part in made.modules.items()}
    made.step_specific(views(1))
    moved = {
        name: [not torch.equal(p, q) for p, q in zip(part.parameters(), before[name], strict=True)]
        for name, part in made.modules.items()
    }
    assert not any(moved["consistency"])
    assert all(moved["specific"])
    assert all(moved["clubs"])
    assert all(p.grad is None for part in made.modules.values() for p in part.parameters())


def test_the_bound_moves_the_codes_and_its_own_loss_the_estimator() -> None:
    makings = {weight: rule(mi_weight=weight) for weight in (0.0, 1e3)}
    for made in makings.values():
        found = made.step_specific(views())
        parts = found["reconstruction"] + found["kl"] + made.mi_weight * found["information"]
        torch.testing.assert_close(found["total"], parts)
    off, on = makings.values()
    for name, alike in (("clubs", True), ("specific", False)):
        pairs = zip(off.modules[name].parameters(), on.modules[name].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs) is alike


def test_descending_the_bound_takes_the_shared_part_out_of_a_code() -> None:
    torch.manual_seed(0)
    club, y, e = CLUB(1, 1), torch.randn(256, 1), torch.randn(256, 1)
    optimizer = torch.optim.Adam(club.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        club.learning_loss(y + 0.3 * e, y).backward()
        optimizer.step()
    share = torch.tensor(1.0, requires_grad=True)
    club.upper_bound(share * y + 0.3 * e, y, torch.arange(256).roll(1)).backward()
    assert share.grad is not None
    assert float(share.grad) > 0.1


def test_all_codes_side_by_side() -> None:
    made = rule()
    shared, own = made.codes(views())
    assert torch.equal(made.transform(views()), torch.cat([shared, *own], 1))
    assert made.transform(views()).shape == (6, C + 2 * V)
    made.consistency.train()
    made.specific[0].train(False)
    made.codes(views())
    assert [part.training for part in (made.consistency, *made.specific)] == [True, False, True]


def test_it_resumes_bit_exactly() -> None:
    made = rule()
    made.step_consistency(views())
    made.step_specific(views(1))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    again = rule(1)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one, other in ((m.step_consistency(views(2)), m.step_specific(views(3))) for m in (made, again)):
        assert all(value.isfinite() for value in (*one.values(), *other.values()))
    assert torch.equal(made.transform(views()), again.transform(views()))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: views()[:1],
        lambda: [views()[0], views()[1][:3]],
        lambda: [view[:0] for view in views()],
        lambda: [view[0] for view in views()],
        lambda: [view.long() for view in views()],
    ],
)
def test_a_refused_batch_changes_nothing(bad: Any) -> None:
    made = rule()
    made.step_consistency(views())
    before, draws = made.transform(views()), made.generator.get_state()  # type: ignore[union-attr]
    for step in (made.step_consistency, made.step_specific):
        with pytest.raises((ValueError, TypeError), match="views"):
            step(bad())
    assert torch.equal(made.transform(views()), before)
    assert torch.equal(made.generator.get_state(), draws)  # type: ignore[union-attr]


def test_bad_states_and_arguments_are_refused() -> None:
    made = rule()
    made.step_consistency(views())
    before = made.transform(views())
    state = made.state_dict()
    for spoilt in ({}, {**state, "clubs": {}}, {**state, "optimizers": {}}, {**state, "generator": torch.zeros(3)}):
        with pytest.raises(ValueError, match="state"):
            made.load_state_dict(spoilt)
    assert torch.equal(made.transform(views()), before)
    for call, name in (
        (lambda: first_stage(mask_ratio=1.0), "mask_ratio"),
        (lambda: first_stage(patch=0), "patch"),
        (lambda: first_stage(kl_weight=-1.0), "kl_weight"),
        (lambda: MaskedCrossViewVAE(nn.Flatten(), [image(3)], 3, 2), "decoders"),
        (lambda: MRDD(first_stage(), list(rule().specific)[:1]), "specific"),
        (lambda: rule(lr=0.0), "lr"),
        (lambda: rule(mi_weight=-1.0), "mi_weight"),
        (lambda: CLUB(0, 1), "x_dim"),
    ):
        with pytest.raises(ValueError, match=name):
            call()

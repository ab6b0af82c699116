from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks.domain_generalisation import (
    DomainGeneralisation,
    DomainTraining,
    coloured_digits,
    digit_sets,
    drawn_settings,
    one_by_one,
    one_photo,
    one_rotation,
    photos,
    rotated,
    without_mnist,
    without_upright,
    without_usps,
)
from trimtab.studies.tools import domain_baselines as baselines
from trimtab.studies.tools.domain_training import DomainPlan, RiskMinimization, Seen, domain_accuracy, fit_domains
from trimtab.studies.tools.shifted_images import PHOTO_STYLES, coloured, on_photos

VARIANTS = {
    "rotated": (rotated, 5, 1),
    "coloured": (coloured_digits, 2, 1),
    "digit sets": (digit_sets, 2, 1),
    "photos": (photos, 3, 1),
    "one rotation": (one_rotation, 1, 5),
    "one photo": (one_photo, 1, 3),
    "without upright": (without_upright, 5, 1),
    "without MNIST": (without_mnist, 2, 1),
    "without USPS": (without_usps, 2, 1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_domains_have_the_right_form_and_share_no_image(name: str) -> None:
    task, sources, targets = VARIANTS[name]
    found = task.domains(Trial())
    assert (len(found.sources), len(found.held), len(found.targets)) == (sources, sources, targets)
    parts = [*found.sources, *found.held]
    assert all(len(x) == len(y) > 0 for x, y in [*parts, *found.targets.values()])
    assert len({tuple(x.shape[1:]) for x, _ in [*parts, *found.targets.values()]}) == 1
    assert all(int(y.min()) >= 0 and int(y.max()) < found.num_classes for _, y in parts)
    assert torch.equal(task.domains(Trial()).sources[0][0], found.sources[0][0])
    assert not torch.equal(task.domains(Trial(seed=1)).sources[0][0], found.sources[0][0])
    if task.shift in ("rotation", "colour"):  # the rows themselves, where nothing is drawn over them
        rows = [row.sum(0).flatten().sort().values for x, _ in parts for row in x] if task.shift == "colour" else []
        held = {tuple(row.tolist()) for row in rows}
        assert len(held) >= 0.98 * len(rows)


def test_colours_agree_with_labels_as_often_as_said() -> None:
    draws = torch.Generator().manual_seed(0)
    x, digit = torch.ones(20_000, 1, 2, 2), torch.randint(10, (20_000,), generator=draws)
    images, label = coloured(x, digit, 0.1, generator=draws)
    assert (label == (digit >= 5)).float().mean() == pytest.approx(0.75, abs=0.01)
    colour = images[:, 1].amax((1, 2)) > 0
    assert (images.sum(1) == 1).all()
    assert torch.equal(colour, images[:, 0].amax((1, 2)) == 0)
    assert (colour == label.bool()).float().mean() == pytest.approx(0.9, abs=0.01)


def test_photos_are_inverted_where_there_is_ink() -> None:
    blank, ink = torch.zeros(6, 1, 8, 8), torch.ones(6, 1, 8, 8)
    seen = set()
    for style in PHOTO_STYLES:
        patches, inverted = (on_photos(x, style, generator=torch.Generator().manual_seed(0)) for x in (blank, ink))
        torch.testing.assert_close(patches, 1 - inverted)
        assert patches.shape == (6, 3, 8, 8)
        seen.add(tuple(patches.mean((0, 2, 3)).tolist()))
    assert len(seen) == len(PHOTO_STYLES)


def seen_of(logits: list[torch.Tensor], targets: list[torch.Tensor]) -> Seen:
    losses = [F.cross_entropy(said, y) for said, y in zip(logits, targets, strict=True)]
    return Seen(losses, logits, logits, targets)


def test_reference_penalties_vanish_for_equal_domains_and_see_different_ones() -> None:
    draws = torch.Generator().manual_seed(0)
    plan, network = DomainPlan(2, 3, (1, 8, 8), 10, {"eta": 0.1}), torch.nn.Identity()
    y = torch.randint(3, (20,), generator=draws)
    one, other = (torch.randn(20, 3, generator=draws, requires_grad=True) for _ in range(2))
    for make in (baselines.v_rex, baselines.coral):
        penalty = make(network, plan)  # type: ignore[arg-type]
        assert penalty(seen_of([one, one], [y, y])).item() == pytest.approx(0, abs=1e-12)
        assert penalty(seen_of([one, 2 * other + 1], [y, y])) > 0
    risk = baselines.group_dro(plan)
    losses = torch.tensor([1.0, 3.0])
    for _ in range(60):
        value = risk(losses)
    assert value > 2.99  # the worst domain alone in the end
    # At the best scale of the logits, IRM's slope is zero.
    best = one.detach() * 0
    assert baselines.irm(network, plan)(seen_of([best], [y])).item() == 0  # type: ignore[arg-type]


def test_a_weighted_penalty_is_weak_at_first_and_keeps_the_size_of_the_steps() -> None:
    constant = DomainTraining(penalty=lambda network, plan: lambda seen: torch.tensor(2.0))
    bench = rotated.bench(Trial(setting={"weight": 100.0}), constant)
    rule = RiskMinimization(bench)
    batch = [(x[:8], y[:8]) for x, y in bench.sources]
    rule.network.eval()
    plain = rule.objective(batch) - 2.0
    rule.steps_done = bench.plan.steps
    torch.testing.assert_close(rule.objective(batch), (plain + 200) / 100)


def test_where_colour_misleads_the_weight_is_not_chosen() -> None:
    entrant = DomainTraining(search={"lr": (1e-3, 3e-3), "weight": (1, 10)})
    assert {setting["weight"] for setting in map(one_by_one, settings_of(coloured_digits.grid(entrant)))} == {10}
    assert len({setting["weight"] for setting in map(one_by_one, settings_of(rotated.grid(entrant)))}) > 1
    with pytest.raises(ValueError, match="single"):
        DomainGeneralisation(shift="colour", single=True)


def test_the_domain_that_is_left_out_is_not_trained_on() -> None:
    usual, upright = rotated.domains(Trial()), without_upright.domains(Trial())
    assert list(usual.targets) == ["75 degrees"]
    assert list(upright.targets) == ["0 degrees"]

    assert not torch.equal(usual.sources[0][0], upright.sources[0][0])
    assert list(without_mnist.domains(Trial()).targets) == ["MNIST"]
    assert list(without_usps.domains(Trial()).targets) == ["USPS"]
    assert list(digit_sets.domains(Trial()).targets) == ["digits"]
    with pytest.raises(ValueError, match="left_out must be one of 0 degrees"):
        DomainGeneralisation(left_out="90 degrees")
    with pytest.raises(ValueError, match="left_out must be empty"):
        DomainGeneralisation(shift="photo", left_out="sky")


def test_settings_are_drawn_within_the_grid_as_many_for_all() -> None:
    for entrant in digit_sets.references().values():
        ranges = super(DomainGeneralisation, digit_sets).grid(entrant)
        settings = settings_of(digit_sets.grid(entrant))
        assert len(settings) == digit_sets.tries
        assert json.loads(json.dumps(settings)) == settings  # or a kept choice would be none of the grid's
        for setting in map(one_by_one, settings):
            assert setting.keys() == ranges.keys()
            assert all(min(ranges[name]) <= value <= max(ranges[name]) for name, value in setting.items())
        assert len({tuple(one_by_one(setting).items()) for setting in settings}) == len(settings)
    fixed = drawn_settings({"gamma": (-1.0, 1.0), "share": (1.0,)}, 8)
    assert {setting["gamma"] for setting in map(one_by_one, settings_of(fixed))} == {-1.0, 1.0}


@pytest.mark.parametrize("name", rotated.references())
@pytest.mark.parametrize("task", [rotated, coloured_digits], ids=["cnn", "mlp"])
def test_references_run_and_search(name: str, task: DomainGeneralisation) -> None:
    entrant = task.references()[name]
    setting = settings_of(task.grid(entrant))[0]
    score = task.run(Trial(setting=setting, searching=True), entrant).score
    assert score is not None
    assert 0 <= score <= 1


def test_a_predictor_sees_each_domain_as_a_stream() -> None:
    class Counting:
        def __init__(self, network: torch.nn.Module) -> None:
            self.network, self.seen = network, []

        def begin(self) -> None:
            self.seen.append([])

        def predict(self, x: torch.Tensor) -> torch.Tensor:
            self.seen[-1].append(len(x))
            return self.network(x)

    held: list[Counting] = []

    def predictor(network: torch.nn.Module, bench: object) -> Counting:
        held.append(Counting(network))
        return held[0]

    found = one_rotation.run(Trial(setting={"lr": 1e-3}), DomainTraining(predictor=predictor))
    assert found.metrics["worst_accuracy"] <= found.metrics["target_accuracy"]
    assert len(held[0].seen) == 6  # five targets and the source
    assert held[0].seen[0] == [50, 50, 50, 50]


def test_a_rule_stands_alone() -> None:
    with pytest.raises(ValueError, match="rule"):
        DomainTraining(rule=baselines.MixedDomains, risk=baselines.group_dro)


def test_without_a_partner_mixup_is_between_samples_and_training_learns() -> None:
    bench = one_rotation.bench(Trial(setting={"lr": 3e-3, "alpha": 0.5}), DomainTraining(rule=baselines.MixedDomains))
    rule = bench.rule()
    before = domain_accuracy(rule, *bench.held[0], stream=False)
    fit_domains(bench, rule)
    assert domain_accuracy(rule, *bench.held[0], stream=False) > before + 0.3

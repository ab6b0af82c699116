"""The audit of shared gradients: its pieces in closed form, and that it finds what a gradient gives away."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.federated import (
    GradientInversionAudit,
    client_gradients,
    code_divergence,
    gradient_distance,
    infer_labels,
    project_l1_ball,
    search_lr,
    total_variation,
)
from trimtab.studies.federated import gifd as study_of_gifd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def victim() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3))
        return net.double()


def stages() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = nn.Sequential(nn.Linear(2, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 9), nn.Sigmoid())
        return [parts[0].double(), nn.Sequential(*parts[1], nn.Unflatten(1, (1, 3, 3))).double()]


def audit(**changed: Any) -> GradientInversionAudit:
    options: dict[str, Any] = {"steps": [6, 6], "lrs": [0.1, 0.1], "radii": [None, 0.5], **changed}
    return GradientInversionAudit(stages(), victim().eval(), (2,), **options)


def shared(count: int = 2) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    images, labels = drawn(count, 1, 1, 3, 3, seed=5).sigmoid(), (torch.arange(count) % 3)[:, None]
    return client_gradients(victim().eval(), images, labels), images, labels


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_projection_onto_the_ball() -> None:
    x = drawn(5, 2, 3) * 3
    found = project_l1_ball(x, 2.0)
    torch.testing.assert_close(found.flatten(1).abs().sum(1), torch.full((5,), 2.0, dtype=x.dtype))
    torch.testing.assert_close(project_l1_ball(found, 2.0), found)
    torch.testing.assert_close(project_l1_ball(-x, 2.0), -found)
    assert torch.equal(project_l1_ball(x, 1e3), x)
    assert not project_l1_ball(x, 0.0).any()
    # Nothing in the ball is nearer: the way there makes no acute angle with any way inside.
    inside = project_l1_ball(drawn(5, 2, 3, seed=1), 2.0)
    assert (((x - found) * (inside - found)).flatten(1).sum(1) <= 1e-9).all()


def test_distances() -> None:
    g = [drawn(3, 4), drawn(3, 2, 2, seed=1)]
    zero, two = torch.zeros(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(gradient_distance(g, [7 * part for part in g]), zero)
    torch.testing.assert_close(gradient_distance(g, [-part for part in g]), two)
    half = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]])], [torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0]])]
    assert gradient_distance(*half).item() == 1  # over all parameters together, not one tensor at a time
    assert gradient_distance(*half, kind="l2").item() == (1 + 25) / 2
    nothing = [torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 1)]
    distance = gradient_distance(nothing, half[0])
    distance.sum().backward()
    assert distance.item() == 1
    assert nothing[0].grad is not None
    assert nothing[0].grad.isfinite().all()


def test_gradients_are_those_of_each_client_alone() -> None:
    model, images, labels = victim().eval(), drawn(3, 2, 1, 3, 3), torch.tensor([[0, 1], [2, 2], [1, 0]])
    found = client_gradients(model, images, labels)
    for k in range(3):
        alone = torch.autograd.grad(F.cross_entropy(model(images[k]), labels[k]), list(model.parameters()))
        torch.testing.assert_close([part[k] for part in found], list(alone))
    model[1].requires_grad_(False)
    assert len(client_gradients(model, images, labels)) == len(found) - 2


def test_a_gradient_can_be_matched_by_descent() -> None:
    target, images, labels = shared()
    images = images + 0.1 * drawn(*images.shape, seed=9)
    assert torch.autograd.gradcheck(
        lambda x: gradient_distance(client_gradients(victim().eval(), x, labels), target), images.requires_grad_()
    )


def test_the_label_of_a_single_image_is_told_by_the_last_layer() -> None:
    labels = torch.arange(12) % 3
    found = client_gradients(victim().eval(), drawn(12, 1, 1, 3, 3), labels[:, None])
    assert torch.equal(infer_labels(found[-1]), labels)
    assert torch.equal(infer_labels(found[-2]), labels)  # features after a softplus are positive


def test_learning_rate_variation_and_divergence() -> None:
    assert search_lr(0.0, 0.1) == search_lr(1.0, 0.1) == 0
    assert search_lr(0.05, 0.1) == search_lr(0.25, 0.1) == pytest.approx(0.1)
    assert search_lr(0.625, 0.1) == pytest.approx(0.05)
    image = torch.arange(6.0).view(1, 1, 2, 3)
    assert total_variation(image).item() == 1 + 3
    assert not total_variation(torch.ones(2, 1, 3, 3)).any()
    z = drawn(1, 10_000)
    assert code_divergence(z).item() == pytest.approx(0, abs=1e-3)
    assert code_divergence((z - z.mean()) / z.std(correction=0) + 2.0).item() == pytest.approx(2)


# --- the audit --------------------------------------------------------------------------------------------------------


def test_it_finds_what_the_code_can_show_and_the_feature_maps_find_more() -> None:
    parts, (target, _, labels) = stages(), shared()
    with torch.no_grad():
        made = parts[1](parts[0](drawn(2, 2, seed=3)))[:, None]
    found = audit(steps=[100, 0]).run(client_gradients(victim().eval(), made, labels), labels, start=drawn(2, 1, 2))
    assert (found.distances[0] < 1e-3).all()
    torch.testing.assert_close(found.images, made, atol=0.05, rtol=0)
    # These images no code shows.
    found = audit(radii=[None, None], steps=[30, 40]).run(target, labels, start=drawn(2, 1, 2))
    assert (found.distances[1] < 0.5 * found.distances[0]).all()
    assert (found.best_stage == 1).all()
    assert torch.equal(found.images, found.stage_images[1])
    with torch.no_grad():
        torch.testing.assert_close(parts[1](parts[0](found.inputs[0][:, 0])), found.stage_images[0][:, 0])
        torch.testing.assert_close(parts[1](found.inputs[1][:, 0]), found.images[:, 0])


def test_the_stage_that_matches_best_is_shown() -> None:
    target, _, labels = shared()
    found = audit(lrs=[0.1, 50.0], radii=[None, None]).run(target, labels, start=drawn(2, 1, 2))
    assert torch.equal(found.best_stage, found.distances.argmin(0))
    for k, stage in enumerate(found.best_stage.tolist()):
        assert torch.equal(found.images[k], found.stage_images[stage, k])
    shown = client_gradients(victim().eval(), found.images, labels)
    torch.testing.assert_close(gradient_distance(shown, target), found.distances.amin(0))


def test_balls_hold_feature_maps_near() -> None:
    target, _, labels = shared()
    start = drawn(2, 1, 2)
    held = audit(radii=[None, 0.0]).run(target, labels, start=start)
    torch.testing.assert_close(held.stage_images[1], held.stage_images[0])
    with torch.no_grad():
        at_first = stages()[0](audit()._search(start.flatten(0, 1), 0, target, labels))
        moved = audit(lrs=[0.1, 1.0])._search(at_first, 1, target, labels)
    lengths = (moved - at_first).abs().sum(1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))


def test_a_spherical_code_keeps_its_length_and_weights_do_what_they_say() -> None:
    target, _, labels = shared()
    start = drawn(2, 2)
    code = audit(spherical=True)._search(start, 0, target, labels)
    torch.testing.assert_close(code.norm(dim=1), start.norm(dim=1))
    assert not torch.equal(code, start)
    free, smooth, dark, normal = (
        audit(steps=[20, 0], **weight)._search(start, 0, target, labels)
        for weight in ({}, {"tv": 10.0}, {"image_norm": 10.0}, {"code_weight": 10.0})
    )

    def shown(z: Tensor) -> Tensor:
        with torch.no_grad():
            return audit()._images(z, 0)

    assert total_variation(shown(smooth)).sum() < total_variation(shown(free)).sum()
    assert shown(dark).norm() < shown(free).norm()
    assert code_divergence(normal).sum() < code_divergence(free).sum()


def test_entries_that_were_not_sent_can_be_left_out() -> None:
    target, images, labels = shared()
    sparse = [torch.where(part > 0, part, 0.0) for part in target]
    made, blunt = audit(only_sent=True), audit()
    assert (made._distance(images, sparse, labels).abs() < 1e-12).all()
    assert (blunt._distance(images, sparse, labels) > 0.05).all()


def test_clients_do_not_influence_each_other() -> None:
    target, _, labels = shared()
    start = drawn(2, 1, 2)
    both = audit().run(target, labels, start=start)
    alone = audit().run([part[1:] for part in target], labels[1:], start=start[1:])
    torch.testing.assert_close(alone.images[0], both.images[1])


@pytest.mark.parametrize("weight", [{"tv": 0.3}, {"image_norm": 0.3}, {"code_weight": 0.3}])
def test_the_weights_of_priors_do_not_depend_on_how_many_clients_there_are(weight: dict[str, float]) -> None:
    target, _, labels = shared()
    start = drawn(2, 1, 2)
    both = audit(**weight).run(target, labels, start=start)
    alone = audit(**weight).run([part[1:] for part in target], labels[1:], start=start[1:])
    torch.testing.assert_close(alone.images[0], both.images[1])


def test_the_rate_starts_at_zero_and_the_codes_prior_is_for_the_code_alone() -> None:
    target, _, labels = shared()
    code, maps = drawn(2, 2), drawn(2, 6)
    assert torch.equal(audit(steps=[1, 0])._search(code, 0, target, labels), code)
    assert not torch.equal(audit(steps=[2, 0])._search(code, 0, target, labels), code)
    free, held = (audit(code_weight=w)._search(maps, 1, target, labels) for w in (0.0, 10.0))
    torch.testing.assert_close(held, free, rtol=0, atol=0)


def test_labels_are_inferred_and_batches_of_more_are_searched() -> None:
    target, _, labels = shared(3)
    start = drawn(3, 1, 2)
    assert torch.equal(audit().run(target, start=start).images, audit().run(target, labels, start=start).images)
    images, labels = drawn(1, 2, 1, 3, 3), torch.tensor([[0, 2]])
    found = audit().run(client_gradients(victim().eval(), images, labels), labels, generator=seeded())
    assert found.images.shape == (1, 2, 1, 3, 3)


def test_the_generator_alone_decides_and_nothing_is_changed() -> None:
    (target, _, labels), made = shared(), audit()
    made.model.train()
    held = [made.model, *made.stages]
    before, state = copy.deepcopy([part.state_dict() for part in held]), torch.get_rng_state()
    found = made.run(target, labels, generator=seeded())
    with torch.no_grad():
        again = made.run(target, labels, generator=seeded())
    assert torch.equal(found.images, again.images)
    assert not torch.equal(found.images, made.run(target, labels, generator=seeded(1)).images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close([part.state_dict() for part in held], before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for part in held for p in part.parameters())
    assert made.model.training
    assert not found.images.requires_grad
    assert found.images.min() >= 0
    assert found.images.max() <= 1


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"steps": [3]}, "steps"),
        ({"lrs": [0.1]}, "lrs"),
        ({"radii": [None] * 3}, "radii"),
        ({"steps": [3, -1]}, "steps"),
        ({"lrs": [0.1, 0.0]}, "lrs"),
        ({"radii": [None, -1.0]}, "radii"),
        ({"distance": "l1"}, "distance"),
        ({"tv": -1.0}, "tv"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
    ],
)
def test_arguments_out_of_range_are_named(changed: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        audit(**changed)


def test_what_does_not_fit_is_named() -> None:
    target, images, labels = shared()
    made = audit()
    with pytest.raises(ValueError, match="target"):
        made.run([part[0] for part in target], labels)
    with pytest.raises(ValueError, match="target"):
        made.run([part[:0] for part in target], labels[:0])
    with pytest.raises(ValueError, match="labels"):
        made.run(target, labels[:1])
    with pytest.raises(TypeError, match="labels"):
        made.run(target, labels.double())
    with pytest.raises(ValueError, match="start"):
        made.run(target, labels, start=drawn(2, 2))
    with pytest.raises(ValueError, match="images and labels"):
        client_gradients(victim().eval(), images, labels[:1])
    with pytest.raises(ValueError, match="requires a gradient"):
        client_gradients(victim().requires_grad_(False), images, labels)
    with pytest.raises(ValueError, match="target must have shapes"):
        gradient_distance(target, target[:1])
    with pytest.raises(ValueError, match="gradient"):
        infer_labels(drawn(3))
    with pytest.raises(ValueError, match="radius"):
        project_l1_ball(drawn(3, 2), -1.0)


# --- the study's defences ---------------------------------------------------------------------------------------------


def test_rounded_gradients_have_few_levels_and_the_right_mean() -> None:
    part = drawn(1, 4, 5).expand(4000, 4, 5)
    found = study_of_gifd.rounded(part, 7, seeded())
    step = part[0].abs().max() / 7
    levels = found / step
    torch.testing.assert_close(levels, levels.round(), atol=1e-9, rtol=0)
    assert levels.abs().max() <= 7 + 1e-9
    assert (found - part).abs().max() <= step
    torch.testing.assert_close(found.mean(0), part[0], atol=5 * step.item() / 2 / 4000**0.5, rtol=0)
    assert not study_of_gifd.rounded(torch.zeros(2, 3), 7, seeded()).any()


def test_soteria_leaves_out_the_features_that_tell_most() -> None:
    slopes = torch.tensor([[1.0, 0.0], [0.0, 4.0], [3.0, 4.0], [-1.0, 0.0]], dtype=torch.float64)
    first, last = nn.Linear(2, 4, bias=False).double(), nn.Linear(4, 3).double()
    first.weight.data.copy_(slopes)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
    images = torch.tensor([2.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
    # Features 2, 12, 18 and 0, and the lengths of their slopes 1, 4, 5: they tell 2, 3, 3.6 and nothing.
    gradients = client_gradients(model, images[:, None], torch.tensor([[1]]))
    for share, left in ((0.0, [1, 1, 1, 1]), (1 / 3, [1, 1, 0, 1]), (2 / 3, [1, 0, 0, 1]), (1.0, [0, 0, 0, 1])):
        found = study_of_gifd.without_telling_features(model, images, gradients, share)
        assert torch.equal(found[0], gradients[0])
        assert torch.equal(found[1], gradients[1] * torch.tensor(left))
        assert torch.equal(found[2], gradients[2])


def test_a_client_is_defended_by_itself() -> None:
    model = study_of_gifd.classifier(8).double()
    images = drawn(3, 1, 8, 8).sigmoid()
    gradients = client_gradients(model, images[:, None], torch.tensor([[0], [1], [2]]))
    together = study_of_gifd.without_telling_features(model, images, gradients, 0.8)
    alone = study_of_gifd.without_telling_features(model, images[1:2], [part[1:2] for part in gradients], 0.8)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[1:2], other)
    sent, before = (part[-2].flatten(1).count_nonzero(1) for part in (together, gradients))
    torch.testing.assert_close(sent / before, torch.full((3,), 0.2), atol=0.02, rtol=0)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-15, 1.0, 1e15, 1e30])
def test_the_cosine_has_no_scale_in_single_precision(scale: float) -> None:
    one, other = ([drawn(3, 4, seed=s).float(), drawn(3, 2, 2, seed=s + 1).float()] for s in (0, 7))
    wanted = gradient_distance(one, other)
    assert (wanted > 0.01).all()
    for left, right in ((scale, 1.0), (1.0, scale), (scale, scale)):
        found = gradient_distance([left * part for part in one], [right * part for part in other])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert gradient_distance([0 * part for part in one], other).tolist() == [1.0] * 3


def test_the_cosines_gradient_is_that_of_its_formula() -> None:
    one, other = drawn(2, 6).requires_grad_(), drawn(2, 6, seed=3)
    assert torch.autograd.gradcheck(lambda g: gradient_distance([g], [other]), one)


def test_an_image_of_one_row_varies_along_it_alone() -> None:
    image = torch.tensor([[[[0.0, 1.0, 3.0]]]])
    assert total_variation(image).tolist() == total_variation(image.mT).tolist() == [1.5]
    assert total_variation(image[..., :1]).tolist() == [0.0]
    with pytest.raises(ValueError, match="images must be"):
        total_variation(image[0])


def test_what_no_gradient_is_and_no_label_are_named() -> None:
    target, _, labels = shared()
    spoilt = [part.clone() for part in target]
    spoilt[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match="target must be finite"):
        audit().run(spoilt, labels)
    with pytest.raises(ValueError, match="labels must be at least 0, got -100"):
        audit().run(target, torch.full_like(labels, -100))

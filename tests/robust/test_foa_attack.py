"""FOA-Attack: centres, transport and weights against their definitions, and the attack against what it promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.robust import FOAAttack, cluster_tokens, crop_resized, ensemble_weights, local_alignment, random_boxes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


class Patches(nn.Module):
    """A surrogate of one layer: patches of two pixels, their mean as the global feature."""

    def __init__(self, seed: int = 0, dim: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(1, dim, 2, stride=2)
            self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.drop(self.embed(x).tanh()).flatten(2).mT
        return tokens.mean(1), tokens


class TestClusterTokens:
    def test_equals_sklearn_on_blobs(self):
        cluster = pytest.importorskip("sklearn.cluster")
        tokens = (10 * drawn(3, 1, 4).expand(3, 8, 4).reshape(1, 24, 4) + drawn(1, 24, 4, seed=1)).contiguous()
        ours = cluster_tokens(tokens, 3)[0]
        theirs = torch.tensor(cluster.KMeans(3, n_init=10, random_state=0).fit(tokens[0].numpy()).cluster_centers_)
        assert torch.cdist(ours, theirs).min(1).values.max() < 1e-6
        assert torch.cdist(ours, theirs).argmin(1).unique().numel() == 3

    def test_each_centre_is_the_mean_of_the_tokens_nearest_to_it(self):
        tokens = drawn(4, 30, 5)
        centres = cluster_tokens(tokens, 6, iters=100)
        for points, held in zip(tokens, centres, strict=True):
            nearest = torch.cdist(points, held).argmin(1)
            for k in range(6):
                torch.testing.assert_close(held[k], points[nearest == k].mean(0))

    def test_one_cluster_is_the_mean_and_all_are_the_tokens(self):
        tokens = drawn(2, 7, 3)
        torch.testing.assert_close(cluster_tokens(tokens, 1)[:, 0], tokens.mean(1))
        every = cluster_tokens(tokens, 7)
        torch.testing.assert_close(torch.cdist(every, tokens).amin(2), torch.zeros(2, 7, dtype=torch.float64))

    def test_order_batch_scale_and_origin_of_tokens_do_not_matter(self):
        tokens = drawn(3, 12, 4)
        centres = cluster_tokens(tokens, 4)
        torch.testing.assert_close(cluster_tokens(tokens[:, torch.randperm(12, generator=seeded())], 4), centres)
        torch.testing.assert_close(cluster_tokens(tokens[1:2], 4), centres[1:2])
        torch.testing.assert_close(cluster_tokens(1e4 * tokens + 7, 4), 1e4 * centres + 7)

    def test_equal_tokens_leave_no_nan(self):
        tokens = torch.ones(1, 5, 2, requires_grad=True)
        centres = cluster_tokens(tokens, 3)
        assert torch.equal(centres, torch.ones(1, 3, 2))
        centres.sum().backward()
        assert tokens.grad is not None
        assert tokens.grad.isfinite().all()

    def test_gradient_is_that_of_means_over_fixed_members(self):
        tokens = drawn(1, 9, 2).requires_grad_()
        weight = drawn(1, 3, 2, seed=2)
        (cluster_tokens(tokens, 3) * weight).sum().backward()
        centres = cluster_tokens(tokens.detach(), 3)
        member = torch.cdist(tokens.detach(), centres).argmin(2)[0]
        expected = (weight[0] / member.bincount(minlength=3)[:, None])[member]
        torch.testing.assert_close(tokens.grad[0], expected)

    @pytest.mark.parametrize(
        ("tokens", "count", "error", "name"),
        [
            (torch.zeros(1, 3, 2), 4, ValueError, "num_clusters"),
            (torch.zeros(1, 3, 2), 0, ValueError, "num_clusters"),
            (torch.zeros(3, 2), 1, ValueError, "tokens"),
            (torch.zeros(1, 3, 2, dtype=torch.int64), 1, TypeError, "tokens"),
        ],
    )
    def test_refusals(self, tokens, count, error, name):
        with pytest.raises(error, match=name):
            cluster_tokens(tokens, count)


class TestLocalAlignment:
    def test_equals_pot(self):
        ot = pytest.importorskip("ot")
        ours, goal = drawn(3, 4, 5), drawn(3, 6, 5, seed=1)
        found = local_alignment(ours, goal, reg=0.1, iters=2000)
        for number in range(3):
            similarity = F.normalize(goal[number], dim=1) @ F.normalize(ours[number], dim=1).T
            plan = ot.sinkhorn([1 / 6] * 6, [1 / 4] * 4, 1 - similarity.numpy(), 0.1, stopThr=1e-12, numItermax=10_000)
            torch.testing.assert_close(found[number], (torch.tensor(plan) * similarity).sum(), rtol=1e-6, atol=1e-8)

    def test_the_authors_sweeps_are_nearly_enough(self):
        ours, goal = drawn(8, 5, 6), drawn(8, 5, 6, seed=1)
        torch.testing.assert_close(
            local_alignment(ours, goal), local_alignment(ours, goal, iters=5000), atol=3e-3, rtol=0
        )

    def test_one_centre_each_is_a_cosine_and_lengths_do_not_matter(self):
        ours, goal = drawn(4, 1, 3), drawn(4, 1, 3, seed=1)
        torch.testing.assert_close(local_alignment(ours, goal), F.cosine_similarity(ours[:, 0], goal[:, 0], dim=1))
        torch.testing.assert_close(local_alignment(5 * ours, goal), local_alignment(ours, 0.1 * goal))

    def test_small_reg_finds_the_best_matching_and_large_the_mean_of_all(self):
        goal = torch.eye(5, dtype=torch.float64)[None]
        shuffled = goal[:, [3, 1, 4, 0, 2]]
        torch.testing.assert_close(local_alignment(shuffled, goal, reg=0.02), torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(
            local_alignment(shuffled, goal, reg=1e4), torch.full((1,), 0.2, dtype=torch.float64), rtol=1e-3, atol=0
        )

    def test_the_gradient_takes_the_plan_as_a_constant(self):
        ours, goal = drawn(1, 3, 4).requires_grad_(), drawn(1, 3, 4, seed=1)
        local_alignment(ours, goal, reg=0.2, iters=3000).sum().backward()
        similarity = (F.normalize(goal[0], dim=1) @ F.normalize(ours.detach()[0], dim=1).T).requires_grad_()
        kernel = ((similarity.detach() - 1) / 0.2).exp()
        down = torch.ones(3, dtype=torch.float64)
        for _ in range(3000):
            across = 1 / 3 / (kernel.T @ down)
            down = 1 / 3 / (kernel @ across)
        plan = down[:, None] * kernel * across
        torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
        again = ours.detach().clone().requires_grad_()
        (plan * (F.normalize(goal[0], dim=1) @ F.normalize(again[0], dim=1).T)).sum().backward()
        torch.testing.assert_close(ours.grad, again.grad)

    def test_refusals(self):
        with pytest.raises(ValueError, match="centres"):
            local_alignment(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
        with pytest.raises(ValueError, match="reg"):
            local_alignment(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), reg=0.0)


class TestEnsembleWeights:
    def test_sum_to_the_number_of_surrogates_and_are_one_where_all_grow_alike(self):
        scores = drawn(3, 5).abs() + 0.1
        torch.testing.assert_close(
            ensemble_weights(scores, drawn(3, 5, seed=1).abs()).sum(0), torch.full((5,), 3.0, dtype=torch.float64)
        )
        torch.testing.assert_close(ensemble_weights(1.3 * scores, scores), torch.ones(3, 5, dtype=torch.float64))
        assert torch.equal(ensemble_weights(scores, None), torch.ones(3, 5, dtype=torch.float64))
        one = scores[:1]
        assert torch.equal(ensemble_weights(one, one.flip(1)), torch.ones(1, 5, dtype=torch.float64))

    def test_closed_form_and_direction(self):
        scores, previous = torch.tensor([0.6, 0.5, 0.2]), torch.tensor([0.3, 0.5, 0.4])
        expected = 3 * torch.tensor([2.0, 1.0, 0.5]).div(0.7).softmax(0)
        torch.testing.assert_close(ensemble_weights(scores, previous, temperature=0.7), expected)
        assert expected[0] > expected[1] > expected[2]

    def test_scores_that_were_not_positive_do_no_harm(self):
        weights = ensemble_weights(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([-0.1, 0.0, 1e-12]))
        assert weights.isfinite().all()
        torch.testing.assert_close(weights, 3 * torch.tensor([1.0, 1.0, 0.0]).softmax(0))

    def test_carries_no_gradient(self):
        assert not ensemble_weights(torch.ones(2, requires_grad=True), torch.ones(2)).requires_grad


class TestCrops:
    def test_the_whole_image_is_the_image(self):
        x = drawn(2, 3, 6, 6)
        torch.testing.assert_close(crop_resized(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)), x)

    def test_a_quarter_of_a_doubled_image_is_the_image(self):
        x = drawn(1, 1, 4, 4)
        quarter = crop_resized(F.pad(x, (4, 0, 4, 0)), torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
        inner = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(quarter[..., 1:, 1:], inner[..., 1:, 1:])

    def test_each_image_has_its_own_box(self):
        x = drawn(2, 1, 8, 8)
        boxes = random_boxes(2, generator=seeded())
        both = crop_resized(x, boxes)
        torch.testing.assert_close(both[1:], crop_resized(x[1:], boxes[1:]))

    def test_boxes_lie_inside_with_the_area_asked_for(self):
        boxes = random_boxes(4000, (0.3, 0.6), generator=seeded())
        top, left, height, width = boxes.unbind(1)
        assert (boxes >= 0).all()
        assert (top + height <= 1 + 1e-6).all()
        assert (left + width <= 1 + 1e-6).all()
        area = height * width
        assert area.min() >= 0.3 - 1e-5
        assert area.max() <= 0.6 + 1e-5
        assert abs(area.mean() - 0.45) < 0.01
        assert abs((width / height).log().mean()) < 0.01

    def test_the_ratio_is_that_of_width_to_height(self):
        height, width = random_boxes(2000, (0.1, 0.2), (1.5, 3.0), generator=seeded())[:, 2:].unbind(1)
        ratio = width / height
        assert 1.5 - 1e-5 < ratio.min() < 1.51
        assert 2.98 < ratio.max() < 3.0 + 1e-5
        assert abs(ratio.log().mean() - math.log(1.5 * 3.0) / 2) < 0.01  # uniform in the logarithm

    @pytest.mark.parametrize("scale", [(0.9, 0.5), (0.0, 0.5), (0.5, 1.2)])
    def test_refusals(self, scale):
        with pytest.raises(ValueError, match="scale"):
            random_boxes(2, scale)


class TestAttack:
    def test_an_image_is_its_own_target(self):
        x = torch.rand(3, 1, 8, 8, generator=seeded())
        model = Patches().eval()
        attack = FOAAttack([model], num_clusters=4, local_weight=0.2)
        scores = attack.scores(x, x)
        assert scores.shape == (1, 3)
        assert (scores >= 1 + 0.2 * 0.9).all()
        assert (scores <= 1.2 + 1e-5).all()
        torch.testing.assert_close(FOAAttack([model], local_weight=0.0).scores(x, x), torch.ones(1, 3))

    def test_score_is_the_sum_of_its_parts(self):
        x, targets = torch.rand(2, 4, 1, 8, 8, generator=seeded())
        model = Patches().eval()
        found = FOAAttack([model, model], num_clusters=3, local_weight=0.7).scores(x, targets)
        (g, tokens), (h, wanted) = model(x), model(targets)
        centres = [cluster_tokens(F.normalize(t, dim=2), 3) for t in (tokens, wanted)]
        expected = F.cosine_similarity(g, h) + 0.7 * local_alignment(*centres)
        torch.testing.assert_close(found, expected.expand(2, 4))
        means = FOAAttack([model], num_clusters=0, local_weight=0.7).scores(x, targets)
        mean_tokens = [F.normalize(t, dim=2).mean(1) for t in (tokens, wanted)]
        torch.testing.assert_close(means[0], F.cosine_similarity(g, h) + 0.7 * F.cosine_similarity(*mean_tokens))

    def test_one_step_is_a_signed_step_uphill(self):
        x, targets = torch.rand(2, 2, 1, 8, 8, generator=seeded())
        x = 0.25 + x / 2
        model = Patches().eval()
        attack = FOAAttack([model], eps=0.1, step_size=0.03, steps=1, num_clusters=3, crop_scale=None)
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(attack.scores(at, targets).sum(), at)
        torch.testing.assert_close(attack(x, targets), x + 0.03 * slope.sign())
        assert (attack.scores(attack(x, targets), targets) > attack.scores(x, targets)).all()

    def test_crops_are_those_given(self):
        x, targets = torch.rand(2, 2, 1, 8, 8, generator=seeded())
        x = 0.25 + x / 2
        model = Patches().eval()
        attack = FOAAttack([model], eps=0.1, step_size=0.03, steps=1, num_clusters=3)
        boxes = [(random_boxes(2, generator=seeded(1)), random_boxes(2, generator=seeded(2)))]
        at = x.clone().requires_grad_()
        scores = attack.scores(crop_resized(at, boxes[0][0]), crop_resized(targets, boxes[0][1]))
        (slope,) = torch.autograd.grad(scores.sum(), at)
        torch.testing.assert_close(attack(x, targets, boxes=boxes), x + 0.03 * slope.sign())

    def test_later_steps_weigh_surrogates_by_their_growth(self):
        x, targets = torch.rand(2, 2, 1, 8, 8, generator=seeded())
        models = [Patches(0).eval(), Patches(1).eval()]
        options = {"eps": 0.2, "step_size": 0.02, "steps": 2, "num_clusters": 3, "crop_scale": None}
        attack = FOAAttack(models, temperature=0.05, **options)
        first = FOAAttack(models, **{**options, "steps": 1})(x, targets)
        weights = ensemble_weights(attack.scores(first, targets), attack.scores(x, targets), temperature=0.05)
        at = first.clone().requires_grad_()
        (slope,) = torch.autograd.grad((weights * attack.scores(at, targets)).sum(), at)
        torch.testing.assert_close(attack(x, targets), (first + 0.02 * slope.sign()).clamp(0, 1))

    def test_a_surrogate_that_comes_nearer_outweighs_a_steeper_one_that_does_not(self):
        """One wants the image lighter, the other darker, and that the more the lighter it is already."""

        def at_angle(angle):
            angle = angle.mean((1, 2, 3))
            return torch.stack([angle.cos(), angle.sin()], 1), angle[:, None, None].expand(-1, 1, 2)

        goal = torch.full((1, 1, 1, 1), 0.9)  # where both are at an angle of nought
        lighter = lambda x: at_angle(torch.where(x == goal, 0.0, 1 - x))
        darker = lambda x: at_angle(torch.where(x == goal, 0.0, 1 + 5 * x**2))
        options = {"eps": 0.5, "step_size": 0.1, "local_weight": 0.0, "crop_scale": None}
        ends = [
            FOAAttack([lighter, darker], steps=2, temperature=t, **options)(torch.zeros(1, 1, 1, 1), goal).item()
            for t in (0.05, None)
        ]
        # At first only one has a slope; at 0.1 the other's is larger, 0.87 to 0.78, but it has fallen.
        assert ends == pytest.approx([0.2, 0.0])

    def test_the_default_step_is_one_grey_level_at_the_papers_radius(self):
        x, targets = torch.rand(2, 1, 1, 8, 8, generator=seeded())
        x = 0.25 + x / 2
        moved = FOAAttack([Patches().eval()], steps=1, num_clusters=3, crop_scale=None)(x, targets)
        torch.testing.assert_close((moved - x).abs(), torch.full_like(x, 1 / 255), rtol=1e-4, atol=0)

    def test_stays_in_the_ball_and_in_bounds_whatever_the_start(self):
        x, targets = torch.rand(2, 3, 1, 8, 8, generator=seeded())
        attack = FOAAttack([Patches()], eps=0.1, step_size=0.07, steps=4, num_clusters=4)
        moved = attack(x, targets, start=torch.full_like(x, 3.0), generator=seeded())
        assert (moved - x).abs().max() <= 0.1 + 1e-6
        assert moved.min() >= 0
        assert moved.max() <= 1
        assert not moved.requires_grad

    def test_leaves_models_global_state_and_inputs_alone_and_the_generator_decides(self):
        x, targets = torch.rand(2, 3, 1, 8, 8, generator=seeded())
        kept = x.clone(), targets.clone()
        model = Patches().train()
        state = torch.get_rng_state()
        attack = FOAAttack([model], eps=0.1, steps=3, num_clusters=4)
        first, again, other = (attack(x, targets, generator=seeded(s)) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert model.training
        assert model.drop.training
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, kept[0])
        assert torch.equal(targets, kept[1])

    def test_an_image_does_not_depend_on_its_batch(self):
        x, targets = torch.rand(2, 3, 1, 8, 8, generator=seeded())
        attack = FOAAttack([Patches(), Patches(1)], eps=0.1, steps=4, num_clusters=3, crop_scale=None)
        torch.testing.assert_close(attack(x, targets)[1:2], attack(x[1:2], targets[1:2]))

    def test_works_in_double_precision_and_with_half_precision_features(self):
        x, targets = torch.rand(2, 2, 1, 8, 8, generator=seeded(), dtype=torch.float64)
        double = FOAAttack([Patches().double()], eps=0.1, steps=2, num_clusters=3, crop_scale=None)
        assert double(x, targets).dtype == torch.float64
        model = Patches()
        half = FOAAttack([lambda v: tuple(f.bfloat16() for f in model(v))], eps=0.1, steps=2, num_clusters=3)
        assert half(x.float(), targets.float(), generator=seeded()).isfinite().all()

    @pytest.mark.parametrize(
        "options",
        [
            {"eps": 0.0},
            {"eps": -1.0},
            {"step_size": 0.0},
            {"steps": 0},
            {"num_clusters": -1},
            {"local_weight": -0.1},
            {"temperature": 0.0},
            {"reg": 0.0},
            {"bounds": (1.0, 0.0)},
        ],
    )
    def test_arguments_are_refused_by_name(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            FOAAttack([Patches()], **options)

    def test_calls_are_refused_by_name(self):
        x = torch.rand(2, 1, 8, 8)
        attack = FOAAttack([Patches()], eps=0.1, steps=2, num_clusters=3)
        for arguments, error, name in (
            ((x, x[:1]), ValueError, "targets"),
            ((x[:0], x[:0]), ValueError, "x"),
            ((x[0], x[0]), ValueError, "x"),
            ((x.long(), x), TypeError, "x"),
        ):
            with pytest.raises(error, match=name):
                attack(*arguments)
        with pytest.raises(ValueError, match="boxes"):
            attack(x, x, boxes=[])
        with pytest.raises(ValueError, match="start"):
            attack(x, x, start=x[:1])
        with pytest.raises(ValueError, match="num_clusters"):
            FOAAttack([Patches()], num_clusters=99)(x, x)
        with pytest.raises(ValueError, match="surrogates"):
            FOAAttack([])
        with pytest.raises(TypeError, match="surrogates"):
            FOAAttack([3])


def test_a_sharp_plan_is_finite_and_continues_the_blurred_one() -> None:
    """Opposite features at a small weight of the entropy: a kernel of single precision would be zero everywhere."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 5, 4, generator=generator)
    goal = 0.1 * torch.randn(3, 5, 4, generator=generator) - centres
    for reg in (0.02, 0.001):
        found = local_alignment(centres, goal, reg=reg, iters=200)
        assert found.isfinite().all()
    wide = centres.double(), goal.double()
    below, above = (local_alignment(*wide, reg=reg) for reg in (0.04999999, 0.05))
    torch.testing.assert_close(below, above, rtol=1e-5, atol=0)
    alone = torch.ones(1, 1, 3)
    torch.testing.assert_close(local_alignment(alone, -alone, reg=0.01), torch.tensor([-1.0]))

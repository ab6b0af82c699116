from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import (
    EdgeDraws,
    EdgePairLoss,
    EnhancedCanny,
    ShiftValidator,
    adaptive_thresholds,
    category_folds,
    kfold_shift_selection,
    mix_predictions,
)
from trimtab.domain.crafting_shifts.edges import RULES, _hysteresis, _smoothed, _sobel, _thresholds_by


def images(count: int = 3, side: int = 12, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disc(side: int = 24, radius: float = 7.0) -> Tensor:
    at = torch.arange(side, dtype=torch.float64) - side / 2 + 0.5
    return ((at[:, None] ** 2 + at[None] ** 2) < radius**2).double()[None, None]


# --- thresholds ---


def two_levels(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat(
        [torch.randn(400, generator=generator) * 0.1 + 1, torch.randn(100, generator=generator) * 0.2 + 4]
    )
    return values.double()[None]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_parts_two_levels(rule: str) -> None:
    found = adaptive_thresholds(two_levels())[0, RULES.index(rule)].item()
    assert 1.1 < found < 3.6


def test_otsu_maximises_the_variance_between() -> None:
    values = two_levels()[0]
    ends = torch.linspace(values.min().item(), values.max().item(), 257)[1:-1]

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    best = max(between(float(end)) for end in ends)
    assert between(adaptive_thresholds(values[None])[0, 0].item()) > 0.99 * best


def test_yen_maximises_his_criterion() -> None:
    values = two_levels()[0]
    share = np.histogram(values.numpy(), 256)[0] / len(values)

    def criterion(last: int) -> float:
        low, high = share[: last + 1], share[last + 1 :]
        return -np.log((low**2).sum() * (high**2).sum()) + 2 * np.log(low.sum() * high.sum())

    scores = [criterion(last) for last in range(255)]
    width = (values.max() - values.min()).item() / 256
    best = values.min().item() + width * (int(np.argmax(scores)) + 0.5)
    assert adaptive_thresholds(values[None])[0, RULES.index("yen")].item() == pytest.approx(best, abs=1e-9)


def test_isodata_lies_halfway_between_the_means() -> None:
    values = two_levels()[0]
    threshold = adaptive_thresholds(values[None])[0, RULES.index("isodata")]
    means = values[values <= threshold].mean(), values[values > threshold].mean()
    width = (values.max() - values.min()) / 256
    assert abs(threshold - sum(means) / 2) < 2 * width


def test_li_is_a_stationary_point_of_the_cross_entropy() -> None:
    values = two_levels()[0]
    shifted = values - values.min()
    threshold = adaptive_thresholds(values[None])[0, RULES.index("li")] - values.min()
    low, high = shifted[shifted <= threshold].mean(), shifted[shifted > threshold].mean()
    torch.testing.assert_close(threshold, (low - high) / (low.log() - high.log()))


def test_thresholds_move_with_the_values() -> None:
    values = two_levels()
    expected = adaptive_thresholds(values)
    for scale, shift in ((1e3, 0.0), (1e-3, 0.0), (1.0, 50.0)):
        torch.testing.assert_close(
            adaptive_thresholds(scale * values + shift), scale * expected + shift, rtol=1e-6, atol=0
        )
    assert (adaptive_thresholds(torch.full((2, 9), 0.3)) == 0.3).all()
    rows = torch.cat([values, 2 * values])
    torch.testing.assert_close(adaptive_thresholds(rows)[1], adaptive_thresholds(2 * values)[0])


def test_each_image_has_the_threshold_of_its_own_rule():
    values = torch.cat([torch.rand(9, 40, generator=torch.Generator().manual_seed(0)), torch.full((5, 40), 0.3)])
    rule = torch.arange(14) % len(RULES)
    assert torch.equal(_thresholds_by(values, rule), adaptive_thresholds(values).gather(1, rule[:, None])[:, 0])


# --- edges ---


def test_smoothing_and_gradients_are_those_of_scipy() -> None:
    x = torch.zeros(2, 1, 25, 25, dtype=torch.float64)
    x[:, :, 8:17, 8:17] = images(2, 9)
    smooth = _smoothed(x, torch.tensor([1.0, 2.0], dtype=torch.float64))
    for row, sigma in enumerate((1.0, 2.0)):
        expected = ndi.gaussian_filter(x[row, 0].numpy(), sigma, mode="constant", radius=6)
        inside = (slice(6, -6),) * 2  # nearer to the frame, the part of the kernel within counts
        np.testing.assert_allclose(smooth[row, 0][inside], expected[inside], rtol=0.02)
    across, down = _sobel(x)
    np.testing.assert_allclose(across[0, 0], ndi.sobel(x[0, 0].numpy(), axis=1, mode="nearest"), atol=1e-12)
    np.testing.assert_allclose(down[0, 0], ndi.sobel(x[0, 0].numpy(), axis=0, mode="nearest"), atol=1e-12)


def test_no_smoothing_is_the_image_itself() -> None:
    x = images()
    torch.testing.assert_close(_smoothed(x, torch.zeros(3, dtype=torch.float64)), x)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_a_step_is_a_line_of_one_pixel(sigma: float) -> None:
    x = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    x[0, :, :, 6:] = 1
    x[1, :, 6:] = 1
    edges = EnhancedCanny()(x, draws=EdgeDraws.fixed(2, sigma))
    assert edges[0, 0, 1:-1].sum(1).tolist() == [1] * 10
    assert edges[1, 0, :, 1:-1].sum(0).tolist() == [1] * 10
    assert set(edges[0, 0].nonzero()[:, 1].tolist()) <= {5, 6}


def test_a_disc_is_a_thin_closed_ring() -> None:
    edges = EnhancedCanny().eval()(disc())[0, 0]
    at = edges.nonzero().double() - 11.5
    radius = at.norm(dim=1)
    assert (radius > 5.5).all()
    assert (radius < 8.5).all()
    assert ndi.label(edges.numpy(), np.ones((3, 3)))[1] == 1
    assert ndi.label(1 - edges.numpy())[1] == 2  # inside and outside
    assert 35 <= len(at) <= 60


def test_edges_do_not_depend_on_light_and_contrast_or_on_the_batch() -> None:
    canny, x = EnhancedCanny().eval(), disc() * 0.5 + 0.02 * images(1, 24)
    expected = canny(x)
    for other in (0.5 * x, x + 0.3, 1 - x):
        assert (canny(other) - expected).abs().mean() < 0.02
    both = canny(torch.cat([x, disc(radius=4.0)]))
    assert torch.equal(both[:1], expected)
    assert torch.equal(canny(x.expand(1, 3, 24, 24)), expected)


def test_a_constant_image_has_no_edges() -> None:
    assert (EnhancedCanny().eval()(torch.full((2, 3, 8, 8), 0.4)) == 0).all()
    assert (EnhancedCanny()(torch.zeros(2, 1, 8, 8), generator=torch.Generator().manual_seed(0)) == 0).all()


def test_weak_edges_stay_where_they_touch_strong_ones() -> None:
    ridge = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0], [0, 2.0, 1.0, 0, 0, 0.4, 2.0], [0, 0, 0, 1.0, 1.0, 0, 0]])
    apart = torch.tensor([[1.0, 1.0, 0, 0, 2.0, 0, 0]] + [[0.0] * 7] * 2)
    found = _hysteresis(torch.stack([ridge, apart])[:, None], torch.tensor([0.5, 0.5]), torch.tensor([1.5, 1.5]))
    assert found[0, 0].long().tolist() == [[0] * 7, [0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert found[1, 0, 0].long().tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_training_draws_by_the_generator_and_can_be_given_what_is_drawn() -> None:
    canny, x = EnhancedCanny(), images(6, 16)
    state = torch.random.get_rng_state()
    one, other = (canny(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(one, other)
    assert not torch.equal(one, canny(x, generator=torch.Generator().manual_seed(1)))
    draws = canny.draw(6, torch.Generator().manual_seed(0))
    assert torch.equal(canny(x, draws=draws), one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(canny.eval()(x), canny(x, draws=EdgeDraws.fixed(6)))
    many = canny.draw(3000, torch.Generator().manual_seed(0))
    assert many.threshold_noise.std().item() == pytest.approx(10, rel=0.1)
    assert torch.bincount(many.rule).min() > 500
    assert set(many.sigma.tolist()) == {0, 1, 2}


def test_noise_that_leaves_the_gradients_range_is_not_used() -> None:
    x = (0.7 * disc() + 0.2 * images(1, 24)).expand(2, -1, -1, -1)
    plain = EdgeDraws.fixed(2)
    far = EdgeDraws(plain.sigma, plain.rule, torch.tensor([1e3, -1e3]), plain.hysteresis_noise)
    canny = EnhancedCanny()
    assert torch.equal(canny(x, draws=far), canny(x, draws=plain))


def slopes(heights: list[float]) -> Tensor:
    """An image of vertical steps, apart from one another, whose gradients are as large as these."""
    row = torch.zeros(1)
    for number, height in enumerate(heights):
        step = height / 4 * (-1) ** number  # Sobel's weights sum to four
        row = torch.cat([row, row[-1:].expand(5), row[-1:] + step, (row[-1:] + step).expand(5)])
    return row.double().expand(1, 1, 9, -1) + 0.5


def seen(x: Tensor, canny: EnhancedCanny, **drawn: float) -> int:
    """How many steps are seen as edges."""
    plain = EdgeDraws.fixed(1, 0.0)
    rule = torch.tensor([RULES.index("mean")])
    draws = EdgeDraws(plain.sigma, rule, *(torch.tensor([drawn.get(name, 0.0)]) for name in ("move", "apart")))
    return int(canny(x, draws=draws)[0, 0, 4].sum())


def test_the_two_thresholds_are_shares_of_the_images_own_and_move_apart_by_what_is_drawn() -> None:
    sizes = [0.5, 0.16, 0.11, 0.06]
    x, canny = slopes(sizes), EnhancedCanny()
    mean = torch.hypot(*_sobel(x)).mean().item()
    assert [round(size / mean, 1) for size in sizes] == [13.6, 4.3, 3.0, 1.6]
    # Steps do not touch, so that those between the thresholds are not seen. The upper one is 1.5 and what is drawn, at
    # most 2; what would be below the lower one changes places with it.
    for apart, expected in ((-0.3, 4), (0.0, 4), (0.4, 3), (3.0, 3), (-5.0, 1)):
        assert seen(x, canny, apart=apart) == expected
    assert seen(x, canny, apart=-20.0) == 1  # none is above 20.5 times the mean; one is above 0.2
    assert seen(x, canny, move=0.6 * mean) == 3


def test_colours_are_weighed_as_the_eye_does() -> None:
    x = images(2, 20, channels=3)
    grey = 0.2989 * x[:, :1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:]
    assert torch.equal(EnhancedCanny().eval()(x), EnhancedCanny().eval()(grey))


# --- pairs ---


def net(channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 3)).double()


def test_the_loss_is_of_both_in_one_batch() -> None:
    x, targets, edges = images(4), torch.tensor([0, 1, 2, 0]), images(4, seed=1).round()
    found = EdgePairLoss(net(), weight=0.3)(x, targets, edges=edges)
    logits = net()(torch.cat([x, 1 - edges]))
    expected = (F.cross_entropy(logits[:4], targets) + 0.3 * F.cross_entropy(logits[4:], targets)) / 2
    torch.testing.assert_close(found["total"], expected)
    torch.testing.assert_close(found["edge"], F.cross_entropy(logits[4:], targets).detach())


def test_without_edges_it_is_half_of_cross_entropy() -> None:
    x, targets = images(4), torch.tensor([0, 1, 2, 0])
    found = EdgePairLoss(net().eval(), weight=0.0)(x, targets, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["total"], F.cross_entropy(net().eval()(x), targets) / 2)


def test_edges_are_those_of_the_augmented_images() -> None:
    x, targets, drawing = images(4), torch.tensor([0, 1, 2, 0]), EnhancedCanny().eval()
    found = EdgePairLoss(net().eval(), canny=drawing, augment=lambda x, generator: x.flip(3))(x, targets)
    torch.testing.assert_close(found["image"], F.cross_entropy(net().eval()(x.flip(3)), targets).detach())
    edges = 1 - drawing(x.flip(3))
    torch.testing.assert_close(found["edge"], F.cross_entropy(net().eval()(edges), targets).detach())


def test_predictions_by_image_edge_or_both() -> None:
    loss, x = EdgePairLoss(net(3)), images(4, channels=3)
    model = net(3).eval()
    edges = (1 - EnhancedCanny().eval()(x)).expand(-1, 3, -1, -1)
    torch.testing.assert_close(loss.predict(x, 1.0), model(x).log_softmax(1))
    torch.testing.assert_close(loss.predict(x, 0.0), model(edges).log_softmax(1))
    torch.testing.assert_close(loss.predict(x, 0.25), mix_predictions(model(x), model(edges), 0.25))
    assert loss.training
    assert loss.model[1].training


def test_a_mixture_is_the_product_of_powers() -> None:
    p, q = images(1, 5)[0, 0], images(1, 5, seed=1)[0, 0]
    a, b = p.softmax(1), q.softmax(1)
    product = a**0.3 * b**0.7
    torch.testing.assert_close(mix_predictions(p, q, 0.3).exp(), product / product.sum(1, keepdim=True))
    torch.testing.assert_close(mix_predictions(p, q, 1.0), p.log_softmax(1))
    torch.testing.assert_close(mix_predictions(p, q, 0.0), q.log_softmax(1))
    assert mix_predictions(1e4 * p, -1e4 * q, 0.5).isfinite().all()


# --- selection ---

KINDS = {
    "arithmetic": [lambda x, g: -x, lambda x, g: x + torch.randn(x.shape, generator=g)],
    "blur": [lambda x, g: x / 2],
    "color": [lambda x, g: x.flip(1)],
}
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X.argmax(1)


def test_scores_are_means_over_copies() -> None:
    validator = ShiftValidator(KINDS)
    found = validator.score(lambda x: x, X, Y)
    copies = validator.copies(X)
    right = {name: [(c.argmax(1) == Y).double().mean().item() for c in held] for name, held in copies.items()}
    for name, held in right.items():
        assert found[name] == pytest.approx(sum(held) / len(held))
    assert found["mean"] == pytest.approx(sum(sum(held) for held in right.values()) / 4)
    assert found["blur"] == 1
    assert found["arithmetic"] < 1


def test_everybody_meets_the_same_copies() -> None:
    first = ShiftValidator(KINDS, seed=1)
    alone = ShiftValidator(KINDS, seed=1).copies(X, ["arithmetic"])["arithmetic"]
    state = torch.random.get_rng_state()
    for one, other in zip(first.copies(X)["arithmetic"], alone, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(ShiftValidator(KINDS, seed=2).copies(X)["arithmetic"][1], alone[1])


@pytest.mark.parametrize("k", [2, 3])
def test_no_kind_is_both_trained_with_and_scored_on(k: int) -> None:
    names = [f"kind {number}" for number in range(7)]
    folds = category_folds(names, k)
    assert sorted(name for fold in folds for name in fold) == sorted(names)
    seen: list[set[str]] = []

    def fit(candidate, kinds):
        seen.append(set(kinds))
        return lambda x: x

    augmentations = {name: [lambda x, g: x] for name in names}
    found = kfold_shift_selection(["only"], fit, augmentations, X, Y, k=k)
    assert seen == [set(names) - set(fold) for fold in folds]
    assert set(found.by_category[0]) == set(names)


def test_the_best_candidate_is_the_one_that_stands_what_it_has_not_seen() -> None:
    """One candidate has learned by heart what it is trained with; the other has not, and stands all."""

    def fit(candidate, kinds):
        if candidate == "robust":
            return lambda x: torch.where(torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)) < 0.8, x, -x)
        known = [change(X, None) for held in kinds.values() for change in held]
        return lambda x: x if any(torch.equal(x, one) for one in known) else -x

    still = {name: [lambda x, g, by=by: x + by] for by, name in enumerate(("a", "b", "c", "d"))}
    found = kfold_shift_selection(["by heart", "robust"], fit, still, X, Y)
    assert found.best == "robust"
    assert found.scores[0] == pytest.approx((-X).argmax(1).eq(Y).double().mean().item())


def test_scores_weigh_copies_alike() -> None:
    found = kfold_shift_selection([None], lambda candidate, kinds: lambda x: x, KINDS, X, Y)
    assert found.scores[0] == pytest.approx(ShiftValidator(KINDS).score(lambda x: x, X, Y)["mean"])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: EnhancedCanny(sigmas=()), "sigmas"),
        (lambda: EnhancedCanny(threshold_noise=-1), "threshold_noise"),
        (lambda: EnhancedCanny()(torch.zeros(2, 2, 8, 8)), "x"),
        (lambda: EnhancedCanny()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), "x"),
        (lambda: EnhancedCanny()(torch.zeros(2, 1, 8, 8), draws=EdgeDraws.fixed(3)), "draws"),
        (lambda: EdgePairLoss(net(), weight=-1.0), "weight"),
        (lambda: EdgePairLoss(net())(images(2), torch.tensor([0])), "targets"),
        (lambda: EdgePairLoss(net())(images(2), torch.tensor([0, 3])), "targets"),
        (lambda: EdgePairLoss(net()).predict(images(2), 1.5), "share"),
        (lambda: mix_predictions(X, X[:2], 0.5), "edge_logits"),
        (lambda: mix_predictions(X, X, -0.5), "share"),
        (lambda: ShiftValidator({}), "augmentations"),
        (lambda: ShiftValidator({"blur": []}), "augmentations"),
        (lambda: ShiftValidator(KINDS).score(lambda x: x, X, Y[:3]), "y"),
        (lambda: ShiftValidator(KINDS).score(lambda x: x, X, Y, ["weather"]), "names"),
        (lambda: category_folds(["a", "b"], 3), "k"),
        (lambda: category_folds(["a", "b"], 1), "k"),
        (lambda: kfold_shift_selection([], lambda c, k: lambda x: x, KINDS, X, Y), "candidates"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name}.* must"):
        call()
